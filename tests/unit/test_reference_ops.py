"""What the reference operators behind the page scores promise, on drawn and on hand-made inputs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twilight_sgl.kernels.attend.reference import attend
from twilight_sgl.kernels.select.reference import (
    budget_pages,
    forced_bound,
    forced_pages,
    num_strata,
    select_pages,
)
from twilight_sgl.kernels.top_p.reference import (
    BISECTION_STEPS,
    forced_tokens,
    keep_union,
    top_p_mask,
)

PS = 16
drawn = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize(
    ("pages", "candidates", "strata"),
    [(1, 1, 1), (64, 64, 1), (65, 65, 2), (1792, 430, 28), (8192, 2048, 128), (8192, 64, 7)],
)
def test_strata_are_small_unless_candidates_are_few(
    pages: int, candidates: int, strata: int
) -> None:
    found = num_strata(
        torch.tensor([pages]),
        torch.tensor([candidates]),
        page_size=PS,
        sink_tokens=PS,
        recent_tokens=3 * PS,
    )
    assert found.tolist() == [strata]


@drawn
@given(
    seed=seeds,
    length=st.integers(1, 500 * PS),
    budget=st.sampled_from([0.01, 0.2, 0.5, 1.0, 40 * PS]),
    forced_tokens=st.sampled_from([(0, 0), (1, 3 * PS + 1), (20 * PS, 5)]),
)
def test_each_stratum_keeps_its_best_pages(
    seed: int, length: int, budget: float, forced_tokens: tuple[int, int]
) -> None:
    sink, recent = forced_tokens
    pages = -(-length // PS)
    scores = random(seed, 1, 1, pages).round(decimals=1)  # with ties
    options = {"page_size": PS, "sink_tokens": sink, "recent_tokens": recent}
    lengths = torch.tensor([length])
    positions, counts = select_pages(
        scores, lengths, torch.tensor([True]), budget=budget, **options
    )
    chosen = positions[0, 0].tolist()
    count = int(counts[0, 0])
    forced = forced_pages(lengths, pages, PS, sink, recent)[0]
    assert (
        count
        == len(chosen)
        == max(int(budget_pages(torch.tensor([pages]), budget, PS)), int(forced.sum()))
    )
    assert chosen == sorted(set(chosen))
    assert forced.sum() <= forced_bound(PS, sink, recent)
    assert set(forced.nonzero().flatten().tolist()) <= set(chosen)
    strata = int(num_strata(torch.tensor([pages]), torch.tensor([count]), **options))
    ranked = scores[0, 0].masked_fill(forced, 1e9).tolist()
    for stratum in range(strata):
        own = [page for page in range(pages) if (page - pages) % strata == stratum]
        best = sorted(own, key=lambda page: (-ranked[page], page))
        kept = [page for page in chosen if page in own]
        assert abs(len(kept) - count / strata) < 1
        assert kept == sorted(best[: len(kept)])


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
