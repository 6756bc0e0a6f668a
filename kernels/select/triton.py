"""Candidate pages in Triton."""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.estimate.parts import quantize_query
from twilight_sgl.kernels.launch import is_interpreted, launch_options, wait_for_inputs
from twilight_sgl.kernels.select.parts import choose_pages, choose_slice
from twilight_sgl.kernels.select.reference import budget_pages


def budget_table(
    columns: int, budget: float, page_size: int, least_tokens: int, device: torch.device
) -> torch.Tensor:
    """[T + 1] int32: pages that a request of n pages may name, for n up to T = columns."""
    pages = torch.arange(columns + 1)
    return budget_pages(pages, budget, page_size, least_tokens).int().to(device)


def max_candidate_pages(
    columns: int,
    budget: float,
    page_size: int,
    least_tokens: int,
    sink_tokens: int,
    recent_tokens: int,
) -> int:
    """The most candidate pages that a sparse row of up to `columns` pages can get."""
    pages = budget_pages(torch.tensor([columns]), budget, page_size, least_tokens)
    forced = -(-sink_tokens // page_size) + -(-max(recent_tokens, 1) // page_size) + 1
    return min(columns, max(int(pages), forced))


@triton.jit
def zero_group(
    out_ptr,
    stride_head,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Zero the outputs [G, DV] of one KV head's group."""
    head = tl.arange(0, G_PAD)
    channel = tl.arange(0, DV_PAD)
    zeros = tl.zeros([G_PAD, DV_PAD], out_ptr.dtype.element_ty)
    inside = (head[:, None] < G) & (channel[None, :] < DV)
    tl.store(out_ptr + head[:, None] * stride_head + channel[None, :], zeros, inside)


@triton.jit
def _select_kernel(
    scores_ptr,
    page_ids_ptr,
    seq_lens_ptr,
    sparse_ptr,
    budget_ptr,
    q_ptr,
    candidate_page_ids_ptr,
    positions_ptr,
    counts_ptr,
    candidate_tokens_ptr,
    kept_tokens_ptr,
    q_codes_ptr,
    q_scale_sum_ptr,
    chunk_counts_ptr,
    out_ptr,
    stride_scores,
    width,
    num_chunks,
    stride_page_ids,
    stride_q_row,
    stride_q_head,
    stride_out_row,
    stride_out_head,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    PS: tl.constexpr,
    HK: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    COLUMNS_PAD: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_CODES: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    # With codes, one more program quantizes the group's queries while the others search.
    pairs = tl.num_programs(0) // (PARTS + (1 if HAS_CODES else 0))
    pair = tl.program_id(0) % pairs
    part = tl.program_id(0) // pairs
    row = pair // HK
    head_kv = pair % HK
    row64 = row.to(tl.int64)
    length = tl.load(seq_lens_ptr + row)
    is_sparse = tl.load(sparse_ptr + row) != 0
    if HAS_CODES and part == PARTS:
        if is_sparse & (length > 0):
            quantize_query(
                q_ptr + row64 * stride_q_row + head_kv * G * stride_q_head,
                q_codes_ptr + pair * G * 2 * D,
                q_scale_sum_ptr + pair * G * 2,
                stride_q_head,
                G,
                G_PAD,
                D,
                D_PAD,
            )
        return
    if (length <= 0) & (part == 0):
        out = out_ptr + row64 * stride_out_row + head_kv * G * stride_out_head
        zero_group(out, stride_out_head, G, G_PAD, DV, DV_PAD)
    pages = (length + PS - 1) // PS
    count = 0
    tokens = tl.maximum(length, 0)
    if is_sparse & (length > 0):
        SLICE: tl.constexpr = COLUMNS_PAD // PARTS
        position = part * SLICE + tl.arange(0, SLICE)
        page = tl.load(page_ids_ptr + row64 * stride_page_ids + position, position < pages, other=0)
        pair_scores_ptr = scores_ptr + pair.to(tl.int64) * stride_scores
        if PARTS == 1:
            chosen, count = choose_pages(
                pair_scores_ptr, length, budget_ptr, SINK, RECENT, PS, COLUMNS_PAD
            )
            place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        else:
            chosen, place, count = choose_slice(
                pair_scores_ptr,
                length,
                budget_ptr,
                part * SLICE,
                SINK,
                RECENT,
                PS,
                COLUMNS_PAD,
                SLICE,
            )
        tl.store(candidate_page_ids_ptr + pair.to(tl.int64) * width + place, page, chosen)
        if CENTRED:
            tl.store(positions_ptr + pair.to(tl.int64) * width + place, position, chosen)
        tokens = count * PS - (pages * PS - length)
    if part == 0:
        if HAS_CHUNKS:
            chunk = tl.arange(0, CHUNKS_PAD)
            tl.store(chunk_counts_ptr + pair * num_chunks + chunk, 0, chunk < num_chunks)
        tl.store(counts_ptr + pair, count)
        tl.store(candidate_tokens_ptr + pair, tokens)
        tl.store(kept_tokens_ptr + pair, tokens)


def _tiling(columns_pad: int, pairs: int) -> tuple[int, int]:
    """Programs that list a (request, KV head)'s candidates, and their warps."""
    if is_interpreted():
        return (2 if pairs <= 8 else 1), 4
    if columns_pad > 4096:
        return (8 if pairs <= 8 else 1), 16
    return 1, 8 if columns_pad > (1024 if pairs <= 64 else 2048) else 4


def select_pages(
    scores: torch.Tensor,
    page_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    sparse: torch.Tensor,
    budgets: torch.Tensor,
    q: torch.Tensor,
    candidate_page_ids: torch.Tensor,
    positions: torch.Tensor | None,
    counts: torch.Tensor,
    candidate_tokens: torch.Tensor,
    kept_tokens: torch.Tensor,
    q_codes: torch.Tensor | None,
    q_scale_sum: torch.Tensor | None,
    chunk_counts: torch.Tensor | None,
    out: torch.Tensor,
    *,
    page_size: int,
    sink_tokens: int,
    recent_tokens: int,
) -> None:
    """Pick each KV head's best pages, as `reference.select_pages`, and prepare the row.

    A few programs per request and KV head, and one more for its queries. Scores nearer to each
    other than 2**-24 of their range may count as equal; of equal ones the earlier page goes first.
    The kernel also quantizes the group's queries for the INT4 estimate and zeroes the output of
    padded rows, which no later kernel looks at.

    Args:
        scores: [B, HK, T] float32 from `page_scores`.
        page_ids, seq_lens, sparse: see `DecodePlan`.
        budgets: [T + 1] int32 from `budget_table`.
        q: [B, HQ, D].
        candidate_page_ids: [B, HK, C] int32, written: the candidates' physical pages in the order
            of their tokens; the rest keeps what it held.
        positions: [B, HK, C] int32, written: the same candidates' logical pages; None where nothing
            reads them.
        counts: [B, HK] int32, written: candidate pages; 0 for rows that are not sparse.
        candidate_tokens: [B, HK] int32, written: tokens of them; all tokens of a row that is
            not sparse.
        kept_tokens: [B, HK] int32, written: the same; pruning then overwrites sparse rows'.
        q_codes: [B, HQ, 2, D] int8 and q_scale_sum: [B, HQ, 2] float32, written for sparse rows,
            see `quantize_query`; None for the `exact` estimator.
        chunk_counts: [B, HK, chunks] int32, zeroed for `unite_kept`; None without pruning.
        out: [B, HQ, DV], zeroed for rows of length 0.
    """
    batch, heads_kv, columns = scores.shape
    heads_q, dim = q.shape[1:]
    group = heads_q // heads_kv
    num_chunks = 1 if chunk_counts is None else chunk_counts.shape[-1]
    columns_pad = max(16, triton.next_power_of_2(columns))
    parts, warps = _tiling(columns_pad, batch * heads_kv)
    _select_kernel[(batch * heads_kv * (parts + (q_codes is not None)),)](
        scores,
        page_ids,
        seq_lens,
        sparse,
        budgets,
        q,
        candidate_page_ids,
        positions,
        counts,
        candidate_tokens,
        kept_tokens,
        q_codes,
        q_scale_sum,
        chunk_counts,
        out,
        scores.stride(1),
        candidate_page_ids.shape[-1],
        num_chunks,
        page_ids.stride(0),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        SINK=sink_tokens,
        RECENT=max(recent_tokens, 1),
        PS=page_size,
        HK=heads_kv,
        G=group,
        G_PAD=triton.next_power_of_2(group),
        D=dim,
        D_PAD=triton.next_power_of_2(dim),
        DV=out.shape[-1],
        DV_PAD=triton.next_power_of_2(out.shape[-1]),
        COLUMNS_PAD=columns_pad,
        PARTS=parts,
        HAS_CODES=q_codes is not None,
        CENTRED=positions is not None,
        HAS_CHUNKS=chunk_counts is not None,
        CHUNKS_PAD=triton.next_power_of_2(num_chunks),
        **launch_options(warps),
    )
