"""Attention over whole rows on a GPU, at full size and captured in graphs."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from cases import Case, draw
from rows import check_rows

from twilight_sgl.kernels.attend.rows import _attend_rows_kernel, _tiling, attend_rows
from twilight_sgl.kernels.attend.triton import AttendWorkspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
RAGGED = (1, 15, 16, 17, 31, 2048, 0, 5000, 777, 40, 4096)
MANY = tuple(random.Random(0).choices((0, 1, 33, 400, 1111, 6000), k=70))

CASES = [
    Case("qwen-d64", RAGGED, 14, 2, 64, dtype=BF16),
    Case("qwen-d64-many", MANY, 14, 2, 64, dtype=BF16),
    Case("llama3", RAGGED, 32, 8, 128, dtype=BF16),
    Case("llama3-many", MANY, 32, 8, 128, dtype=BF16),
    Case("llama2-g1", RAGGED, 8, 8, 128, dtype=BF16),
    Case("g16", RAGGED, 32, 2, 128, dtype=BF16),
    Case("phi-d80", RAGGED, 4, 4, 80, dtype=FP16),
    Case("d96-ps32", RAGGED, 12, 4, 96, page_size=32, dtype=BF16),
    Case("d256-ps64-g16", RAGGED, 16, 1, 256, page_size=64, dtype=BF16, logit_cap=30.0),
    Case("d128-v64", RAGGED, 8, 2, 128, dim_v=64, dtype=BF16),
    Case("fp8", RAGGED, 8, 2, 128, dtype=BF16, cache_dtype=FP8),
    Case("fp8-d64-many", MANY, 14, 2, 64, dtype=BF16, cache_dtype=FP8),
    Case("fp8-d256", RAGGED, 8, 2, 256, dtype=FP16, cache_dtype=FP8),
    Case("sinks", RAGGED, 64, 8, 64, dtype=BF16, sink_logits=2.0),
    Case("one-row", (28672,), 14, 2, 64, dtype=BF16),
    Case("128k", (131072, 100, 70000), 8, 2, 128, dtype=BF16),
    Case("float32", RAGGED, 8, 2, 128),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_equal_reference_and_themselves(case: Case) -> None:
    check_rows(case)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("cache_dtype", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.parametrize("batch", [1, 40, 140])
def test_programs_that_wait_for_each_other_fit_on_the_gpu(
    dim: int, cache_dtype: torch.dtype, batch: int
) -> None:
    case = Case("fit", (40,) * batch, 16, 2, dim, dtype=BF16, cache_dtype=cache_dtype)
    *_, warps, at_once = _tiling(dim, cache_dtype.itemsize, 2 * batch, torch.device("cuda", 0))
    _attend_rows_kernel.device_caches.clear()
    check_rows(case)
    compiled = [
        kernel
        for cache, *_ in _attend_rows_kernel.device_caches.values()
        for kernel in cache.values()
    ]
    properties = torch.cuda.get_device_properties("cuda")
    assert compiled
    for kernel in compiled:
        assert kernel.metadata.num_warps == warps
        shared = kernel.metadata.shared + 1024  # what the system takes of each block's
        registers = -(-kernel.n_regs // 8) * 8 * 32 * warps
        assert at_once * shared <= properties.shared_memory_per_multiprocessor
        assert at_once * registers <= properties.regs_per_multiprocessor


def test_graph_replay_equals_eager_for_other_lengths() -> None:
    case = Case("graph", (3000, 17, 0, 900, 28000), 14, 2, 64, dtype=BF16)
    drawn = draw(case)
    cache, plan = drawn.cache, drawn.plan
    workspace = AttendWorkspace(5, 14, 2, 64, torch.device("cuda"))

    def run() -> torch.Tensor:
        out = torch.full_like(drawn.q, float("nan"))
        attend_rows(
            drawn.q,
            cache.keys,
            cache.values,
            plan.page_ids,
            plan.seq_lens,
            workspace,
            out,
            sm_scale=0.125,
        )
        return out

    run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        replayed = run()
    for lengths in ((1, 17, 0, 0, 5), (3000, 1, 0, 900, 27999), (0,) * 5):
        plan.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        assert torch.equal(replayed, run())
        assert not replayed.isnan().any()
