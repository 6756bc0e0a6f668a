"""Sealing against its reference, bit by bit, and the claim of unsealed pages."""

import pytest
import torch
from cases import DEVICE

from twilight_sgl.kernels.launch import is_interpreted
from twilight_sgl.kernels.seal.reference import summarize
from twilight_sgl.kernels.seal.triton import layer_pointers, seal_pages

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
SHAPES = [(16, 2, 64), (16, 3, 80), (32, 1, 128), (64, 5, 96), (16, 1, 256)]
PAGES = 12


def draw_keys(dtype: torch.dtype, size: int, heads: int, dim: int) -> list[torch.Tensor]:
    """Two layers, with a page of each kind that rounding or comparing might get wrong."""
    generator = torch.Generator().manual_seed(0)
    keys = []
    for _ in range(2):
        drawn = torch.randn(PAGES, size, heads, dim, generator=generator)
        drawn[1] *= 1e-7  # the scale underflows float16
        drawn[2] = drawn[2].round()  # ties
        drawn[3] = 0.25
        drawn[4, :, :, 0] *= 50.0  # an outlier channel
        if dtype in (torch.float32, torch.bfloat16):
            drawn[5] *= 1e6  # the scale overflows float16
        drawn[6] *= 0.0  # zeros of both signs
        drawn[7, ::3, :, ::5] = float("nan")
        drawn[8, 1] = float("nan")
        drawn[8, :, :, 2] = float("nan")
        drawn[9, 2, :, 3], drawn[9, 3, :, 4] = float("inf"), -float("inf")
        drawn[9, 5], drawn[9, 6] = float("inf"), -float("inf")
        drawn[10, :, :, :3] = torch.tensor([447.0, 460.0, -1000.0])
        if dtype == torch.float8_e4m3fn and is_interpreted():  # which reads its NaN as 480
            drawn = drawn.nan_to_num().clamp(-448, 448)
        keys.append(drawn.to(dtype).to(DEVICE))
    return keys


def seal(
    keys: list[torch.Tensor],
    listed: torch.Tensor,
    count: int,
    bounds_dtype: torch.dtype | None = None,
    has_codes: bool = True,
    centred: bool = False,
) -> list[torch.Tensor]:
    pool, size, heads, dim = keys[0].shape
    layers = len(keys)
    min_max = torch.full((layers, pool, heads, 2, dim), 9.0, device=DEVICE)
    min_max = min_max.to(bounds_dtype or keys[0].dtype)
    number = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    if not has_codes:
        seal_pages(keys, layer_pointers(keys), min_max, None, None, listed, number)
        return [min_max]
    codes = torch.full((layers, pool, heads, size, dim // 2), 7, dtype=torch.uint8, device=DEVICE)
    scale_zero = torch.full((layers, pool, heads, size, 2), 9.0, device=DEVICE).half()
    summaries = [min_max, codes, scale_zero]
    seal_pages(keys, layer_pointers(keys), *summaries, listed, number, centred=centred)
    return summaries


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


CASES = [
    pytest.param(dtype, shape, bounds, id=f"{name}-{'-'.join(map(str, shape))}-{bounds or 'keys'}")
    for name, dtype in DTYPES.items()
    for bounds, shapes in ((None, SHAPES), (torch.float8_e4m3fn, [(16, 3, 80)]))
    for shape in shapes
]


@pytest.mark.parametrize("centred", [False, True], ids=["", "centred"])
@pytest.mark.parametrize(("dtype", "shape", "bounds"), CASES)
def test_bit_equal(
    dtype: torch.dtype, shape: tuple[int, int, int], bounds: torch.dtype | None, centred: bool
) -> None:
    size, heads, dim = shape
    keys = draw_keys(dtype, size, heads, dim)
    listed = torch.tensor([6, 1, 9, 3, 8, 2, 5, 10, 7, 4, 0], dtype=torch.int32, device=DEVICE)
    summaries = seal(keys, listed, 10, bounds, centred=centred)
    pages = listed[:10].long()
    for layer, key in enumerate(keys):
        reference = summarize(key[pages], bounds, centred)
        for got, expected in zip(summaries, reference, strict=True):
            assert torch.equal(bits(got[layer][pages]), bits(expected))
            assert not expected.float().isnan().any()
    assert (summaries[1][:, [0, 11]] == 7).all()


@pytest.mark.parametrize("bounds", [None, torch.float8_e4m3fn], ids=["keys", "float8"])
def test_bounds_alone_are_those_with_codes(bounds: torch.dtype | None) -> None:
    keys = draw_keys(torch.bfloat16, 16, 3, 80)
    listed = torch.arange(PAGES, dtype=torch.int32, device=DEVICE)
    (alone,) = seal(keys, listed, PAGES, bounds, has_codes=False)
    assert torch.equal(bits(alone), bits(seal(keys, listed, PAGES, bounds)[0]))


def test_no_pages_changes_nothing() -> None:
    keys = [torch.randn(3, 16, 1, 64, device=DEVICE)]
    listed = torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)
    assert (seal(keys, listed, 0)[1] == 7).all()


def test_layers_must_be_alike() -> None:
    keys = [torch.zeros(3, 16, 1, 64), torch.zeros(3, 16, 2, 64)]
    with pytest.raises(ValueError, match="layer 1"):
        layer_pointers(keys)
