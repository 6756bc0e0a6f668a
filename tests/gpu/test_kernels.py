"""The Triton pipeline on a GPU, at full size and captured in graphs."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from cases import (
    Case,
    Drawn,
    check_selection,
    chosen_positions,
    draw,
    expected_output,
    same_bits,
    take_token,
)

from twilight_sgl.attention.pipeline import LayerOutput
from twilight_sgl.attention.plan import DecodePlan, LayerCache
from twilight_sgl.attention.triton_pipeline import TritonDecode
from twilight_sgl.kernels.decode.program import decode_kernel
from twilight_sgl.kernels.decode.triton import _tiling
from twilight_sgl.kernels.launch import compiling_ahead
from twilight_sgl.kernels.row import Token
from twilight_sgl.kernels.seal.reference import summarize
from twilight_sgl.kernels.seal.triton import layer_pointers, seal_pages
from twilight_sgl.kernels.slots.triton import NextSlots
from twilight_sgl.pages.allocation import compile_extend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
RAGGED = (1, 15, 16, 17, 31, 2048, 0, 5000, 777, 40, 4096)


def decoder(case: Case, drawn: Drawn, **options: object) -> TritonDecode:
    return TritonDecode(
        max_batch=len(case.lengths),
        max_context=drawn.plan.page_ids.shape[1] * case.page_size,
        heads_q=case.heads_q,
        heads_kv=case.heads_kv,
        dim=case.dim,
        dim_v=case.dim_v or case.dim,
        selection=case.selection,
        q_dtype=case.dtype,
        cache_dtype=case.cache_dtype or case.dtype,
        device="cuda",
        prune=case.prune,
        **options,
    )


def run(case: Case, drawn: Drawn, decode: TritonDecode, token: Token | None = None) -> LayerOutput:
    return decode.run(
        drawn.q,
        drawn.cache,
        drawn.plan,
        token=token,
        sm_scale=case.dim**-0.5,
        logit_cap=case.logit_cap,
        sinks=drawn.sinks,
    )


def check(
    case: Case, drawn: Drawn, decode: TritonDecode, got: LayerOutput, tolerance: float
) -> None:
    check_selection(case, drawn, decode)
    expected = expected_output(case, drawn, chosen_positions(decode, drawn))
    assert torch.equal(got.candidate_tokens, expected.candidate_tokens)
    slack = 2 + expected.kept_tokens * tolerance
    assert ((got.kept_tokens - expected.kept_tokens).abs() <= slack).all()
    error = (got.output.float() - expected.output).norm() / expected.output.norm()
    assert error < tolerance


CASES = [
    Case("llama3", RAGGED, 32, 8, 128, budget=0.25, dtype=BF16),
    Case("llama2-g1", RAGGED, 8, 8, 128, budget=0.25, dtype=BF16),
    Case("qwen-g7-d64", RAGGED, 14, 2, 64, budget=0.25, dtype=BF16),
    Case("phi-d80", RAGGED, 4, 4, 80, budget=512, dtype=FP16),
    Case("d96-ps32", RAGGED, 12, 4, 96, page_size=32, dtype=BF16),
    Case("d256-ps64-g16", RAGGED, 16, 1, 256, page_size=64, dtype=BF16, logit_cap=30.0),
    Case("d128-v64", RAGGED, 8, 2, 128, dim_v=64, dtype=BF16),
    Case("fp8", RAGGED, 8, 2, 128, dtype=BF16, cache_dtype=FP8, budget=0.25),
    Case("fp8-exact-fp16-q", RAGGED, 8, 2, 64, dtype=FP16, cache_dtype=FP8, estimator="exact"),
    Case("exact", RAGGED, 32, 8, 128, estimator="exact", dtype=BF16, budget=0.25),
    Case("centred", RAGGED, 14, 2, 64, dtype=BF16, estimator="int4_centred", budget=0.25),
    Case(
        "centred-fp8-bounds",
        RAGGED,
        32,
        8,
        128,
        dtype=BF16,
        bounds_dtype=FP8,
        estimator="int4_centred",
        budget=0.25,
        key_offset=9.0,
    ),
    Case(
        "centred-g16-ps64",
        RAGGED,
        16,
        1,
        128,
        page_size=64,
        dtype=BF16,
        estimator="int4_centred",
        logit_cap=30.0,
    ),
    Case("quest-only", RAGGED, 32, 8, 128, prune=False, dtype=BF16, budget=0.25),
    Case("p1-and-dense", RAGGED, 14, 2, 64, dtype=BF16, p=(1.0,) * 11, dense=(2, 7)),
    Case(
        "p-each",
        RAGGED,
        8,
        2,
        128,
        dtype=BF16,
        dense=(5,),
        budget=0.25,
        p=(0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.85, 0.3, 1.0, 0.95),
    ),
    Case("half-bound-fp8", RAGGED, 8, 2, 128, dtype=BF16, bounds_dtype=FP8, selector="half_bound"),
    Case("peaked", RAGGED, 8, 2, 128, dtype=BF16, q_scale=6.0),
    Case("flat", RAGGED, 8, 2, 128, dtype=BF16, q_scale=0.0),
    Case("more-parts-than-pages", (1100,), 2, 1, 64, dtype=BF16, budget=0.5),
    Case("sinks", RAGGED, 64, 8, 64, dtype=BF16, dense=(7,), sink_logits=2.0),
    Case("strata-of-few-candidates", (131072, 40000), 4, 1, 64, dtype=BF16, budget=1024),
    Case("128k", (131072, 100, 70000), 8, 2, 128, dtype=BF16, budget=0.25),
    Case("256k", (262144,), 8, 1, 64, dtype=BF16, budget=0.25),
    Case("256k-all", (262144, 3), 2, 1, 64, dtype=BF16, budget=1.0),
]


RUNS = [pytest.param(case, False, id=f"{case.name}-launches") for case in CASES]
RUNS += [pytest.param(case, True, id=f"{case.name}-one-launch") for case in CASES if case.prune]


@pytest.mark.parametrize(("case", "one_launch"), RUNS)
def test_pipeline_equals_reference_and_itself(case: Case, one_launch: bool) -> None:
    drawn = draw(case)
    decode = decoder(case, drawn, top_p_steps=12, one_launch=one_launch)
    without, token = take_token(drawn)
    first = run(case, without, decode, token)
    assert same_bits(without.cache.keys, drawn.cache.keys)
    assert same_bits(without.cache.values, drawn.cache.values)
    del without
    kept, out = first.kept_tokens.clone(), first.output.clone()
    check(case, drawn, decode, first, 0.02)  # float16 logits move tokens at the threshold
    for buffer in (decode.out, decode.logits):
        if buffer is not None:
            buffer.fill_(float("nan"))
    decode.candidate_page_ids.fill_(-(1 << 30))
    decode.rank_keys.fill_(-(1 << 30))
    again = run(case, drawn, decode)
    assert torch.equal(out, again.output)
    assert torch.equal(kept, again.kept_tokens)
    precise = decoder(
        case, drawn, logits_dtype=torch.float32, top_p_steps=24, one_launch=one_launch
    )
    check(case, drawn, precise, run(case, drawn, precise), 0.006)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("estimator", ["int4", "int4_centred", "exact"])
@pytest.mark.parametrize("batch", [1, 5], ids=["few-pairs", "many-pairs"])
def test_programs_that_wait_for_each_other_fit_on_the_gpu(
    dim: int, estimator: str, batch: int
) -> None:
    case = Case("fit", (600,) * batch, 16, 2, dim, dtype=BF16, estimator=estimator)
    wide = estimator == "exact" and dim > 128
    _, at_once = _tiling(2 * batch, wide, torch.device("cuda", 0))
    drawn = draw(case)
    decode_kernel.device_caches.clear()
    run(case, drawn, decoder(case, drawn, one_launch=True))
    compiled = [
        kernel for cache, *_ in decode_kernel.device_caches.values() for kernel in cache.values()
    ]
    properties = torch.cuda.get_device_properties("cuda")
    assert compiled
    for kernel in compiled:
        threads = 32 * kernel.metadata.num_warps
        shared = kernel.metadata.shared + 1024  # what the system takes of each block's
        assert at_once * shared <= properties.shared_memory_per_multiprocessor
        assert at_once * threads * kernel.n_regs <= properties.regs_per_multiprocessor


@pytest.mark.parametrize("one_launch", [False, True], ids=["launches", "one-launch"])
@pytest.mark.parametrize("estimator", ["int4", "int4_centred"])
def test_graph_replay_equals_eager_for_other_requests(estimator: str, one_launch: bool) -> None:
    case = Case("graph", RAGGED, 32, 8, 128, budget=0.25, dtype=BF16, estimator=estimator)
    drawn = draw(case)
    decode = decoder(case, drawn, one_launch=one_launch)
    run(case, drawn, decode)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = run(case, drawn, decode)
    other = draw(dataclasses.replace(case, dense=(5, 10)), seed=1)
    drawn.q.copy_(other.q)
    for field in dataclasses.fields(LayerCache):
        getattr(drawn.cache, field.name).copy_(getattr(other.cache, field.name))
    for field in dataclasses.fields(DecodePlan):
        getattr(drawn.plan, field.name).copy_(getattr(other.plan, field.name))
    graph.replay()
    replayed, kept = captured.output.clone(), captured.kept_tokens.clone()
    eager = run(case, other, decoder(case, other, one_launch=one_launch))
    assert torch.equal(replayed, eager.output)
    assert torch.equal(kept, eager.kept_tokens)


def test_cache_beyond_two_to_the_31_elements() -> None:
    """The request lies in the last pages of a pool of 2.2 G elements."""
    case = Case("far", (3000, 517), 16, 16, 128, dtype=BF16)
    drawn = draw(case)
    pool, far_pool = drawn.cache.keys.shape[0], (2200 << 20) // (16 * 16 * 128)
    shift = far_pool - pool

    def far(tensor: torch.Tensor) -> torch.Tensor:
        big = torch.zeros(far_pool, *tensor.shape[1:], dtype=tensor.dtype, device="cuda")
        big[shift:] = tensor
        return big

    cache = LayerCache(*(far(getattr(drawn.cache, f.name)) for f in dataclasses.fields(LayerCache)))
    plan = dataclasses.replace(drawn.plan, page_ids=drawn.plan.page_ids + shift)
    assert cache.keys.numel() > 2**31
    near = run(case, drawn, decoder(case, drawn)).output.clone()
    moved = Drawn(drawn.q, cache, plan)
    assert torch.equal(run(case, moved, decoder(case, moved)).output, near)
    page_ids = torch.arange(shift, far_pool, device="cuda", dtype=torch.int32)
    count = torch.tensor([pool], dtype=torch.int32, device="cuda")
    stacked = [torch.zeros_like(t)[None] for t in (cache.min_max, cache.codes, cache.scale_zero)]
    cache.keys.nan_to_num_(0.0)
    seal_pages([cache.keys], layer_pointers([cache.keys]), *stacked, page_ids, count)
    for got, expected in zip(stacked, summarize(cache.keys[shift:]), strict=True):
        assert torch.equal(got[0, shift:], expected)


def test_slots_of_a_table_beyond_32_bits() -> None:
    rows, columns = 1 << 11, (1 << 20) + 16
    table = torch.zeros((rows, columns), dtype=torch.int32, device="cuda")
    slots = torch.tensor([rows - 1, 3, rows - 2], device="cuda")
    lengths = torch.tensor([columns - 16, columns - 17, columns - 16], device="cuda")
    table[slots, lengths - 1] = torch.tensor([5, 70, 9], dtype=torch.int32, device="cuda")
    free_pages = torch.tensor([8, 6, 4], device="cuda")
    got, *_ = NextSlots(table.device, page_size=16)(table, slots, lengths, lengths, free_pages)
    assert table.numel() > 2**31
    assert got.tolist() == [128, 71, 96]
    assert table[slots, lengths].tolist() == [128, 71, 96]
    assert table.count_nonzero() == 6


def test_no_batch_of_prompts_compiles_its_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    pages, size = 64, 16
    allocator = PagedTokenToKVPoolAllocator(
        pages * size, size, torch.bfloat16, "cuda", SimpleNamespace(), False
    )
    with compiling_ahead():
        compile_extend(allocator.free_pages, size, 9)
    assert len(allocator.free_pages) == pages
    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **call: compiled.append(call["fn"])
    )
    for requests in (1, 2, 3, 5, 8, 9):
        prefix = torch.zeros(requests, dtype=torch.int64)
        lengths = prefix + size + 1
        tensors = prefix.cuda(), prefix, lengths.cuda(), lengths
        slots = allocator.alloc_extend(*tensors, prefix.cuda() - 1, int(lengths.sum()))
        assert len(set(slots.tolist())) == lengths.sum()
        assert len(allocator.free_pages) == pages - 2 * requests
        allocator.clear()
    assert compiled == []


@pytest.mark.parametrize("centred", [False, True], ids=["", "centred"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP8], ids=["bf16", "fp16", "fp8"])
@pytest.mark.parametrize(
    "size,heads,dim", [(16, 8, 128), (16, 2, 64), (32, 3, 80), (64, 1, 256), (16, 32, 96)]
)
def test_seal_is_bit_equal(
    dtype: torch.dtype, size: int, heads: int, dim: int, centred: bool
) -> None:
    layers, pool = 3, 700
    generator = torch.Generator("cuda").manual_seed(0)
    keys = []
    for _ in range(layers):
        drawn = torch.randn(pool, size, heads, dim, device="cuda", generator=generator)
        drawn[:20] *= 1e-6  # scales that underflow float16
        drawn[20:40] = drawn[20:40].round()  # ties
        drawn[40:60] = 0.25
        if dtype == BF16:
            drawn[60:80] *= 1e5  # scales that overflow float16
        keys.append(drawn.to(dtype))
    listed = torch.randperm(pool, device="cuda", generator=generator).int()
    count = torch.tensor([pool - 100], dtype=torch.int32, device="cuda")
    min_max = torch.zeros(layers, pool, heads, 2, dim, dtype=dtype, device="cuda")
    codes = torch.full((layers, pool, heads, size, dim // 2), 7, dtype=torch.uint8, device="cuda")
    scale_zero = torch.zeros(layers, pool, heads, size, 2, dtype=torch.float16, device="cuda")
    summaries = (min_max, codes, scale_zero)
    seal_pages(keys, layer_pointers(keys), *summaries, listed, count, centred=centred)
    pages, rest = listed[: pool - 100].long(), listed[pool - 100 :].long()
    for layer in range(layers):
        expected = summarize(keys[layer][pages], centred=centred)
        assert torch.equal(min_max[layer][pages].float(), expected[0].float())
        assert torch.equal(codes[layer][pages], expected[1])
        assert torch.equal(scale_zero[layer][pages], expected[2])
    assert (codes[:, rest] == 7).all()
