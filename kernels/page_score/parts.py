"""What scores pages in Triton: products with the box of a page's keys."""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.launch import compute_dtype, is_interpreted


@triton.jit
def split_query(
    q_ptr,
    stride_head,
    SLACK: tl.constexpr,
    CENTRED: tl.constexpr,
    COMPUTE: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """What of a group's queries meets maxima and what minima, [G_PAD, D_PAD] each.

    In units of (1 + SLACK) / 2, so with a SLACK of 1 these are the positive and the negative part
    of a query. With CENTRED the rows from G_PAD / 2 on are the queries themselves.
    """
    head = tl.arange(0, G_PAD)
    channel = tl.arange(0, D_PAD)
    member = head
    if CENTRED:
        member = head % (G_PAD // 2)
    inside = (member[:, None] < G) & (channel[None, :] < D)
    q = tl.load(q_ptr + member[:, None] * stride_head + channel[None, :], inside, other=0.0)
    q = q.to(tl.float32)
    reach = SLACK * tl.abs(q)
    unit = 1.0 / (1.0 + SLACK)
    if CENTRED:
        is_bound = (head < G_PAD // 2)[:, None]
        reach = tl.where(is_bound, reach, 0.0)
        unit = tl.where(is_bound, unit, 1.0)
    return ((q + reach) * unit).to(COMPUTE), ((q - reach) * unit).to(COMPUTE)


@triton.jit
def score_pages(
    of_maxima,
    of_minima,
    min_max_ptr,
    middles_ptr,
    page,
    position,
    inside,
    head_kv,
    SLACK: tl.constexpr,
    CENTRED: tl.constexpr,
    COMPUTE: tl.constexpr,
    HK: tl.constexpr,
    G: tl.constexpr,
    G_ROWS: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """[BLOCK] float32: a group's largest products with the boxes of [BLOCK] pages.

    With CENTRED also writes its products with the boxes' middles to middles_ptr, the (request, KV
    head)'s [T, G_ROWS] by logical page, `position`.
    """
    channel = tl.arange(0, D_PAD)
    base = (page.to(tl.int64) * HK + head_kv) * (2 * D)
    bounds_ptr = min_max_ptr + base[:, None] + channel[None, :]
    bounds_inside = inside[:, None] & (channel[None, :] < D)
    low = tl.load(bounds_ptr, bounds_inside, other=0.0).to(COMPUTE)  # [BLOCK, D_PAD]
    high = tl.load(bounds_ptr + D, bounds_inside, other=0.0).to(COMPUTE)
    score = tl.dot(of_maxima, tl.trans(high), input_precision="ieee")
    score = tl.dot(of_minima, tl.trans(low), score, input_precision="ieee")  # [G_PAD, BLOCK]
    head = tl.arange(0, G_PAD)
    if CENTRED:
        member = head - G_PAD // 2
        tl.store(
            middles_ptr + position[None, :] * G_ROWS + member[:, None],
            score * 0.5,
            (member[:, None] >= 0) & (member[:, None] < G) & inside[None, :],
        )
    score *= (1.0 + SLACK) * 0.5
    return tl.max(tl.where(head[:, None] < G, score, -float("inf")), 0)


def score_dtype(q_dtype: torch.dtype, bounds_dtype: torch.dtype) -> tl.dtype:
    """float16 for float8 bounds: the hardware converts to that, and it holds q as well."""
    if bounds_dtype == torch.float8_e4m3fn and q_dtype == torch.bfloat16 and not is_interpreted():
        return tl.float16
    return compute_dtype(q_dtype)


def product_rows(group: int, centred: bool) -> int:
    """G_PAD of a score's product: rows of a group's queries, of which middles take a half."""
    rows = triton.next_power_of_2(group)
    return max(16, 2 * rows if centred else rows)
