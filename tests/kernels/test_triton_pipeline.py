"""Every pruning operator against its reference: the interpreter on the CPU, or a GPU."""

import dataclasses

import pytest
import torch
from cases import (
    DEVICE,
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
from twilight_sgl.attention.triton_pipeline import TritonDecode
from twilight_sgl.kernels.estimate import triton as estimate_kernel
from twilight_sgl.kernels.estimate.reference import estimate_logits
from twilight_sgl.kernels.row import Token
from twilight_sgl.kernels.select import triton as select_kernel
from twilight_sgl.kernels.top_p.reference import top_p_mask

AWKWARD = (1, 15, 16, 17, 0, 33, 140)
SHORT = (65, 17)


def decoder(case: Case, drawn: Drawn, **options: object) -> TritonDecode:
    if DEVICE == "cpu" or case.dtype == torch.float32:
        options.setdefault("logits_dtype", torch.float32)
        options.setdefault("top_p_steps", 24)
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
        device=DEVICE,
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


CASES = [
    Case("awkward-lengths", AWKWARD),
    Case("g1-d128", SHORT, 2, 2, 128),
    Case("g7-d80", SHORT, 7, 1, 80),
    Case("g4-d128-v64", SHORT, 8, 2, 128, dim_v=64),
    Case("g16-d96", (40,), 16, 1, 96),
    Case("d256", (40,), 2, 1, 256),
    Case("ps32", (31, 32, 33, 100), page_size=32),
    Case("ps64", (63, 64, 65, 200), page_size=64),
    Case("odd-batch-dense-row", (140, 90, 16), dense=(1,)),
    Case("all-dense", (70, 5), dense=(0, 1)),
    Case("padded-rows-only", (0, 0)),
    Case("p-1", (140,), p=1.0),
    Case("p-above-1", (140,), p=1.5),
    Case("p-each", (140, 90, 120), p=(0.3, 1.0, 0.99)),
    Case("budget-tokens", (140,), budget=40),
    Case("budget-of-least-tokens", (300, 90, 33), budget=0.1, min_candidate_tokens=100),
    Case("half-bound", (300, 90, 17), 6, 2, 80, selector="half_bound"),
    Case("half-bound-fp8", (140, 17), selector="half_bound", bounds_dtype=torch.float8_e4m3fn),
    Case("strata", (4600, 33, 2100), 2, 1, budget=0.2, sink_tokens=20, recent_tokens=40),
    Case("strata-few-candidates", (4600,), 2, 1, budget=400),
    Case("strata-ps64", (8400,), 2, 1, page_size=64, budget=0.4, dtype=torch.bfloat16),
    Case("budget-one-page", (140,), budget=0.001, sink_tokens=0, recent_tokens=0),
    Case("budget-all", (140, 33), budget=1.0),
    Case("forced-exceed-budget", (200,), budget=16, sink_tokens=40, recent_tokens=70),
    Case("recent-within-page", (130,), sink_tokens=1, recent_tokens=1),
    Case("all-equal-weights", (140,), q_scale=0.0),
    Case("one-dominant-token", (140,), q_scale=12.0),
    Case("soft-cap", SHORT, logit_cap=2.0, q_scale=3.0),
    Case("sinks", (140, 90, 16, 0), 6, 2, dense=(1,), sink_logits=2.0),
    Case("sinks-outweigh-tokens", (90, 33), dense=(1,), sink_logits=40.0, dtype=torch.bfloat16),
    Case("exact-estimator", AWKWARD, estimator="exact"),
    Case("no-pruner", AWKWARD, prune=False),
    Case("bf16", (90, 17), dtype=torch.bfloat16),
    Case("fp16", (90, 17), dtype=torch.float16),
    Case("fp8-bounds", (140, 17), bounds_dtype=torch.float8_e4m3fn),
    Case("fp8-cache", (90, 17), dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn),
]
CENTRED = [
    Case("centred", AWKWARD, key_offset=9.0),
    Case("centred-g1-d128-fp8-bounds", SHORT, 2, 2, 128, bounds_dtype=torch.float8_e4m3fn),
    Case("centred-g3-dense-row", (140, 90, 16, 0), 6, 2, dense=(1,), key_offset=9.0),
    Case("centred-g3-half-bound", (140, 33), 6, 2, selector="half_bound", key_offset=9.0),
    Case("centred-g7-d80-soft-cap", SHORT, 7, 1, 80, logit_cap=2.0, q_scale=3.0, key_offset=0.5),
    Case(
        "centred-g16-d96-fp8-bounds",
        (70,),
        16,
        1,
        96,
        bounds_dtype=torch.float8_e4m3fn,
        key_offset=9.0,
    ),
    Case("centred-bf16-ps64", (200, 65), page_size=64, dtype=torch.bfloat16, key_offset=9.0),
    Case("centred-no-pruner", (90, 17), prune=False),
]
CENTRED = [dataclasses.replace(case, estimator="int4_centred") for case in CENTRED]


@pytest.mark.parametrize("case", CASES + CENTRED, ids=lambda case: case.name)
def test_pipeline_equals_reference(case: Case) -> None:
    check_pipeline(case, one_launch=False)


# The stages are shared; tests/gpu runs every case in one launch too.
@pytest.mark.parametrize("case", CASES[::2] + CENTRED, ids=lambda case: case.name)
def test_one_launch_equals_reference(case: Case) -> None:
    check_pipeline(case, one_launch=True)


def check_pipeline(case: Case, *, one_launch: bool) -> None:
    drawn = draw(case)
    decode = decoder(case, drawn, one_launch=one_launch)
    for buffer in (decode.middles, decode.logits, decode.out):
        if buffer is not None:
            buffer.fill_(float("nan"))
    without, token = take_token(drawn)
    got = run(case, without, decode, token)
    assert same_bits(without.cache.keys, drawn.cache.keys)
    assert same_bits(without.cache.values, drawn.cache.values)
    check_selection(case, drawn, decode)
    expected = expected_output(case, drawn, chosen_positions(decode, drawn))
    assert torch.equal(got.candidate_tokens, expected.candidate_tokens)
    assert ((got.kept_tokens - expected.kept_tokens).abs() <= 1).all()
    pruned = drawn.plan.sparse & (drawn.plan.seq_lens > 0)
    at_one = (pruned & (drawn.plan.p >= 1)) if case.prune else pruned
    assert (got.kept_mass[at_one] == 1).all()
    assert (got.kept_mass[pruned] >= drawn.plan.p[pruned].clamp(max=1).unsqueeze(1) - 1e-6).all()
    tolerance = 1e-3 if case.dtype == torch.float32 else 1e-2
    scale = expected.output.norm().clamp(min=1e-6)
    assert (got.output.float() - expected.output).norm() / scale < tolerance
    out, kept = got.output.clone(), got.kept_tokens.clone()
    again = run(case, drawn, decode)
    assert torch.equal(again.output, out)
    assert torch.equal(again.kept_tokens, kept)


def test_ties_go_to_the_earlier_page() -> None:
    case = Case("ties", (16 * 12 + 5,), budget=0.5, sink_tokens=0, recent_tokens=0)
    drawn = draw(case)
    # Two kinds of page only, in turn.
    drawn.cache.min_max.fill_(0.5)
    drawn.cache.min_max[drawn.plan.page_ids[0, ::2].long()] = 1.0
    q = drawn.q.abs()
    decode = decoder(case, drawn)
    decode.run(q, drawn.cache, drawn.plan, sm_scale=0.1)
    check_selection(case, dataclasses.replace(drawn, q=q), decode)
    decode.run(torch.zeros_like(q), drawn.cache, drawn.plan, sm_scale=0.1)
    positions = chosen_positions(decode, drawn)
    assert positions[0, 0, :7].tolist() == [0, 1, 2, 3, 4, 5, 12]


@pytest.mark.parametrize("one_launch", [False, True], ids=["launches", "one-launch"])
@pytest.mark.parametrize("estimator", ["int4", "int4_centred"])
def test_scores_that_are_not_finite_pick_valid_pages(estimator: str, one_launch: bool) -> None:
    case = Case("nan", (16 * 12 + 5,), budget=0.5, estimator=estimator)
    drawn = draw(case)
    drawn.cache.min_max[drawn.plan.page_ids[0, 3].long()] = float("nan")
    drawn.cache.min_max[drawn.plan.page_ids[0, 5].long()] = float("inf")
    decode = decoder(case, drawn, one_launch=one_launch)
    run(case, drawn, decode)
    positions = chosen_positions(decode, drawn)
    assert positions.shape[1] == case.heads_kv
    for row in positions[0, :, : decode.counts[0, 0]].tolist():
        assert row == sorted(set(row)) and min(row) >= 0 and max(row) < 13


@pytest.mark.parametrize("p", [0.3, 0.9, 0.99, 0.99999])
@pytest.mark.parametrize("steps", [6, 12])
def test_kept_mass_reaches_p_and_is_minimal_to_the_tolerance(p: float, steps: int) -> None:
    case = Case("mass", (400,), 4, 1, 64, p=p, budget=1.0, q_scale=2.0)
    drawn = draw(case)
    decode = decoder(case, drawn, top_p_steps=steps)
    got = run(case, drawn, decode)
    logits = decode.logits[0, :, :400].double()
    weights = torch.softmax(logits, -1)
    kept = logits >= decode.thresholds[0].double().unsqueeze(-1)
    mass = (weights * kept).sum(-1)
    assert (mass >= p - 1e-6).all()
    assert (got.kept_mass[0] - mass).abs().max() < 1e-5
    width = torch.log(torch.tensor(400 / (1 - p))).item() / 2**steps
    surely_needed = logits >= decode.thresholds[0].unsqueeze(-1) + width + 0.02 / 2**steps + 2e-4
    assert ((weights * surely_needed).sum(-1) < p + 1e-6).all()


@pytest.mark.parametrize("one_launch", [False, True], ids=["launches", "one-launch"])
@pytest.mark.parametrize("estimator", ["int4", "int4_centred"])
def test_int4_estimate_equals_reference(estimator: str, one_launch: bool) -> None:
    offset = 9.0 if estimator == "int4_centred" else 0.0
    case = Case(
        "estimate", (77, 130, 16), 7, 1, 80, budget=0.6, estimator=estimator, key_offset=offset
    )
    drawn = draw(case)
    decode = decoder(case, drawn, one_launch=one_launch)
    run(case, drawn, decode)
    cache, plan = drawn.cache, drawn.plan
    positions = chosen_positions(decode, drawn)
    expected = estimate_logits(
        drawn.q,
        cache.keys,
        cache.codes,
        cache.scale_zero,
        plan.page_ids,
        positions,
        plan.seq_lens,
        sm_scale=case.dim**-0.5,
        min_max=cache.min_max if estimator == "int4_centred" else None,
    )
    for row, tokens in enumerate(decode.candidate_tokens[:, 0].tolist()):
        got = decode.logits[row, :, :tokens]
        # Two int8 digits hold 16 bits of q.
        assert (got - expected[row, :, :tokens]).abs().max() < 1e-3
    mask = top_p_mask(expected, plan.p)
    assert mask.any()


@pytest.mark.parametrize(
    "case",
    [
        Case("ragged", (300, 33, 0, 140), 4, 2, 64, budget=0.7),
        Case("centred", (300, 90), 4, 2, 64, estimator="int4_centred", key_offset=9.0),
        Case("exact", (300, 90), 4, 2, 64, budget=0.7, estimator="exact"),
        Case("all-dense", (70, 5), dense=(0, 1)),
    ],
    ids=lambda case: case.name,
)
def test_many_programs_share_out_the_candidates(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = len(case.lengths) * case.heads_kv
    for programs in (4 * pairs, 5 * pairs + 1, 40 * pairs):
        monkeypatch.setattr(estimate_kernel, "grid_programs", lambda *_, n=programs: n)
        monkeypatch.setattr(select_kernel, "grid_programs", lambda *_, n=programs: n)
        check_pipeline(case, one_launch=False)


@pytest.mark.parametrize(
    "tiling", [select_kernel.Tiling(1, 32, 1, 8, 4, 1), select_kernel.Tiling(4, 16, 1, 16, 4, 1)]
)
def test_strata_are_chosen_alike_however_many_a_program_takes(
    tiling: select_kernel.Tiling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_kernel, "_tiling", lambda *_: tiling)
    check_pipeline(Case("tiling", (2100, 33), 2, 1, budget=0.3), one_launch=False)


def test_unsupported_shapes_say_why() -> None:
    case = Case("bad", (40,), dim=72)
    drawn = draw(case)
    with pytest.raises(ValueError, match=r"head dims are one of .* got 72"):
        decoder(case, drawn)


def test_a_plan_too_large_is_refused() -> None:
    case = Case("large", (40,))
    decode = decoder(case, draw(case))
    other = draw(Case("larger", (40, 40)))
    with pytest.raises(ValueError, match="2 rows x 3 pages does not fit max_batch 1 x 3 pages"):
        decode.run(other.q, other.cache, other.plan, sm_scale=1.0)
