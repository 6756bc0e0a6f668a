"""Which steps run dense on a GPU, and the graphs that are captured for them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner.shape_key import ShapeKey

from twilight_sgl.attention.backend import TritonAttnBackend
from twilight_sgl.attention.triton_runtime import TritonRuntime
from twilight_sgl.config import TwilightConfig
from twilight_sgl.patches.graph_variants import _capture_both, _name_dense

LAYER_TOKEN_BYTES = 1000


def runtime(**settings: Any) -> TritonRuntime:
    made = object.__new__(TritonRuntime)
    made.config = TwilightConfig(**settings)
    made._layer_token_bytes = LAYER_TOKEN_BYTES
    return made


def backend(**settings: Any) -> TritonAttnBackend:
    made = object.__new__(TritonAttnBackend)
    made.runtime = runtime(**settings)
    made.data_parallel = False
    return made


class Runner:
    """Captures as SGLang's does: a graph a call, under the name of its batch size."""

    def __init__(self, attn_backend: Any, mode: ForwardMode = ForwardMode.DECODE) -> None:
        self.attn_backend = SimpleNamespace(decode_backend=attn_backend)
        self.capture_forward_mode = mode
        self.captured: dict[ShapeKey, bool] = {}

    def key(self, size: int, label: str | None) -> ShapeKey:
        return _name_dense(ShapeKey(size, None, label), self, size, None, label)

    def capture_one_shape(self, size: int, label: str | None = None) -> None:
        def original(runner: Runner, size: int) -> None:
            decode = self.attn_backend.decode_backend
            decode.dense_step = getattr(decode, "captures_dense", False)
            self.captured[self.key(size, label)] = getattr(decode, "dense_step", False)

        _capture_both(original, self, size)


@pytest.mark.parametrize(
    ("lengths", "settings", "dense"),
    [
        ([100, 2047], {"min_step_mb": 0}, True),  # no request is long enough to select
        ([100, 2048], {"min_step_mb": 0}, False),
        ([40_000], {}, True),  # 40 MB
        ([40_000, 55_000], {}, True),
        ([40_000, 56_000], {}, False),  # 96 MB
        ([40_000, *[2047] * 50], {}, True),  # short requests do not count
        ([40_000], {"min_step_mb": 40}, False),
        ([1], {"min_step_mb": 0, "min_context_tokens": 0}, False),
    ],
)
def test_steps_too_small_are_dense(lengths: list[int], settings: dict, dense: bool) -> None:
    made = runtime(**settings)
    assert made.is_faster_dense(torch.tensor(lengths)) is dense
    assert made.is_faster_dense(torch.tensor(lengths), sum(lengths)) is dense


@pytest.mark.parametrize(("tokens", "dense"), [(10_000, True), (120_000, False)])
def test_most_steps_are_told_by_their_sum(tokens: int, dense: bool) -> None:
    unread = torch.tensor([0, 0])
    assert runtime().is_faster_dense(unread, tokens) is dense


def test_data_parallel_ranks_replay_the_same_graph() -> None:
    made = backend()
    made.data_parallel = True
    assert not made.wants_dense_graphs


def test_steps_of_unknown_lengths_select() -> None:
    assert not runtime().is_faster_dense(None)


@pytest.mark.parametrize("label", [None, "lora"])
def test_every_batch_size_has_a_dense_graph_beside_the_other(label: str | None) -> None:
    runner = Runner(backend())
    for size in (4, 2):
        runner.capture_one_shape(size, label)
    dense = "dense" if label is None else "lora-dense"
    assert runner.captured == {
        ShapeKey(size, None, name): name == dense for size in (4, 2) for name in (label, dense)
    }
    ours = runner.attn_backend.decode_backend
    assert ours.has_dense_graphs
    assert not ours.dense_step


def test_a_failed_capture_leaves_no_dense_step_behind() -> None:
    runner = Runner(backend())

    def failing(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        _capture_both(failing, runner, 1)
    ours = runner.attn_backend.decode_backend
    assert not ours.captures_dense
    assert not ours.has_dense_graphs


@pytest.mark.parametrize(
    "runner",
    [
        Runner(SimpleNamespace()),
        Runner(backend(), ForwardMode.TARGET_VERIFY),
        Runner(backend(min_step_mb=0, min_context_tokens=0)),
    ],
    ids=["another-backend", "verification", "nothing-is-dense"],
)
def test_other_runners_capture_as_ever(runner: Runner) -> None:
    runner.capture_one_shape(2)
    assert runner.captured == {ShapeKey(2, None, None): False}


@pytest.mark.parametrize("has_stock_layers", [True, False])
def test_both_graphs_of_a_batch_size_read_one_plan_of_the_stock_backend(
    has_stock_layers: bool,
) -> None:
    planned: list[tuple[int, bool]] = []
    begun: list[bool] = []
    ours: list[bool] = []
    made = object.__new__(TritonAttnBackend)
    made.has_stock_layers = has_stock_layers
    made.dense = SimpleNamespace(
        init_forward_metadata_out_graph=lambda batch, in_capture: planned.append(
            (batch.batch_size, in_capture)
        )
    )
    made.runtime = SimpleNamespace(
        begin_step=lambda dense: begun.append(dense),
        begin_decode=lambda *rows, dense: ours.append(dense),
        is_faster_dense=lambda lengths, total: True,
    )
    made.req_to_token_pool = SimpleNamespace(req_to_token=None)

    def batch(size: int, **view: Any) -> SimpleNamespace:
        rows = dict.fromkeys(("seq_lens_cpu", "seq_lens_sum", "seq_lens", "req_pool_indices"))
        return SimpleNamespace(batch_size=size, forward_mode=ForwardMode.DECODE, **rows, **view)

    for size in (4, 2):
        for made.captures_dense in (True, False):
            made.init_forward_metadata_out_graph(batch(size), in_capture=True)
            assert made.dense_step == made.captures_dense
    assert planned == ([(4, True), (2, True)] if has_stock_layers else [])
    assert ours == [True, False] * 2
    made.has_dense_graphs = True
    for _ in range(2):
        made.init_forward_metadata_out_graph(batch(2))
    assert planned[2:] == ([(2, False), (2, False)] if has_stock_layers else [])
    assert made.dense_step
    assert begun == [True, True]
    made.init_forward_metadata_out_graph(batch(2, actual_forward_mode=ForwardMode.DECODE))
    assert begun == [True] * 3
    # A data-parallel rank without a request replays too: that is no step.
    made.init_forward_metadata_out_graph(batch(2, actual_forward_mode=ForwardMode.IDLE))
    assert len(planned) == (6 if has_stock_layers else 0)
    assert len(ours) == 8
    assert begun == [True] * 3
