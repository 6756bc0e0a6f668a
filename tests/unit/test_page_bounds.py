"""Page bounds: that float8 ones hold the keys, as tightly as they can, and where they cannot."""

import pytest
import torch

from twilight_sgl.kernels.page_score.reference import page_scores
from twilight_sgl.kernels.seal.reference import page_bounds, quantize_int4, round_outward, summarize

FLOAT8 = torch.float8_e4m3fn
PS = 16


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a 16-bit type, in float32."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    numbers = bits.view(dtype).float()
    return numbers[numbers.isfinite()]


def float8_numbers() -> torch.Tensor:
    """All numbers of float8_e4m3fn in ascending order, in float32."""
    numbers = torch.arange(256).to(torch.uint8).view(FLOAT8).float()
    return numbers[numbers.isfinite()].unique()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_outward_is_the_nearest_float8_on_that_side(dtype: torch.dtype) -> None:
    values = every_number(dtype)
    values = values[values.abs() <= 448]
    known = float8_numbers()
    above = known[torch.searchsorted(known, values)]
    below = known[torch.searchsorted(known, values, right=True) - 1]
    assert torch.equal(round_outward(values, up=True).float(), above)
    assert torch.equal(round_outward(values, up=False).float(), below)


@pytest.mark.parametrize("value", [448.0, 449.0, 6e4, 3e38, float("inf")])
def test_outward_beyond_the_largest_float8_is_the_largest(value: float) -> None:
    values = torch.tensor([value, -value])
    for up in (False, True):
        assert round_outward(values, up=up).float().tolist() == [448.0, -448.0]


def test_float8_bounds_hold_the_keys_of_a_page() -> None:
    rng = torch.Generator().manual_seed(0)
    scale = torch.logspace(-4, 2, 8)  # by channel
    keys = (torch.randn(20, PS, 2, 8, generator=rng) * scale).clamp(-448, 448).bfloat16()
    least, greatest = page_bounds(keys, FLOAT8).float().unbind(2)
    low, high = keys.float().amin(1), keys.float().amax(1)
    assert (least <= low).all() and (greatest >= high).all()
    assert (greatest - high <= high.abs() / 8 + 2**-9).all()
    assert (low - least <= low.abs() / 8 + 2**-9).all()
    exact = torch.stack((low, high), 2).bfloat16()
    assert torch.equal(page_bounds(keys), exact)


def test_a_channel_beyond_float8_leaves_the_order_of_pages_to_the_others() -> None:
    """As with models whose key biases are in the hundreds: every page is cut in that channel."""
    rng = torch.Generator().manual_seed(0)
    keys = torch.randn(64, PS, 1, 32, generator=rng)
    keys[..., 5] += 700.0
    keys[..., 6] -= 700.0
    q = torch.randn(4, 1, 32, generator=rng)
    keys[40, 3, 0] += 2 * q[0, 0] * (torch.arange(32) > 6)  # what the first query looks for
    page_ids = torch.arange(64).expand(4, -1)
    scores = page_scores(q, page_bounds(keys, FLOAT8), page_ids)
    assert scores.isfinite().all()
    assert scores[0, 0].argmax() == 40
    others = keys.clone()
    others[..., 5:7] = 0.0
    expected = page_scores(q, page_bounds(others, FLOAT8), page_ids)
    cut = page_scores(q, page_bounds(keys.clamp(-448, 448), FLOAT8), page_ids)
    assert torch.equal(scores, cut)
    assert torch.allclose(scores - scores[..., :1], expected - expected[..., :1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("bounds", [None, FLOAT8], ids=["keys", "float8"])
def test_nan_counts_as_0(bounds: torch.dtype | None) -> None:
    keys = torch.randn(3, PS, 2, 8, generator=torch.Generator().manual_seed(0)) + 5.0
    keys[0, 3], keys[1, :, 1, 2], keys[2] = float("nan"), float("nan"), float("nan")
    for got, expected in zip(
        summarize(keys, bounds), summarize(keys.nan_to_num(nan=0.0), bounds), strict=True
    ):
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
        assert not got.float().isnan().any()


def test_infinite_keys_keep_infinite_bounds_and_finite_codes() -> None:
    keys = torch.zeros(2, PS, 1, 4)
    keys[0, 0, 0] = torch.tensor([float("inf"), -float("inf"), 1.0, 2.0])
    keys[1, 0] = float("inf")  # a range of no width
    min_max = page_bounds(keys)
    assert min_max[0, 0].tolist() == [
        [0.0, -float("inf"), 0.0, 0.0],
        [float("inf"), 0.0, 1.0, 2.0],
    ]
    codes, scale_zero = quantize_int4(keys)
    assert scale_zero.isfinite().all()
    assert scale_zero[1, 0, 0].tolist() == [0.0, 65504.0]
    assert codes[0, 0, 0].tolist() == [(1 << 4) | 15, 1 << 4]


def test_zeros_have_no_sign() -> None:
    keys = torch.zeros(1, PS, 1, 4)
    keys[0, ::2] = -0.0
    for bounds in (None, FLOAT8):
        assert not page_bounds(keys, bounds).view(torch.uint8).any()
    assert not quantize_int4(-keys)[1].view(torch.uint8).any()
