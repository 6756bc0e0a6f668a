"""Sealing against its reference, bit by bit, and the claim of unsealed pages."""

import pytest
import torch
from cases import DEVICE

from twilight_sgl.kernels.seal.reference import summarize
from twilight_sgl.kernels.seal.triton import layer_pointers, seal_pages


def seal(keys: list[torch.Tensor], listed: torch.Tensor, count: int) -> list[torch.Tensor]:
    pool, size, heads, dim = keys[0].shape
    layers = len(keys)
    summaries = [
        torch.full((layers, pool, heads, 2, dim), 9.0, device=DEVICE).to(keys[0].dtype),
        torch.full((layers, pool, heads, size, dim // 2), 7, dtype=torch.uint8, device=DEVICE),
        torch.full((layers, pool, heads, size, 2), 9.0, dtype=torch.float16, device=DEVICE),
    ]
    number = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    seal_pages(keys, layer_pointers(keys), *summaries, listed, number)
    return summaries


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn],
    ids=["fp32", "fp16", "bf16", "fp8"],
)
@pytest.mark.parametrize(
    "size,heads,dim", [(16, 2, 64), (16, 3, 80), (32, 1, 128), (64, 5, 96), (16, 1, 256)]
)
def test_bit_equal(dtype: torch.dtype, size: int, heads: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = []
    for _ in range(2):
        drawn = torch.randn(8, size, heads, dim, generator=generator)
        drawn[1] *= 1e-7  # the scale underflows float16
        drawn[2] = drawn[2].round()  # ties
        drawn[3] = 0.25
        drawn[4, :, :, 0] *= 50.0  # an outlier channel
        if dtype in (torch.float32, torch.bfloat16):
            drawn[5] *= 1e6  # the scale overflows float16
        keys.append(drawn.to(dtype).to(DEVICE))
    listed = torch.tensor([6, 1, 3, 2, 5, 4, 0], dtype=torch.int32, device=DEVICE)
    summaries = seal(keys, listed, 6)
    pages = listed[:6].long()
    for layer, key in enumerate(keys):
        for got, expected in zip(summaries, summarize(key[pages]), strict=True):
            assert torch.equal(got[layer][pages].float(), expected.float())
    assert (summaries[1][:, [0, 7]] == 7).all()


def test_fp8_bounds_are_bit_equal_and_hold_the_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(9, 16, 2, 64, generator=generator) * 2
    keys[0] *= 1e-3
    keys[1] *= 40.0
    keys[2] = 0.0
    keys = keys.to(DEVICE)
    wide = seal([keys], torch.arange(9, dtype=torch.int32, device=DEVICE), 9)
    narrow = torch.zeros(1, 9, 2, 2, 64, device=DEVICE).to(torch.float8_e4m3fn)
    number = torch.tensor([9], dtype=torch.int32, device=DEVICE)
    listed = torch.arange(9, dtype=torch.int32, device=DEVICE)
    seal_pages([keys], layer_pointers([keys]), narrow, *wide[1:], listed, number)
    expected = summarize(keys, torch.float8_e4m3fn)[0]
    assert torch.equal(narrow[0].float(), expected.float())
    least, greatest = expected.float().unbind(2)
    assert (least <= keys.amin(1)).all() and (greatest >= keys.amax(1)).all()
    assert (greatest - keys.amax(1) <= keys.amax(1).abs() / 8 + 2**-9).all()


def test_no_pages_changes_nothing() -> None:
    keys = [torch.randn(3, 16, 1, 64, device=DEVICE)]
    listed = torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)
    assert (seal(keys, listed, 0)[1] == 7).all()


def test_layers_must_be_alike() -> None:
    keys = [torch.zeros(3, 16, 1, 64), torch.zeros(3, 16, 2, 64)]
    with pytest.raises(ValueError, match="layer 1"):
        layer_pointers(keys)
