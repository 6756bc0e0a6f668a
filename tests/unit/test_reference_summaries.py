"""What the reference page summaries and page scores promise, on drawn and on hand-made inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twilight_sgl.kernels.estimate.reference import estimate_logits
from twilight_sgl.kernels.page_score.reference import page_scores
from twilight_sgl.kernels.seal.reference import (
    dequantize_int4,
    page_middles,
    quantize_int4,
    summarize,
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
