"""What the CPU platform chooses where SGLang's choice would not work."""

from types import SimpleNamespace
from typing import Any

import pytest
import sglang  # noqa: F401 (before its platforms, which it imports in an order of its own)

from twilight_sgl.errors import TwilightError
from twilight_sgl.platforms import cpu


def resolve(**given: Any) -> SimpleNamespace:
    names = ("attention_backend", "max_total_tokens", "grammar_backend")
    args = SimpleNamespace(**{**dict.fromkeys(names), "dtype": "auto", **given})
    cpu.TorchCpuPlatform().apply_server_args_defaults(args)
    return args


def test_defaults_give_way_to_what_is_asked_for() -> None:
    args = resolve()
    assert (args.attention_backend, args.dtype) == ("torch_native", "float32")
    assert args.max_total_tokens == cpu.MAX_TOTAL_TOKENS
    args = resolve(dtype="bfloat16", max_total_tokens=64, grammar_backend="outlines")
    assert (args.dtype, args.max_total_tokens, args.grammar_backend) == ("bfloat16", 64, "outlines")


@pytest.mark.parametrize(
    ("compiler", "chosen"), [("/usr/bin/g++", "llguidance"), (None, "none")], ids=["g++", "none"]
)
def test_grammars_that_work_without_a_gpu(
    compiler: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu.shutil, "which", lambda name: compiler)
    assert resolve().grammar_backend == chosen


def test_grammars_that_need_a_gpu_are_refused() -> None:
    with pytest.raises(TwilightError, match=r"--grammar-backend xgrammar .*llguidance"):
        resolve(grammar_backend="xgrammar")
