"""What estimate kernels are made of: INT4 keys on the integer tensor cores.

A query is written as two int8 digits, q ~ s * (q1 + q2 / 254), which holds 16 bits of it, so that

    q . (code * scale + zero) = scale * s * (q1 . code + q2 . code / 254) + zero * sum(q)

needs no conversion of a code to a floating-point number: unpacking four bytes takes a mask, and one
more with a shift. The sums of products are exact.
"""

import triton
import triton.language as tl

from twilight_sgl.kernels.launch import soft_cap_logits


@triton.jit
def _round(x):
    return (x + 12582912.0) - 12582912.0  # ties to even, for |x| < 2**22


@triton.jit
def quantize_query(
    q_ptr,
    stride_head,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """A group's queries [G, 2 * HALF] as two int8 digits a channel.

    Returns:
        [G_PAD, HALF_PAD] int8: first digits of the first and second half of the channels, second
        digits of both; [G_PAD] the scale s and the sum of q over channels.
    """
    head = tl.arange(0, G_PAD)
    channel = tl.arange(0, HALF_PAD)
    inside = (head[:, None] < G) & (channel[None, :] < HALF)
    low_ptr = q_ptr + head[:, None] * stride_head + channel[None, :]
    low = tl.load(low_ptr, inside, other=0.0).to(tl.float32)
    high = tl.load(low_ptr + HALF, inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)
    scale = tl.where(largest > 0, largest, 1.0) / 127.0
    sums = tl.sum(low + high, 1)
    low = low / scale[:, None]
    high = high / scale[:, None]
    first_low = _round(low)
    first_high = _round(high)
    second_low = _round((low - first_low) * 254.0).to(tl.int8)
    second_high = _round((high - first_high) * 254.0).to(tl.int8)
    return first_low.to(tl.int8), first_high.to(tl.int8), second_low, second_high, scale, sums


@triton.jit
def store_digits(
    q_ptr,
    q_codes_ptr,
    q_scale_sum_ptr,
    stride_head,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """Quantize a group's queries for programs of a later launch.

    Args:
        q_codes_ptr: the group's [G, 2, D] int8 digits, written; q_scale_sum_ptr: its [G, 2] float32
            scales and sums of q over channels, written.
    """
    first_low, first_high, second_low, second_high, scale, sums = quantize_query(
        q_ptr, stride_head, G, G_PAD, HALF, HALF_PAD
    )
    head = tl.arange(0, G_PAD)
    channel = tl.arange(0, HALF_PAD)
    inside = (head[:, None] < G) & (channel[None, :] < HALF)
    digits_ptr = q_codes_ptr + head[:, None] * (4 * HALF) + channel[None, :]
    tl.store(digits_ptr, first_low, inside)
    tl.store(digits_ptr + HALF, first_high, inside)
    tl.store(digits_ptr + 2 * HALF, second_low, inside)
    tl.store(digits_ptr + 3 * HALF, second_high, inside)
    tl.store(q_scale_sum_ptr + head * 2, scale, head < G)
    tl.store(q_scale_sum_ptr + head * 2 + 1, sums, head < G)


@triton.jit
def load_digits(
    q_codes_ptr,
    q_scale_sum_ptr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """What `store_digits` has stored, as `quantize_query` returns it."""
    head = tl.arange(0, G_PAD)
    channel = tl.arange(0, HALF_PAD)
    inside = (head[:, None] < G) & (channel[None, :] < HALF)
    digits_ptr = q_codes_ptr + head[:, None] * (4 * HALF) + channel[None, :]
    first_low = tl.load(digits_ptr, inside, other=0)
    first_high = tl.load(digits_ptr + HALF, inside, other=0)
    second_low = tl.load(digits_ptr + 2 * HALF, inside, other=0)
    second_high = tl.load(digits_ptr + 3 * HALF, inside, other=0)
    scale = tl.load(q_scale_sum_ptr + head * 2, head < G, other=0.0)
    sums = tl.load(q_scale_sum_ptr + head * 2 + 1, head < G, other=0.0)
    return first_low, first_high, second_low, second_high, scale, sums


@triton.jit
def _unpack(packed, ASM: tl.constexpr):
    """Split bytes into low and high nibbles as int8."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            "{ and.b32 $0, $2, 0x0F0F0F0F; shr.u32 $1, $2, 4; and.b32 $1, $1, 0x0F0F0F0F; }",
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = (packed & 0xF).to(tl.int8)
        high = (packed >> 4).to(tl.int8)
    return low, high


@triton.jit
def _exact_logits(
    q_ptr,
    keys_ptr,
    slots,
    slots_inside,
    stride_q_head,
    stride_slot,
    COMPUTE: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """[G_PAD, tokens] float32 products of the group's queries with keys at slots."""
    head = tl.arange(0, G_PAD)
    channel = tl.arange(0, D_PAD)
    q = tl.load(
        q_ptr + head[:, None] * stride_q_head + channel[None, :],
        (head[:, None] < G) & (channel[None, :] < D),
        other=0.0,
    )
    keys = tl.load(
        keys_ptr + slots[:, None] * stride_slot + channel[None, :],
        slots_inside[:, None] & (channel[None, :] < D),
        other=0.0,
    )
    return tl.dot(q.to(COMPUTE), tl.trans(keys.to(COMPUTE)), input_precision="ieee")


@triton.jit
def estimate_pages(
    q_group_ptr,
    keys_head_ptr,
    codes_ptr,
    scale_zero_ptr,
    digits,
    middles_ptr,
    positions_ptr,
    pages_ptr,
    out_ptr,
    head_kv,
    first_page,
    last_page,
    count,
    open_tokens,
    stride_q_head,
    stride_slot,
    sm_scale,
    logit_cap,
    HAS_CAP: tl.constexpr,
    EXACT: tl.constexpr,
    CENTRED: tl.constexpr,
    COMPUTE: tl.constexpr,
    HK: tl.constexpr,
    G: tl.constexpr,
    G_ROWS: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    PS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Logits of a group for the candidate pages from first_page to below last_page.

    Args:
        q_group_ptr: the group's [G, D]; keys_head_ptr: the KV head's keys by slot.
        digits: what `quantize_query` returns; anything with EXACT.
        middles_ptr, positions_ptr: with CENTRED, the (request, KV head)'s [T, G_ROWS] products
            with pages' middles, and its candidates' logical pages.
        pages_ptr: the (request, KV head)'s candidates, count of them; the last is the open page,
            which holds open_tokens.
        out_ptr: [G_PAD, 1] pointers to each head's logits.
    """
    PAGES: tl.constexpr = BLOCK // PS
    HALF: tl.constexpr = D // 2
    head = tl.arange(0, G_PAD)
    token = tl.arange(0, BLOCK)
    if EXACT:
        for start in tl.range(first_page, last_page, PAGES, num_stages=STAGES):
            candidate = start + token // PS  # [BLOCK]
            in_page = tl.where(candidate == count - 1, open_tokens, PS)
            inside = (candidate < last_page) & (token % PS < in_page)
            page = tl.load(pages_ptr + candidate, inside, other=0).to(tl.int64)
            logits = _exact_logits(
                q_group_ptr,
                keys_head_ptr,
                page * PS + token % PS,
                inside,
                stride_q_head,
                stride_slot,
                COMPUTE,
                G,
                G_PAD,
                D,
                D_PAD,
            )
            logits = soft_cap_logits(logits * sm_scale, logit_cap, HAS_CAP)
            tl.store(
                out_ptr + (candidate * PS + token % PS)[None, :],
                logits.to(out_ptr.dtype.element_ty),
                (head[:, None] < G) & inside[None, :],
            )
    else:
        channel = tl.arange(0, HALF_PAD)
        first_low, first_high, second_low, second_high, q_scale, q_sum = digits
        q_scale *= sm_scale
        q_sum *= sm_scale
        sealed_end = tl.minimum(last_page, count - 1)  # the last candidate is the open page
        for start in tl.range(first_page, sealed_end, PAGES, num_stages=STAGES):
            candidate = start + token // PS  # [BLOCK]
            inside = candidate < sealed_end
            page = tl.load(pages_ptr + candidate, inside, other=0).to(tl.int64)
            code_row = (page * HK + head_kv) * PS + token % PS
            packed = tl.load(
                codes_ptr + code_row[:, None] * HALF + channel[None, :],
                inside[:, None] & (channel[None, :] < HALF),
                other=0,
            )
            pair_bits = tl.load(scale_zero_ptr + code_row, inside, other=0)
            scale = (pair_bits & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
            zero = (pair_bits >> 16).to(tl.int16).to(tl.float16, bitcast=True)
            low, high = _unpack(packed, ASM)
            low = tl.trans(low)
            high = tl.trans(high)  # [HALF_PAD, BLOCK]
            first = tl.dot(first_low, low, out_dtype=tl.int32)
            first = tl.dot(first_high, high, first, out_dtype=tl.int32)
            second = tl.dot(second_low, low, out_dtype=tl.int32)
            second = tl.dot(second_high, high, second, out_dtype=tl.int32)
            products = first.to(tl.float32) + second.to(tl.float32) * (1.0 / 254.0)
            logits = products * q_scale[:, None] * scale.to(tl.float32)[None, :]
            logits += q_sum[:, None] * zero.to(tl.float32)[None, :]
            if CENTRED:
                # A page at a time: a tile of all tokens would take as much shared memory as codes.
                each = start + tl.arange(0, PAGES)
                position = tl.load(positions_ptr + each, each < sealed_end, other=0)
                middle = tl.load(
                    middles_ptr + position[None, :] * G_ROWS + head[:, None],
                    (head[:, None] < G) & (each < sealed_end)[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )  # [G_PAD, PAGES]
                middle = tl.broadcast_to(middle[:, :, None], (G_PAD, PAGES, PS))
                logits += tl.reshape(middle, (G_PAD, BLOCK)) * sm_scale
            logits = soft_cap_logits(logits, logit_cap, HAS_CAP)
            tl.store(
                out_ptr + (candidate * PS + token % PS)[None, :],
                logits.to(out_ptr.dtype.element_ty),
                (head[:, None] < G) & inside[None, :],
            )
        if (first_page < last_page) & (last_page == count):
            offset = tl.arange(0, PS)
            open_page = tl.load(pages_ptr + count - 1).to(tl.int64)
            open_inside = offset < open_tokens
            open_logits = _exact_logits(
                q_group_ptr,
                keys_head_ptr,
                open_page * PS + offset,
                open_inside,
                stride_q_head,
                stride_slot,
                COMPUTE,
                G,
                G_PAD,
                D,
                D_PAD,
            )
            open_logits = soft_cap_logits(open_logits * sm_scale, logit_cap, HAS_CAP)
            tl.store(
                out_ptr + ((count - 1) * PS + offset)[None, :],
                open_logits.to(out_ptr.dtype.element_ty),
                (head[:, None] < G) & open_inside[None, :],
            )
