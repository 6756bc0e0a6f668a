"""Kernels of decode graphs are compiled before the first is captured, and nothing runs for it."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from twilight_sgl.attention.backend import TritonAttnBackend
from twilight_sgl.config import TwilightConfig
from twilight_sgl.kernels import launch
from twilight_sgl.patches.compile_ahead import _compile

SCRIPT = """
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from twilight_sgl.kernels.launch import compiling_ahead, launch

launchers = []
driver.set_active(
    SimpleNamespace(
        launcher_cls=lambda src, metadata: launchers.append(src.fn.__name__),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
)
compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda **call: compiled.append(
    call["compile"]["constants"][(2,)]
)


@triton.jit
def double(values_ptr, count, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    values = tl.load(values_ptr + index, index < count)
    tl.store(values_ptr + index, values * 2, index < count)


values = torch.ones(40)
with compiling_ahead():
    for block in (16, 3, 64, 16):  # 3 is no power of two
        launch(double, 5)(values, 40, BLOCK=block)
assert sorted(compiled) == [16, 64], compiled
assert launchers == ["double"], "the same for both"
assert values.eq(1).all()
double.warmup(values, 40, BLOCK=64, grid=(1,))
assert len(compiled) == 2, "compiled again"
del driver.active.launcher_cls
with compiling_ahead():  # of its own, as its values are of another type
    launch(double, 5)(values.half(), 40, BLOCK=16)
assert len(compiled) == 3, "a launcher that cannot be built is passed over"
try:
    launch(double, 5)(values, 40, BLOCK=3)
except triton.CompilationError as error:
    print(error.error_message)
"""


def test_launches_compile_and_nothing_else(tmp_path: Path) -> None:
    """For a GPU that is not there, in a process that has not run Triton's interpreter."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "power of 2" in done.stdout, "what does not compile says so where it is launched"


class Kernel:
    """Notes what is asked of a kernel."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def warmup(self, *args: Any, grid: tuple[int], **options: Any) -> None:
        self.asked.append(("compile", grid, args, options))

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *args, **options: self.asked.append(("launch", grid, args, options))


def test_kernels_are_launched_again_after_an_error() -> None:
    kernel = Kernel()
    with pytest.raises(ZeroDivisionError), launch.compiling_ahead():
        raise ZeroDivisionError
    launch.launch(kernel, 2)(1)
    assert kernel.asked == [("launch", (2,), (1,), {})]


def test_a_compiled_launch_is_none_of_one_that_was_compiled_ahead() -> None:
    kernel = Kernel()
    launches = launch.CompiledLaunch(kernel, num_warps=2)
    with launch.compiling_ahead():
        launches(5, (1, 2))
    assert kernel.asked == [("compile", (5,), (1, 2), {"num_warps": 2})]
    assert not launches._compiled


class Steps:
    """A runtime that notes what a step would launch."""

    def __init__(self) -> None:
        self.config = TwilightConfig(skip_layers=(0,))
        self.pool = SimpleNamespace(has_layer=lambda layer: layer in (1, 2))
        self.asked: list[Any] = []

    def serves(self, layer: int) -> bool:
        return layer < 3

    def begin_decode(
        self, table: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, *, dense: bool
    ) -> None:
        assert launch._ahead
        self.asked.append((len(slots), "dense" if dense else "selects"))

    def seal_claimed(self) -> None:
        self.asked.append("seal")

    def run_layer(self, layer_id: int, q: torch.Tensor, *, token: Any, **_: Any) -> torch.Tensor:
        shapes = None if token is None else [tuple(each.shape) for each in token]
        self.asked.append((layer_id, tuple(q.shape), shapes))
        return q


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("min_step_mb", [96, 0])
def test_steps_of_every_size_are_compiled(
    cache: torch.dtype, min_step_mb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "twilight_sgl.attention.backend.TwilightAttnBackend.__init__", lambda *_: None
    )
    layers = [RadixAttention(4, 8, 0.5, 2, layer) for layer in range(4)]  # 3 is SGLang's
    runtime = Steps()
    runtime.config = TwilightConfig(min_step_mb=min_step_mb, min_context_tokens=0)
    allocator = SimpleNamespace(free_pages=torch.arange(3), page_size=16)
    runner = SimpleNamespace(
        model=torch.nn.ModuleList(layers),
        dtype=torch.bfloat16,
        token_to_kv_pool_allocator=allocator,
    )
    backend = TritonAttnBackend(runner, runtime)
    backend.runtime, backend.data_parallel = runtime, False
    backend.token_to_kv_pool = SimpleNamespace(dtype=cache)
    table = torch.zeros(9, 64, dtype=torch.int32)
    backend.req_to_token_pool = SimpleNamespace(req_to_token=table, size=8)
    of_prompts: list[Any] = []
    monkeypatch.setattr(
        "twilight_sgl.attention.backend.compile_extend", lambda *given: of_prompts.append(given)
    )
    backend.compile_ahead([1, 3])
    assert of_prompts == [(allocator.free_pages, 16, 8)]
    expected: list[Any] = []
    for batch in (1, 3):
        token = [(batch, 2, 8)] * 2 if cache == torch.bfloat16 else None
        run = [(layer, (batch, 4, 8), token) for layer in (0, 2)]
        expected += [(batch, "selects"), "seal", *run]
        expected += [(batch, "dense"), *run] if min_step_mb else []
    assert runtime.asked == expected


def graph_runner(backend: Any, mode: ForwardMode = ForwardMode.DECODE) -> SimpleNamespace:
    return SimpleNamespace(
        capture_forward_mode=mode,
        attn_backend=SimpleNamespace(decode_backend=backend),
        capture_bs=[1, 2, 8],
    )


def test_the_sizes_of_a_runner_are_compiled() -> None:
    asked: list[list[int]] = []
    ours = SimpleNamespace(wants_dense_graphs=False, compile_ahead=asked.append)
    _compile(graph_runner(ours, ForwardMode.TARGET_VERIFY))
    _compile(graph_runner(SimpleNamespace()))
    assert asked == []
    _compile(graph_runner(ours))
    assert asked == [[1, 2, 8]]


def test_a_failure_leaves_it_to_the_graphs(caplog: pytest.LogCaptureFixture) -> None:
    def fail(sizes: list[int]) -> None:
        raise RuntimeError("no compiler")

    ours = SimpleNamespace(wants_dense_graphs=False, compile_ahead=fail)
    with caplog.at_level(logging.WARNING, "twilight_sgl.patches.compile_ahead"):
        _compile(graph_runner(ours))
    assert "compiling ahead failed" in caplog.text
    assert "no compiler" in caplog.text
