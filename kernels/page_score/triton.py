"""Page scores by the box of a page's keys, in Triton."""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.launch import (
    compute_dtype,
    grid_programs,
    is_interpreted,
    launch_options,
    locate_block,
    wait_for_inputs,
)


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


@triton.jit
def _page_score_kernel(
    q_ptr,
    min_max_ptr,
    page_ids_ptr,
    seq_lens_ptr,
    sparse_ptr,
    scores_ptr,
    middles_ptr,
    batch,
    stride_scores,
    stride_middles,
    stride_q_row,
    stride_q_head,
    stride_page_ids,
    SLACK: tl.constexpr,
    CENTRED: tl.constexpr,
    COMPUTE: tl.constexpr,
    HK: tl.constexpr,
    G: tl.constexpr,
    G_ROWS: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    PS: tl.constexpr,
    BATCH_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    rows = tl.arange(0, BATCH_PAD)
    real = rows < batch
    lengths = tl.load(seq_lens_ptr + rows, real, other=0)
    is_sparse = tl.load(sparse_ptr + rows, real, other=0) != 0
    full_pages = tl.where(is_sparse, tl.maximum(lengths - 1, 0) // PS, 0)
    blocks = (full_pages + BLOCK - 1) // BLOCK
    ends = tl.cumsum(blocks, 0)
    for item in range(tl.program_id(0), tl.sum(blocks, 0) * HK, tl.num_programs(0)):
        row, head_kv, block = locate_block(item, blocks, ends, HK)
        row_pages = tl.maximum(tl.load(seq_lens_ptr + row) - 1, 0) // PS
        position = block * BLOCK + tl.arange(0, BLOCK)
        inside = position < row_pages
        row64 = row.to(tl.int64)
        page = tl.load(page_ids_ptr + row64 * stride_page_ids + position, inside, other=0)
        of_maxima, of_minima = split_query(
            q_ptr + row64 * stride_q_row + head_kv * G * stride_q_head,
            stride_q_head,
            SLACK,
            CENTRED,
            COMPUTE,
            G,
            G_PAD,
            D,
            D_PAD,
        )
        pair_middles_ptr = middles_ptr
        if CENTRED:
            pair_middles_ptr += (row64 * HK + head_kv) * stride_middles
        score = score_pages(
            of_maxima,
            of_minima,
            min_max_ptr,
            pair_middles_ptr,
            page,
            position,
            inside,
            head_kv,
            SLACK,
            CENTRED,
            COMPUTE,
            HK,
            G,
            G_ROWS,
            G_PAD,
            D,
            D_PAD,
        )
        out = scores_ptr + (row64 * HK + head_kv) * stride_scores + position
        tl.store(out, score, inside)


def _tiling(pages: int, page_bytes: int) -> tuple[int, int, int, int]:
    """Pages of a block, pipeline stages, warps, programs an SM."""
    if is_interpreted():
        return 16, 1, 4, 1
    if pages < 16384:
        return 32, 1, 4, 8
    if page_bytes > 256:  # bounds of 16 bits, or many channels
        return (64, 3, 4, 3) if pages >= 131072 else (64, 1, 4, 4)
    return (64, 3, 2, 6) if page_bytes > 128 and pages >= 131072 else (128, 3, 4, 4)


def score_dtype(q_dtype: torch.dtype, bounds_dtype: torch.dtype) -> tl.dtype:
    """float16 for float8 bounds: the hardware converts to that, and it holds q as well."""
    if bounds_dtype == torch.float8_e4m3fn and q_dtype == torch.bfloat16 and not is_interpreted():
        return tl.float16
    return compute_dtype(q_dtype)


def product_rows(group: int, centred: bool) -> int:
    """G_PAD of a score's product: rows of a group's queries, of which middles take a half."""
    rows = triton.next_power_of_2(group)
    return max(16, 2 * rows if centred else rows)


def page_scores(
    q: torch.Tensor,
    min_max: torch.Tensor,
    page_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    sparse: torch.Tensor,
    scores: torch.Tensor,
    middles: torch.Tensor | None,
    *,
    page_size: int,
    slack: float = 1.0,
) -> None:
    """What `reference.page_scores` says of each full page of sparse rows.

    Args:
        q: [B, HQ, D], last dimension contiguous.
        min_max: [P, HK, 2, D] page summaries of one layer, in the dtype of the keys or float8.
        page_ids: [B, T] int32; seq_lens: [B] int32; sparse: [B] bool: see `DecodePlan`.
        scores: [B, HK, T] float32, written for the pages before the one that holds the newest
            token; the rest keeps what it held.
        middles: [B, HK, T, G_ROWS] float32, G_ROWS being the next power of two of G: written for
            the same pages, the unscaled product of the group's query head g with the middle of the
            page's bounds in column g; None for estimators other than `int4_centred`.
        page_size: PS, tokens.
        slack: see `reference.page_scores`; compiled in.
    """
    batch, heads_q, dim = q.shape
    heads_kv = min_max.shape[1]
    group = heads_q // heads_kv
    block, stages, warps, programs = _tiling(
        batch * heads_kv * page_ids.shape[1], 2 * dim * min_max.element_size()
    )
    _page_score_kernel[(grid_programs(q.device, programs),)](
        q,
        min_max,
        page_ids,
        seq_lens,
        sparse,
        scores,
        middles,
        batch,
        scores.stride(1),
        0 if middles is None else middles.stride(1),
        q.stride(0),
        q.stride(1),
        page_ids.stride(0),
        SLACK=slack,
        CENTRED=middles is not None,
        COMPUTE=score_dtype(q.dtype, min_max.dtype),
        HK=heads_kv,
        G=group,
        G_ROWS=triton.next_power_of_2(group),
        G_PAD=product_rows(group, middles is not None),
        D=dim,
        D_PAD=triton.next_power_of_2(dim),
        PS=page_size,
        BATCH_PAD=triton.next_power_of_2(batch),
        BLOCK=block,
        **launch_options(warps, stages),
    )
