"""Page summaries in Triton, of all layers at once."""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.launch import grid_programs, is_interpreted, launch
from twilight_sgl.kernels.seal.reference import FLOAT8_MAX, FLOAT16_MAX, INT4_LEVELS

_TILE_ELEMENTS = 1024  # of half the channels: what one warp holds, as more would talk
_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
}


@triton.jit
def _codes(keys, zero, per_step, LEVELS: tl.constexpr):
    """Nearest code, ties to even: 1.5 * 2**23 more has no bits below 1 and the code in its last."""
    x = (keys - zero) * per_step
    x = tl.minimum(tl.maximum(x, 0.0), LEVELS) + 12582912.0
    return x.to(tl.int32, bitcast=True) & 0xF


_FLOAT8_LARGEST = tl.constexpr(FLOAT8_MAX)


@triton.jit
def _bound(values, UP: tl.constexpr, OUTWARD: tl.constexpr, DTYPE: tl.constexpr):
    """Convert minima or maxima to DTYPE; OUTWARD: see `reference.round_outward`."""
    values += 0.0  # no negative zero
    if OUTWARD:
        # The magnitude cut to 3 bits behind the leading one (to a multiple of 2**-9 below
        # 2**-6) converts exactly; the next one up is the next integer.
        size = tl.minimum(tl.abs(values), _FLOAT8_LARGEST)
        cut = (size.to(tl.int32, bitcast=True) & -0x100000).to(tl.float32, bitcast=True)
        cut = tl.where(size < 0.015625, tl.floor(size * 512.0) / 512.0, cut)
        away = (values > 0) == UP
        bits = cut.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
        bits += ((cut < size) & away).to(tl.int32)
        bits += tl.where(values < 0, 128, 0)
        return bits.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return values.to(DTYPE)


@triton.jit
def _less_middle(keys, least, most):
    """[HEADS, PS, HALF_PAD] keys less the middle of [HEADS, HALF_PAD] bounds as they are stored."""
    middle = (least.to(tl.float32) + most.to(tl.float32)) * 0.5
    rest = keys - middle[:, None, :]
    return tl.where(rest == rest, rest, 0.0)  # of infinite bounds


@triton.jit
def _seal_kernel(
    key_pointers_ptr,
    min_max_ptr,
    codes_ptr,
    scale_zero_ptr,
    page_ids_ptr,
    num_page_ids_ptr,
    clock_ptr,
    layers,
    pool_pages,
    stride_slot,
    KEY_DTYPE: tl.constexpr,
    BOUNDS_DTYPE: tl.constexpr,
    OUTWARD: tl.constexpr,
    PS: tl.constexpr,
    HK: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF_PAD: tl.constexpr,
    LEVELS: tl.constexpr,
    F16_MAX: tl.constexpr,
    HAS_CODES: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_CLOCK: tl.constexpr,
):
    HALF: tl.constexpr = D // 2
    head_blocks: tl.constexpr = (HK + HEADS - 1) // HEADS
    items = tl.load(num_page_ids_ptr) * layers * head_blocks
    if HAS_CLOCK:
        works = tl.program_id(0) < items
        tl.atomic_min(clock_ptr, tl.extra.cuda.globaltimer(), works, sem="relaxed")
    lane = tl.arange(0, HEADS)
    token = tl.arange(0, PS)
    channel = tl.arange(0, HALF_PAD)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        head = (item % head_blocks) * HEADS + lane
        rest = item // head_blocks
        layer = rest % layers
        page = tl.load(page_ids_ptr + rest // layers).to(tl.int64)
        keys_ptr = tl.load(key_pointers_ptr + layer).to(tl.pointer_type(KEY_DTYPE))
        keys_ptr = tl.multiple_of(keys_ptr, 16)  # else loads are not vectorised
        # Tiles are [HEADS, PS, HALF_PAD].
        row_inside = (head < HK)[:, None, None]
        inside = row_inside & (channel < HALF)[None, None, :]
        offset = (page * PS + token)[None, :, None] * stride_slot
        offset += head[:, None, None] * D + channel[None, None, :]
        low_half = tl.load(keys_ptr + offset, inside, other=0.0).to(tl.float32)
        high_half = tl.load(keys_ptr + offset + HALF, inside, other=0.0).to(tl.float32)

        low_half = tl.where(low_half == low_half, low_half, 0.0)  # NaN counts as 0
        high_half = tl.where(high_half == high_half, high_half, 0.0)

        row = (layer.to(tl.int64) * pool_pages + page) * HK + head  # [HEADS]
        bounds_inside = (head < HK)[:, None] & (channel < HALF)[None, :]
        bounds_ptr = min_max_ptr + row[:, None] * (2 * D) + channel[None, :]
        least_low = _bound(tl.min(low_half, 1), False, OUTWARD, BOUNDS_DTYPE)
        least_high = _bound(tl.min(high_half, 1), False, OUTWARD, BOUNDS_DTYPE)
        most_low = _bound(tl.max(low_half, 1), True, OUTWARD, BOUNDS_DTYPE)
        most_high = _bound(tl.max(high_half, 1), True, OUTWARD, BOUNDS_DTYPE)
        tl.store(bounds_ptr, least_low, bounds_inside)
        tl.store(bounds_ptr + HALF, least_high, bounds_inside)
        tl.store(bounds_ptr + D, most_low, bounds_inside)
        tl.store(bounds_ptr + D + HALF, most_high, bounds_inside)

        if HAS_CODES:
            if CENTRED:
                low_half = _less_middle(low_half, least_low, most_low)
                high_half = _less_middle(high_half, least_high, most_high)
            infinity = float("inf")
            low = tl.min(tl.where(inside, tl.minimum(low_half, high_half), infinity), 2)
            high = tl.max(tl.where(inside, tl.maximum(low_half, high_half), -infinity), 2)
            head_inside = (head < HK)[:, None] & (token >= 0)[None, :]  # [HEADS, PS]
            low = tl.where(head_inside, low, 0.0) + 0.0
            span = tl.where(head_inside, high, 0.0) + 0.0 - low
            span = tl.where(span == span, span, 0.0)  # all of them the same infinity
            zero = tl.minimum(tl.maximum(low, -F16_MAX), F16_MAX).to(tl.float16)
            scale = tl.div_rn(span, tl.zeros_like(low) + LEVELS)
            scale = tl.minimum(scale, F16_MAX).to(tl.float16)
            step = scale.to(tl.float32)
            step = tl.where(step > 0, step, 1.0)
            per_step = tl.div_rn(tl.zeros_like(step) + 1.0, step)[:, :, None]
            base = zero.to(tl.float32)[:, :, None]
            packed = _codes(low_half, base, per_step, LEVELS)
            packed |= _codes(high_half, base, per_step, LEVELS) << 4
            token_row = row[:, None] * PS + token[None, :]
            codes_offset = token_row[:, :, None] * HALF + channel[None, None, :]
            tl.store(codes_ptr + codes_offset, packed.to(tl.uint8), inside)
            both = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            both |= zero.to(tl.int16, bitcast=True).to(tl.int32) << 16
            tl.store(scale_zero_ptr + token_row, both, head_inside)
    if HAS_CLOCK:
        works = tl.program_id(0) < items
        tl.atomic_max(clock_ptr + 1, tl.extra.cuda.globaltimer(), works, sem="relaxed")


def seal_pages(
    key_caches: list[torch.Tensor] | tuple[torch.Tensor, ...],
    key_pointers: torch.Tensor,
    min_max: torch.Tensor,
    codes: torch.Tensor | None,
    scale_zero: torch.Tensor | None,
    page_ids: torch.Tensor,
    num_page_ids: torch.Tensor,
    clock: torch.Tensor | None = None,
    *,
    centred: bool = False,
) -> None:
    """Build the summaries of listed pages in every layer, bit-equal to `reference.summarize`.

    One launch with a fixed grid; it can be captured in a CUDA graph.

    Args:
        key_caches: one per layer, all alike: [P, PS, HK, D] views of `[slots, HK, D]` keys in
            float32, float16, bfloat16 or float8_e4m3fn. Only the first is looked at, for its
            shape; the kernel reads through `key_pointers`.
        key_pointers: [L] int64 on the device, see `layer_pointers`.
        min_max: [L, P, HK, 2, D], written; in the dtype of the keys, or in float8_e4m3fn, rounded
            outward.
        codes: [L, P, HK, PS, D // 2] uint8 and scale_zero: [L, P, HK, PS, 2] float16, written;
            both None when only the bounds are wanted.
        page_ids: [>= num_page_ids] int32 physical pages.
        num_page_ids: [1] int32 on the device, how many of them count.
        clock: [2] int64: the first is lowered to when work began, the second raised to when it
            ended, in nanoseconds of the GPU's clock; left alone where there is no page, and by
            Triton's interpreter, which has no such clock.
        centred: whether INT4 keys are less their page's middle, see `reference.page_codes`.
    """
    keys = key_caches[0]
    pool_pages, page_size, heads_kv, dim = keys.shape
    if keys.stride(3) != 1 or keys.stride(2) != dim or keys.stride(0) != page_size * keys.stride(1):
        raise ValueError(f"key caches must be [slots, HK, D] rows by page, strides {keys.stride()}")
    half_pad = triton.next_power_of_2(dim // 2)
    heads = triton.next_power_of_2(heads_kv)
    heads = max(1, min(heads, _TILE_ELEMENTS // (page_size * half_pad)))
    launch(_seal_kernel, grid_programs(keys.device, 32))(
        key_pointers,
        min_max,
        codes,
        None if scale_zero is None else scale_zero.view(torch.int32),  # scale low, zero high
        page_ids,
        num_page_ids,
        clock,
        len(key_caches),
        pool_pages,
        keys.stride(1),
        KEY_DTYPE=_TRITON_DTYPES[keys.dtype],
        BOUNDS_DTYPE=_TRITON_DTYPES[min_max.dtype],
        OUTWARD=min_max.dtype == torch.float8_e4m3fn != keys.dtype,
        PS=page_size,
        HK=heads_kv,
        HEADS=heads,
        D=dim,
        HALF_PAD=half_pad,
        LEVELS=float(INT4_LEVELS),
        F16_MAX=FLOAT16_MAX,
        HAS_CODES=codes is not None,
        CENTRED=centred,
        HAS_CLOCK=clock is not None and not is_interpreted(),
        num_warps=1,
    )


def layer_pointers(key_caches: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[L] int64 device tensor of the caches' addresses, for `seal_pages`; build it once."""
    first = key_caches[0]
    for layer, keys in enumerate(key_caches):
        if (keys.shape, keys.stride(), keys.dtype) != (first.shape, first.stride(), first.dtype):
            raise ValueError(
                f"key cache of layer {layer} is {keys.dtype} {tuple(keys.shape)}, "
                f"layer 0 {first.dtype} {tuple(first.shape)}: all layers must be alike"
            )
    return torch.tensor([keys.data_ptr() for keys in key_caches], dtype=torch.int64).to(
        first.device
    )
