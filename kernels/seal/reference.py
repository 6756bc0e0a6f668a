"""Page summaries in plain PyTorch: Quest min/max and INT4 keys."""

import torch

INT4_LEVELS = 15
FLOAT16_MAX = 65504.0
FLOAT8_MAX = 448.0  # of float8_e4m3fn


def _numbers(keys: torch.Tensor) -> torch.Tensor:
    """Keys in float32; a NaN counts as 0, so that summaries have defined bits whatever K holds."""
    keys = keys.float()
    return torch.where(keys.isnan(), 0.0, keys)


def _extremes(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest along `dim`; a zero has no sign, or its bits would follow the order."""
    return values.amin(dim) + 0.0, values.amax(dim) + 0.0


def quantize_int4(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize keys to asymmetric INT4 per head and token (Twilight, arXiv 2502.02770, 4.2).

    The scale and zero point are rounded to float16 first and the codes are fitted to the rounded
    values, so that dequantisation has no error but that of the codes.

    Args:
        keys: [..., D] any float dtype, D even; NaN counts as 0.
    Returns:
        codes: [..., D // 2] uint8. Byte j holds channel j in its low nibble and channel
            j + D // 2 in its high one.
        scale_zero: [..., 2] float16, so that `key ~ code * scale + zero`.
    """
    keys = _numbers(keys)
    half = keys.shape[-1] // 2
    low, high = _extremes(keys, -1)
    span = high - low
    span = torch.where(span.isnan(), 0.0, span)  # all of them the same infinity
    zero = low.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    # By a tensor: CUDA divides by a Python number as a product with its reciprocal.
    scale = span / torch.full_like(low, INT4_LEVELS)
    scale = scale.clamp(max=FLOAT16_MAX).half()
    step = scale.float().unsqueeze(-1)
    step = torch.where(step > 0, step, 1.0)
    codes = (keys - zero.float().unsqueeze(-1)) * (torch.ones_like(step) / step)
    codes = codes.round().clamp(0, INT4_LEVELS).to(torch.uint8)
    packed = codes[..., :half] | (codes[..., half:] << 4)
    return packed, torch.stack((scale, zero), dim=-1)


def dequantize_int4(codes: torch.Tensor, scale_zero: torch.Tensor) -> torch.Tensor:
    """Undo `quantize_int4`: [..., D // 2] uint8 and [..., 2] float16 to [..., D] float32."""
    levels = torch.cat((codes & 0xF, codes >> 4), dim=-1).float()
    scale, zero = scale_zero.float().unbind(-1)
    return levels * scale.unsqueeze(-1) + zero.unsqueeze(-1)


def round_outward(values: torch.Tensor, *, up: bool) -> torch.Tensor:
    """Round float32 values to the next float8_e4m3fn at or above (or below) them.

    The type has no infinity: values beyond its largest, 448, become that.
    """
    values = values.clamp(-FLOAT8_MAX, FLOAT8_MAX)
    rounded = values.to(torch.float8_e4m3fn)
    bits = rounded.view(torch.uint8).int()
    back = rounded.float()
    grows = (bits < 128) == up  # away from zero is up for positive values
    away, from_zero = bits + 1, 1 if up else 129
    moved = torch.where(grows, away, bits - 1)
    moved = torch.where((bits & 127) == 0, from_zero, moved)
    missed = back < values if up else back > values
    return torch.where(missed, moved, bits).to(torch.uint8).view(torch.float8_e4m3fn)


def page_bounds(keys: torch.Tensor, bounds_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Per-channel minimum and maximum of full pages (Quest, arXiv 2406.10774, 3.3).

    float8_e4m3fn bounds of wider keys are rounded outward, so they still hold every key, but one
    beyond 448: its bound is 448, too low by what is cut off. Such keys are mostly those of a
    channel with a large offset, which pages share: cut, it leaves their order to the other
    channels, whereas a bound of infinity would make all pages equal.

    Args:
        keys: [M, PS, HK, D] the pages' keys, any float dtype; NaN counts as 0.
        bounds_dtype: by default that of keys.
    Returns:
        [M, HK, 2, D], minimum then maximum over the page's tokens.
    """
    dtype = bounds_dtype or keys.dtype
    least, greatest = _extremes(_numbers(keys), 1)
    if dtype != torch.float8_e4m3fn or keys.dtype == dtype:
        return torch.stack((least, greatest), dim=2).to(dtype)
    least, greatest = round_outward(least, up=False), round_outward(greatest, up=True)
    min_max = torch.stack((least.view(torch.uint8), greatest.view(torch.uint8)), dim=2)
    return min_max.view(dtype)


def page_middles(min_max: torch.Tensor) -> torch.Tensor:
    """Middle of each channel of page bounds: [..., 2, D] to [..., D] float32."""
    least, greatest = min_max.float().unbind(-2)
    return (least + greatest) * 0.5


def page_codes(
    keys: torch.Tensor, min_max: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """INT4 keys of full pages, less their page's middle where bounds are given.

    A channel whose keys are large and alike, as biases make it, then no longer sets the scale of
    all the others. What an infinite bound leaves of a key may be NaN, which counts as 0.

    Args:
        keys: [M, PS, HK, D] the pages' keys, any float dtype; NaN counts as 0.
        min_max: [M, HK, 2, D] the pages' bounds as they are stored.
    Returns:
        codes: [M, HK, PS, D // 2] uint8 and scale_zero: [M, HK, PS, 2] float16, see
            `quantize_int4`.
    """
    keys = keys.transpose(1, 2)
    if min_max is not None:
        keys = _numbers(keys) - page_middles(min_max).unsqueeze(2)
    return quantize_int4(keys)


def summarize(
    keys: torch.Tensor, bounds_dtype: torch.dtype | None = None, centred: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Build the summaries of full pages.

    Args:
        keys: [M, PS, HK, D] the pages' keys, any float dtype; NaN counts as 0.
        bounds_dtype: of min_max, see `page_bounds`.
        centred: whether INT4 keys are less their page's middle, see `page_codes`.
    Returns:
        min_max: [M, HK, 2, D], see `page_bounds`.
        codes: [M, HK, PS, D // 2] uint8, see `page_codes`.
        scale_zero: [M, HK, PS, 2] float16.
    """
    min_max = page_bounds(keys, bounds_dtype)
    return min_max, *page_codes(keys, min_max if centred else None)
