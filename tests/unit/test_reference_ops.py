"""What the reference operators promise, on drawn and on hand-made inputs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twilight_sgl.kernels.attend.reference import attend
from twilight_sgl.kernels.estimate.reference import estimate_logits
from twilight_sgl.kernels.page_score.reference import page_scores
from twilight_sgl.kernels.seal.reference import (
    dequantize_int4,
    page_middles,
    quantize_int4,
    summarize,
)
from twilight_sgl.kernels.select.reference import budget_pages, forced_pages, select_pages
from twilight_sgl.kernels.top_p.reference import (
    BISECTION_STEPS,
    forced_tokens,
    keep_union,
    top_p_mask,
)

PS = 16
HALF_ULP = 2.0**-11  # of float16, relative
SMALLEST = 2.0**-25  # half of float16's smallest number
drawn = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# INT4 keys


@drawn
@given(
    seed=seeds,
    spread=st.sampled_from([1e-9, 1e-4, 1.0, 30.0, 4000.0]),
    offset=st.sampled_from([0.0, 1e-3, -5.0, 100.0, -20000.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_dequantized_keys_are_within_half_a_step(
    seed: int, spread: float, offset: float, dtype: torch.dtype
) -> None:
    keys = (random(seed, 5, 8) * spread + offset).to(dtype)
    codes, scale_zero = quantize_int4(keys)
    assert (codes.shape, codes.dtype) == ((5, 4), torch.uint8)
    assert (scale_zero.shape, scale_zero.dtype) == ((5, 2), torch.float16)
    exact = keys.double()
    error = (dequantize_int4(codes, scale_zero).double() - exact).abs().amax(-1)
    low, high = exact.amin(-1), exact.amax(-1)
    rounding = HALF_ULP * (low.abs() + high - low) + 16 * SMALLEST
    in_float32 = 2.0**-22 * exact.abs().amax(-1)
    assert (error <= scale_zero[:, 0].double() / 2 + rounding + in_float32).all()
    # The step itself is a fifteenth of the range.
    assert (scale_zero[:, 0].double() <= (high - low) / 15 * (1 + 2 * HALF_ULP) + SMALLEST).all()


def test_sixteen_levels_are_exact() -> None:
    keys = torch.arange(16.0) * 0.25 - 2
    codes, scale_zero = quantize_int4(keys)
    assert scale_zero.tolist() == [0.25, -2.0]
    assert dequantize_int4(codes, scale_zero).tolist() == keys.tolist()
    assert [(code & 15, code >> 4) for code in codes.tolist()] == [(j, j + 8) for j in range(8)]


@pytest.mark.parametrize("value", [0.0, 1.5, -7.0, 1e-30, -1e-30])
def test_keys_that_are_all_equal(value: float) -> None:
    keys = torch.full((2, 8), value)
    restored = dequantize_int4(*quantize_int4(keys))
    assert (restored - keys).abs().max() <= SMALLEST


def test_keys_beyond_float16_stay_finite() -> None:
    keys = torch.tensor([-3e38, 0.0, 1.0, 3e38])
    codes, scale_zero = quantize_int4(keys)
    assert scale_zero.isfinite().all()
    assert dequantize_int4(codes, scale_zero).isfinite().all()


def biased_keys() -> torch.Tensor:
    """[M, PS, HK, D] keys with a few channels that are large and nearly constant."""
    keys = random(0, 5, PS, 2, 64)
    keys[..., 3] += 60.0
    keys[..., 40] -= 25.0
    return keys


@pytest.mark.parametrize("bounds", [None, torch.float8_e4m3fn], ids=["keys", "float8"])
def test_keys_less_their_pages_middle_lose_less(bounds: torch.dtype | None) -> None:
    keys = biased_keys()
    min_max, codes, scale_zero = summarize(keys, bounds, centred=True)
    restored = dequantize_int4(codes, scale_zero) + page_middles(min_max).unsqueeze(2)
    error = (restored.transpose(1, 2) - keys).abs()
    half_step = scale_zero[..., 0].float().transpose(1, 2).unsqueeze(-1) / 2
    assert (error <= half_step * 1.01 + 1e-2).all()
    plain, *plain_codes = summarize(keys, bounds)
    assert torch.equal(plain.view(torch.uint8), min_max.view(torch.uint8))
    plain_error = (dequantize_int4(*plain_codes).transpose(1, 2) - keys).abs()
    assert error.mean() < plain_error.mean() / 5


def test_centred_keys_of_infinite_bounds_have_finite_codes() -> None:
    keys = random(0, 2, PS, 1, 8)
    keys[0, 3, 0, 2], keys[0, 4, 0, 2] = torch.inf, -torch.inf  # a middle of NaN
    keys[1, 3, 0, 5], keys[1, 7] = torch.inf, torch.nan
    _, codes, scale_zero = summarize(keys, centred=True)
    assert scale_zero.isfinite().all()
    # A channel without a middle counts as 0, which leaves the others' keys as they were.
    kept = keys[:1].clone()
    kept[..., 2] = 0.0
    for got, expected in zip((codes, scale_zero), summarize(kept, centred=True)[1:], strict=True):
        assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("bounds", [None, torch.float8_e4m3fn], ids=["keys", "float8"])
def test_logits_estimated_from_centred_keys_are_nearer(bounds: torch.dtype | None) -> None:
    keys, q = biased_keys(), random(1, 1, 6, 64)
    page_ids, seq_lens = torch.tensor([[4, 2, 0, 3]]), torch.tensor([3 * PS + 5])
    positions = torch.tensor([[[0, 2, 3], [1, 3, -1]]])

    def logits(*codes: torch.Tensor | None, **centre: torch.Tensor) -> torch.Tensor:
        rows = (page_ids, positions, seq_lens)
        found = estimate_logits(q, keys, *codes, *rows, sm_scale=0.125, **centre)
        return found.masked_fill(found == -torch.inf, 0.0)

    exact = logits(None, None)
    plain = logits(*summarize(keys, bounds)[1:])
    min_max, *codes = summarize(keys, bounds, centred=True)
    min_max = min_max.float()
    min_max[3] = torch.nan  # the open page has no bounds
    centred = logits(*codes, min_max=min_max)
    assert (centred - exact).abs().mean() < (plain - exact).abs().mean() / 5
    open_tokens = slice(2 * PS, 2 * PS + 5)
    assert torch.equal(centred[:, :3, open_tokens], exact[:, :3, open_tokens])


# Min/max and page scores


@drawn
@given(seed=seeds, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_page_score_bounds_every_token_for_every_head(seed: int, dtype: torch.dtype) -> None:
    """On small whole numbers, so that no product or sum is rounded."""
    heads_kv, group, dim, pages = 2, 3, 8, 5
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randint(-8, 9, (pages, PS, heads_kv, dim), generator=rng).to(dtype)
    q = torch.randint(-8, 9, (2, heads_kv * group, dim), generator=rng).to(dtype)
    min_max = summarize(keys)[0]
    assert min_max.dtype == dtype
    page_ids = torch.tensor([[3, 0, 1, 4], [2, 2, 0, 1]])
    scores = page_scores(q, min_max, page_ids)
    grouped = q.float().view(2, heads_kv, group, dim)
    logits = torch.einsum("bhgd,btphd->bhgtp", grouped, keys[page_ids].float())
    assert (scores >= logits.amax((2, 4))).all()
    # It is tight for a page of one repeated token.
    repeated = keys[:, :1].expand(-1, PS, -1, -1)
    tight = page_scores(q, summarize(repeated)[0], page_ids)
    assert torch.equal(
        tight, torch.einsum("bhgd,bthd->bhgt", grouped, repeated[page_ids][:, :, 0].float()).amax(2)
    )


def test_slack_lies_between_the_middle_of_a_page_and_its_bound() -> None:
    keys, q = random(0, 4, PS, 2, 8), random(1, 1, 2, 8)  # a query head a KV head
    min_max, page_ids = summarize(keys)[0], torch.arange(4).unsqueeze(0)
    middle, half, bound = (page_scores(q, min_max, page_ids, slack) for slack in (0.0, 0.5, 1.0))
    expected = torch.einsum("bhd,phd->bhp", q, min_max.mean(2))
    torch.testing.assert_close(middle, expected)
    torch.testing.assert_close(half, (middle + bound) / 2)
    assert (bound > half).all() and (half > middle).all()


def test_min_max_of_a_page_by_head_and_channel() -> None:
    keys = random(0, 3, PS, 2, 4)
    min_max = summarize(keys)[0]
    assert torch.equal(min_max[:, :, 0], keys.amin(1))
    assert torch.equal(min_max[:, :, 1], keys.amax(1))


# Select


@pytest.mark.parametrize(
    ("pages", "budget", "expected"),
    [
        (0, 0.5, 0),
        (1, 0.25, 1),
        (3, 0.25, 1),
        (4, 0.25, 1),
        (5, 0.25, 2),
        (100, 1.0, 100),
        (100, 1e-9, 1),
        (100, 2.0, 1),
        (100, 160.0, 10),
        (100, 161.0, 11),
        (7, 4096.0, 7),
        (0, 4096.0, 0),
    ],
)
def test_budget_is_a_rounded_up_fraction_or_tokens(
    pages: int, budget: float, expected: int
) -> None:
    assert budget_pages(torch.tensor([pages]), budget, PS).tolist() == [expected]


@pytest.mark.parametrize(
    ("pages", "budget", "expected"),
    [
        (0, 0.25, 0),
        (3, 0.25, 3),  # all of a context that has no more
        (8, 0.25, 4),
        (16, 0.25, 4),
        (17, 0.25, 5),
        (100, 32.0, 2),  # a number of tokens is meant as it is
    ],
)
def test_a_fraction_comes_to_at_least_some_tokens(pages: int, budget: float, expected: int) -> None:
    least = 4 * PS - 1  # whole pages
    assert budget_pages(torch.tensor([pages]), budget, PS, least).tolist() == [expected]


@pytest.mark.parametrize(
    ("length", "sink", "recent", "expected"),
    [
        (0, 4, 64, []),
        (1, 0, 0, [0]),
        (PS, 0, 0, [0]),
        (PS + 1, 0, 0, [1]),
        (6 * PS, 0, 0, [5]),
        (6 * PS, 1, 0, [0, 5]),
        (6 * PS, PS, 1, [0, 5]),
        (6 * PS, PS + 1, PS, [0, 1, 5]),
        (6 * PS, 0, PS + 1, [4, 5]),
        (5 * PS + 1, 0, PS, [4, 5]),
        (5 * PS + 1, 0, 1000, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_forced_pages(length: int, sink: int, recent: int, expected: list[int]) -> None:
    forced = forced_pages(torch.tensor([length]), 6, PS, sink, recent)
    assert forced[0].nonzero().squeeze(1).tolist() == expected


def select(scores: list[float], length: int, budget: float, **options: object) -> list[int]:
    values = {"sink_tokens": 1, "recent_tokens": 1, "sparse": True} | options
    sparse = torch.tensor([values.pop("sparse")])
    positions, counts = select_pages(
        torch.tensor([[scores]]),
        torch.tensor([length]),
        sparse,
        page_size=PS,
        budget=budget,
        **values,
    )
    assert int(counts) == (positions >= 0).sum()
    return positions[0, 0].tolist()


LENGTH = 5 * PS + 3  # six pages, the last one open
SCORES = [0.0, 3.0, 9.0, 5.0, 7.0, 0.0]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        pytest.param(2 * PS, [0, 5], id="forced pages use the budget"),
        pytest.param(0.1, [0, 5], id="the budget grows to hold the forced pages"),
        pytest.param(3 * PS, [0, 2, 5], id="best page"),
        pytest.param(3 * PS + 1, [0, 2, 4, 5], id="a started page counts whole"),
        pytest.param(0.5, [0, 2, 5], id="half"),
        pytest.param(1.0, [0, 1, 2, 3, 4, 5], id="all"),
        pytest.param(4096, [0, 1, 2, 3, 4, 5], id="more than there is"),
    ],
)
def test_selected_pages(budget: float, expected: list[int]) -> None:
    assert select(SCORES, LENGTH, budget) == expected


def test_equal_scores_go_to_the_earlier_page() -> None:
    assert select([0.0, 2.0, 2.0, 2.0, 2.0, 0.0], LENGTH, 4 * PS) == [0, 1, 2, 5]


def test_scores_of_forced_and_missing_pages_are_not_read() -> None:
    scores = [float("nan"), 3.0, 9.0, 5.0, 7.0, float("nan"), float("nan"), float("inf")]
    assert select(scores, LENGTH, 3 * PS) == [0, 2, 5]


def test_dense_rows_get_every_page_whatever_their_scores() -> None:
    assert select([float("nan")] * 6, LENGTH, PS, sparse=False) == [0, 1, 2, 3, 4, 5]


def test_rows_and_heads_choose_for_themselves() -> None:
    scores = torch.tensor([[SCORES, SCORES[::-1]], [SCORES, SCORES], [SCORES, SCORES]])
    positions, counts = select_pages(
        scores,
        torch.tensor([LENGTH, 2 * PS, 0]),
        torch.tensor([True, True, True]),
        page_size=PS,
        budget=3 * PS,
        sink_tokens=0,
        recent_tokens=0,
    )
    assert positions.tolist() == [
        [[2, 4, 5], [1, 3, 5]],
        [[0, 1, -1], [0, 1, -1]],
        [[-1, -1, -1], [-1, -1, -1]],
    ]
    assert counts.tolist() == [[3, 3], [2, 2], [0, 0]]


# Top-p


def exact_mass(logits: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits.double(), -1)


@drawn
@given(
    seed=seeds,
    p=st.sampled_from([0.001, 0.3, 0.5, 0.9, 0.95, 0.999]),
    tokens=st.sampled_from([1, 2, 17, 300]),
    sharpness=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_top_p_keeps_p_and_not_a_weight_more(
    seed: int, p: float, tokens: int, sharpness: float
) -> None:
    logits = random(seed, 2, 3, tokens) * sharpness
    mask = top_p_mask(logits, torch.full((2,), p))
    weights = exact_mass(logits)
    kept = (weights * mask).sum(-1)
    assert (kept >= p - 1e-6).all()
    relative = weights / weights.amax(-1, keepdim=True)
    # Nothing dropped weighs more than something kept.
    smallest = torch.where(mask, relative, torch.inf).amin(-1, keepdim=True)
    assert (torch.where(mask, 0.0, relative) <= smallest).all()
    # Without the tokens at the threshold, as fine as the search resolves it, p is missed.
    width = 2.0**-BISECTION_STEPS + 1e-6 * smallest
    above = mask & (relative > smallest + width)
    assert ((weights * above).sum(-1) < p + 1e-6).all()


@pytest.mark.parametrize(("p", "kept"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3)])
def test_top_p_on_halving_weights(p: float, kept: int) -> None:
    logits = torch.tensor([[[0.5, 0.25, 0.125, 0.0625, 0.0625]]]).log()
    mask = top_p_mask(logits, torch.tensor([p]))
    assert mask[0, 0].tolist() == [True] * kept + [False] * (5 - kept)


def test_equal_weights_are_kept_or_dropped_together() -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0, 1.0, 1.0, 0.0]]])
    weights = exact_mass(logits)[0, 0]
    p = float(weights[1] + weights[2] / 2)
    mask = top_p_mask(logits, torch.tensor([p]))
    assert mask[0, 0].tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("p", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("value", [0.0, -1e4, 80.0])
def test_all_equal_weights_are_all_kept(p: float, value: float) -> None:
    assert top_p_mask(torch.full((1, 2, 33), value), torch.tensor([p])).all()


@pytest.mark.parametrize("p", [0.01, 0.95, 0.999])
def test_one_dominant_token_is_enough(p: float) -> None:
    logits = random(0, 1, 2, 500)
    logits[..., 123] = 60.0
    mask = top_p_mask(logits, torch.tensor([p]))
    assert mask.nonzero().tolist() == [[0, 0, 123], [0, 1, 123]]


@pytest.mark.parametrize("p", [1.0, 1.5, math.inf])
def test_p_of_one_keeps_all_tokens_there_are(p: float) -> None:
    logits = random(0, 1, 2, 50) * 100  # most weights underflow
    logits[..., ::7] = -math.inf
    assert torch.equal(top_p_mask(logits, torch.tensor([p])), logits > -math.inf)


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_rows_without_tokens_keep_nothing(p: float) -> None:
    assert not top_p_mask(torch.full((1, 2, 9), -math.inf), torch.tensor([p])).any()


@pytest.mark.parametrize(
    ("length", "sink", "recent", "expected"),
    [
        (1, 0, 0, {0}),
        (PS, 0, 0, set(range(PS))),
        (PS + 1, 0, 0, {PS}),
        (PS + 3, 2, 0, {0, 1, PS, PS + 1, PS + 2}),
        (PS + 1, 0, 4, {PS - 3, PS - 2, PS - 1, PS}),
        (PS + 8, 0, 4, set(range(PS, PS + 8))),
        (5, 100, 100, set(range(5))),
    ],
)
def test_forced_tokens(length: int, sink: int, recent: int, expected: set[int]) -> None:
    positions = torch.arange(2 * PS).view(1, 1, -1)
    positions = positions.masked_fill(positions >= length, -1)
    forced = forced_tokens(
        positions, torch.tensor([length]), page_size=PS, sink_tokens=sink, recent_tokens=recent
    )
    assert set(forced[0, 0].nonzero().squeeze(1).tolist()) == expected


def test_union_over_a_group_in_token_order() -> None:
    slots = torch.tensor([[[70, 71, 30, 31, 0]]])
    positions = torch.tensor([[[0, 1, 2, 3, -1]]])
    mask = torch.tensor([[[0, 1, 0, 0, 1], [0, 0, 0, 1, 1]]]).bool()
    forced = torch.tensor([[[1, 0, 0, 0, 0]]]).bool()
    kept, counts = keep_union(mask, slots, positions, forced, torch.tensor([True]))
    assert (kept.tolist(), counts.tolist()) == ([[[70, 71, 31]]], [[3]])
    assert (kept.dtype, counts.dtype) == (torch.int32, torch.int32)
    kept, counts = keep_union(mask, slots, positions, forced, torch.tensor([False]))
    assert (kept.tolist(), counts.tolist()) == ([[[70, 71, 30, 31]]], [[4]])


# Attend


def test_attend_over_ragged_sets_in_float64() -> None:
    q, keys, values = random(1, 2, 4, 8), random(2, 3, PS, 2, 8), random(3, 3, PS, 2, 6)
    keys[0], values[0] = float("nan"), float("nan")
    slots = torch.tensor([[[17, 40, 33, 20], [21, 0, 0, 0]], [[0] * 4, [47, 16, 0, 0]]]).int()
    counts = torch.tensor([[4, 1], [0, 2]])
    output = attend(q, keys, values, slots, counts, sm_scale=0.3)
    assert (output.shape, output.dtype) == ((2, 4, 6), torch.float32)
    for row in range(2):
        for head in range(4):
            mine = slots[row, head // 2, : counts[row, head // 2]].long()
            if not len(mine):
                assert not output[row, head].any()
                continue
            k, v = (cache.flatten(0, 1)[mine, head // 2].double() for cache in (keys, values))
            weights = torch.softmax(k @ q[row, head].double() * 0.3, 0)
            assert (output[row, head] - weights @ v).abs().max() <= 1e-6
