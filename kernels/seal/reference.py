"""Page summaries in plain PyTorch: Quest min/max and INT4 keys."""

import torch

INT4_LEVELS = 15
FLOAT16_MAX = 65504.0


def quantize_int4(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize keys to asymmetric INT4 per head and token (Twilight, arXiv 2502.02770, 4.2).

    The scale and zero point are rounded to float16 first and the codes are fitted to the rounded
    values, so that dequantisation has no error but that of the codes.

    Args:
        keys: [..., D] any float dtype, D even.
    Returns:
        codes: [..., D // 2] uint8. Byte j holds channel j in its low nibble and channel
            j + D // 2 in its high one.
        scale_zero: [..., 2] float16, so that `key ~ code * scale + zero`.
    """
    keys = keys.float()
    half = keys.shape[-1] // 2
    low = keys.amin(-1)
    zero = low.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    # By a tensor: CUDA divides by a Python number as a product with its reciprocal.
    scale = (keys.amax(-1) - low) / torch.full_like(low, INT4_LEVELS)
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


def summarize(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Build the summaries of full pages.

    Args:
        keys: [M, PS, HK, D] the pages' keys, any float dtype.
    Returns:
        min_max: [M, HK, 2, D] in the dtype of keys; per-channel minimum, then maximum, over the
            page's tokens (Quest, arXiv 2406.10774, 3.3).
        codes: [M, HK, PS, D // 2] uint8, see `quantize_int4`.
        scale_zero: [M, HK, PS, 2] float16.
    """
    by_head = keys.transpose(1, 2)
    wide = by_head.float()
    min_max = torch.stack((wide.amin(2), wide.amax(2)), dim=2).to(keys.dtype)
    return min_max, *quantize_int4(by_head)
