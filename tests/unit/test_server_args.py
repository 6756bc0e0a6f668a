"""SGLang's arguments: what is refused, what follows what, and flags of ours among them."""

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from twilight_sgl.config import TwilightConfig
from twilight_sgl.errors import TwilightError
from twilight_sgl.patches import server_args as server_args_patches


def server_args(**given: Any) -> SimpleNamespace:
    values = {
        "device": "cpu",
        "attention_backend": None,
        "prefill_attention_backend": None,
        "decode_attention_backend": "twilight",
        "page_size": None,
        "kv_cache_dtype": "auto",
        "speculative_algorithm": None,
        "speculative_draft_attention_backend": None,
        "speculative_attention_mode": "prefill",
        "tp_size": 1,
        "dp_size": 1,
        "enable_dp_attention": False,
    }
    return SimpleNamespace(**values | given)


def apply_defaults(args: SimpleNamespace) -> None:
    hook = next(p.hook for p in server_args_patches.PATCHES if p.hook.__name__ == "_apply_defaults")
    hook(args)


@pytest.mark.parametrize("name", ["attention_backend", "prefill_attention_backend"])
def test_twilight_only_decodes(name: str) -> None:
    with pytest.raises(TwilightError, match="--decode-attention-backend twilight") as caught:
        apply_defaults(server_args(**{name: "twilight"}))
    assert f"--{name.replace('_', '-')} twilight" in str(caught.value)


@pytest.mark.parametrize(
    ("sglangs", "ours", "expected"),
    [(None, None, 16), (None, 32, 32), (64, None, 64), (32, 32, 32), (16, 16, 16)],
)
def test_page_sizes_agree(sglangs: int | None, ours: int | None, expected: int) -> None:
    if ours is not None:
        TwilightConfig(page_size=ours).to_environment()
    args = server_args(page_size=sglangs)
    apply_defaults(args)
    assert args.page_size == TwilightConfig.from_environment().page_size == expected


@pytest.mark.parametrize(
    ("sglangs", "ours", "complaint"),
    [(64, 32, "--page-size 64 and --twilight-page-size 32 differ"), (1, 16, "--page-size 1 is")],
)
def test_page_sizes_that_cannot_agree(sglangs: int, ours: int, complaint: str) -> None:
    TwilightConfig(page_size=ours).to_environment()
    with pytest.raises(TwilightError, match=complaint):
        apply_defaults(server_args(page_size=sglangs))


def test_other_servers_are_left_alone() -> None:
    args = server_args(decode_attention_backend="fa3")
    before = dict(vars(args))
    apply_defaults(args)
    assert vars(args) == before


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Check arguments as they are after SGLang's own defaults, with a model that is fine."""
    model = SimpleNamespace(model_path="m", attention_arch=None, is_encoder_decoder=False)

    def check(model_has: dict[str, Any] | None = None, **given: Any) -> None:
        args = server_args(**{"page_size": 16} | given)
        served = SimpleNamespace(**vars(model) | (model_has or {}))
        monkeypatch.setattr(server_args_patches, "resolved", lambda args: args)
        monkeypatch.setattr(
            server_args_patches,
            "uses_twilight",
            lambda args: args.decode_attention_backend == "twilight",
        )
        monkeypatch.setattr(server_args_patches, "model_config", lambda args: served)
        server_args_patches._refuse_unsupported(args)

    return check


def test_a_plain_server_is_accepted(refuse: Callable) -> None:
    refuse()
    refuse(kv_cache_dtype="fp8_e4m3", speculative_algorithm="EAGLE")


REFUSED = {
    **{name: ({name: True}, reason) for name, reason in server_args_patches.REFUSED_MODES.items()},
    "another page size": ({"page_size": 1}, "--page-size is 1 after"),
    "decode context parallelism": ({"dcp_size": 2}, "--dcp-size 2"),
    "data-parallel attention on a CPU": (
        {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True},
        "--enable-dp-attention",
    ),
    "fp4 keys": ({"kv_cache_dtype": "fp4_e2m1"}, "--kv-cache-dtype fp4_e2m1"),
    "verification as decode": (
        {"speculative_algorithm": "EAGLE", "speculative_attention_mode": "decode"},
        "--speculative-attention-mode prefill",
    ),
}


@pytest.mark.parametrize(("given", "complaint"), REFUSED.values(), ids=REFUSED)
def test_refused_modes(refuse: Callable, given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TwilightError, match=complaint):
        refuse(**given)
    refuse(**given, decode_attention_backend="fa3")


def test_refused_models(refuse: Callable) -> None:
    from sglang.srt.configs.model_config import AttentionArch

    for has, complaint in (
        ({"attention_arch": AttentionArch.MLA}, "MLA"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ):
        with pytest.raises(TwilightError, match=complaint) as caught:
            refuse(has)
        assert "m " in str(caught.value)
        assert "use another --decode-attention-backend" in str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "heads"),
    [
        ({}, (32, 8)),
        ({"tp_size": 4}, (8, 2)),
        ({"tp_size": 4, "dp_size": 4}, (8, 2)),  # replicas
        ({"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}, (16, 4)),
        ({"tp_size": 4, "dp_size": 4, "enable_dp_attention": True}, (32, 8)),
    ],
)
def test_kernels_are_asked_about_the_heads_of_an_attention_rank(
    refuse: Callable,
    monkeypatch: pytest.MonkeyPatch,
    parallel: dict[str, Any],
    heads: tuple[int, int],
) -> None:
    asked = []

    def supports(**shape: Any) -> tuple[bool, str]:
        asked.append((shape["heads_q"], shape["heads_kv"]))
        return False, "so they say"

    monkeypatch.setattr("twilight_sgl.attention.triton_pipeline.supports", supports)
    model = {
        "num_attention_heads": 32,
        "get_num_kv_heads": lambda ranks: 8 // ranks,
        "head_dim": 128,
        "v_head_dim": 128,
        "dtype": torch.bfloat16,
        "context_len": 4096,
    }
    with pytest.raises(TwilightError, match="so they say"):
        refuse(model, device="cuda", **parallel)
    assert asked == [heads]


def test_flags_reach_the_environment() -> None:
    hook = next(p.hook for p in server_args_patches.PATCHES if p.when == "around")
    args = argparse.Namespace(twilight_config=None, twilight_p="0.25", model_path="m")
    seen = []
    assert hook(lambda cls, args: seen.append((cls, args)) or "made", object, args) == "made"
    assert seen == [(object, args)]
    assert TwilightConfig.from_environment() == TwilightConfig(p=0.25)
