"""Estimated logits in Triton, of candidate pages."""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.estimate.parts import estimate_pages, load_digits
from twilight_sgl.kernels.launch import (
    compute_dtype,
    grid_programs,
    is_interpreted,
    launch,
    launch_options,
    locate_block,
    wait_for_inputs,
)


@triton.jit(do_not_specialize_on_alignment=["batch"])  # multiples of 16 have the same code
def _estimate_kernel(
    q_ptr,
    keys_ptr,
    codes_ptr,
    scale_zero_ptr,
    q_codes_ptr,
    q_scale_sum_ptr,
    middles_ptr,
    positions_ptr,
    candidate_page_ids_ptr,
    counts_ptr,
    seq_lens_ptr,
    logits_ptr,
    batch,
    width,
    stride_middles,
    stride_q_row,
    stride_q_head,
    stride_slot,
    stride_key_head,
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
    BATCH_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    PAGES: tl.constexpr = BLOCK // PS
    rows = tl.arange(0, BATCH_PAD)
    counts = tl.load(counts_ptr + rows * HK, rows < batch, other=0)
    item_pages = PAGES * BLOCKS
    # Where programs are many to a (request, KV head), so many pages that each has one item at most.
    spare = tl.num_programs(0) - batch * HK
    if spare >= 3 * batch * HK:
        each = tl.maximum(tl.cdiv(tl.sum(counts, 0) * HK, spare), 1)
        item_pages = tl.cdiv(each, PAGES) * PAGES
    items = (counts + item_pages - 1) // item_pages
    ends = tl.cumsum(items, 0)
    head = tl.arange(0, G_PAD)
    for item in range(tl.program_id(0), tl.sum(items, 0) * HK, tl.num_programs(0)):
        row, head_kv, block = locate_block(item, items, ends, HK)
        pair = (row * HK + head_kv).to(tl.int64)
        count = tl.load(counts_ptr + pair)
        length = tl.load(seq_lens_ptr + row)
        first_page = block * item_pages
        pair_middles_ptr = middles_ptr
        pair_positions_ptr = positions_ptr
        if CENTRED:
            pair_middles_ptr += pair * stride_middles
            pair_positions_ptr += pair * width
        digits = 0
        if not EXACT:
            digits = load_digits(
                q_codes_ptr + pair * G * 2 * D,
                q_scale_sum_ptr + pair * G * 2,
                G,
                G_PAD,
                D // 2,
                HALF_PAD,
            )
        estimate_pages(
            q_ptr + row.to(tl.int64) * stride_q_row + head_kv * G * stride_q_head,
            keys_ptr + head_kv * stride_key_head,
            codes_ptr,
            scale_zero_ptr,
            digits,
            pair_middles_ptr,
            pair_positions_ptr,
            candidate_page_ids_ptr + pair * width,
            logits_ptr + (pair * G + head[:, None]) * (width * PS),
            head_kv,
            first_page,
            tl.minimum(first_page + item_pages, count),
            count,
            (length - 1) % PS + 1,
            stride_q_head,
            stride_slot,
            sm_scale,
            logit_cap,
            HAS_CAP,
            EXACT,
            CENTRED,
            COMPUTE,
            HK,
            G,
            G_ROWS,
            G_PAD,
            D,
            D_PAD,
            HALF_PAD,
            PS,
            BLOCK,
            STAGES,
            ASM,
        )


def _tiling(pages: int, dim: int) -> tuple[int, int, int, int, int]:
    """Tokens of a block, blocks of an item, blocks in flight, warps, programs an SM."""
    if is_interpreted():
        return 64, 2, 1, 4, 1
    if pages >= 32768 and dim > 64:
        return 128, (8 if pages >= 65536 else 4), 7, 4, 6
    return (64, 4, 5, 2, 8) if pages >= 8192 else (128, 1, 1, 2, 8)


def estimate_logits(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    codes: torch.Tensor | None,
    scale_zero: torch.Tensor | None,
    q_codes: torch.Tensor | None,
    q_scale_sum: torch.Tensor | None,
    middles: torch.Tensor | None,
    positions: torch.Tensor,
    candidate_page_ids: torch.Tensor,
    counts: torch.Tensor,
    seq_lens: torch.Tensor,
    logits: torch.Tensor,
    *,
    sm_scale: float,
    logit_cap: float = 0.0,
) -> None:
    """Estimate the scaled logits of the candidates' tokens (Twilight, arXiv 2502.02770, 4.2).

    Full pages are read from their INT4 keys, the open page, the last candidate, from the key
    cache; with codes None all are (the `exact` estimator).

    Args:
        q: [B, HQ, D].
        key_cache: [P, PS, HK, D] one layer's keys by page.
        codes, scale_zero: [P, HK, PS, D // 2] uint8, [P, HK, PS, 2] float16, or None.
        q_codes, q_scale_sum: the queries' digits from `select_pages`, or None.
        middles: [B, HK, T, G_ROWS] float32 from `select_pages`, for INT4 keys that are less their
            page's middle; else None.
        positions, candidate_page_ids, counts: [B, HK, C] twice and [B, HK] int32 from
            `select_pages`; a row's heads all have the same count.
        seq_lens: [B] int32.
        logits: [B, HQ, C * PS] float16 or float32, written where there is a token, in the order
            of the candidates; the rest keeps what it held.
        sm_scale, logit_cap: softmax scale and soft cap, 0 for none.
    """
    batch, heads_q, dim = q.shape
    page_size, heads_kv = key_cache.shape[1:3]
    group = heads_q // heads_kv
    block, blocks, stages, warps, programs = _tiling(
        batch * heads_kv * candidate_page_ids.shape[-1], dim
    )
    block = max(block, page_size)
    launch(_estimate_kernel, grid_programs(q.device, programs))(
        q,
        key_cache,
        codes,
        None if scale_zero is None else scale_zero.view(torch.int32),  # scale low, zero high
        q if q_codes is None else q_codes,
        q if q_scale_sum is None else q_scale_sum,
        middles,
        positions,
        candidate_page_ids,
        counts,
        seq_lens,
        logits,
        batch,
        candidate_page_ids.shape[-1],
        0 if middles is None else middles.stride(1),
        q.stride(0),
        q.stride(1),
        key_cache.stride(1),
        key_cache.stride(2),
        sm_scale,
        logit_cap,
        HAS_CAP=logit_cap != 0,
        EXACT=codes is None,
        CENTRED=middles is not None,
        COMPUTE=compute_dtype(q.dtype),
        HK=heads_kv,
        G=group,
        G_ROWS=triton.next_power_of_2(group),
        G_PAD=max(16, triton.next_power_of_2(group)),
        D=dim,
        D_PAD=triton.next_power_of_2(dim),
        HALF_PAD=max(32, triton.next_power_of_2(dim // 2)),
        PS=page_size,
        BATCH_PAD=triton.next_power_of_2(batch),
        BLOCK=block,
        BLOCKS=blocks,
        STAGES=stages,
        ASM=not is_interpreted(),
        **launch_options(warps),
    )
