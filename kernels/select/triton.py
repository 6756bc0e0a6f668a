"""Candidate pages in Triton: scored, ranked and listed in one launch.

A program takes some strata of a request's pages for one KV head and waits for nobody. What it
scores them by is in `page_score`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.estimate.parts import store_digits
from twilight_sgl.kernels.launch import (
    grid_programs,
    is_interpreted,
    launch,
    launch_options,
    locate_block,
    wait_for_inputs,
)
from twilight_sgl.kernels.page_score.parts import product_rows, score_dtype
from twilight_sgl.kernels.row import Token, token_strides, write_token, zero_group
from twilight_sgl.kernels.select.parts import choose_in_strata, count_candidates
from twilight_sgl.kernels.select.reference import STRATUM_PAGES, budget_pages, forced_bound


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
    return min(columns, max(int(pages), forced_bound(page_size, sink_tokens, recent_tokens)))


@triton.jit
def _select_kernel(
    q_ptr,
    min_max_ptr,
    page_ids_ptr,
    seq_lens_ptr,
    sparse_ptr,
    budget_ptr,
    rank_keys_ptr,
    middles_ptr,
    candidate_page_ids_ptr,
    positions_ptr,
    counts_ptr,
    candidate_tokens_ptr,
    kept_tokens_ptr,
    q_codes_ptr,
    q_scale_sum_ptr,
    chunk_counts_ptr,
    out_ptr,
    new_keys_ptr,
    new_values_ptr,
    keys_ptr,
    values_ptr,
    batch,
    width,
    num_chunks,
    stride_rank_keys,
    stride_middles,
    stride_page_ids,
    stride_q_row,
    stride_q_head,
    stride_out_row,
    stride_out_head,
    stride_new_key_row,
    stride_new_value_row,
    stride_key_head,
    stride_value_head,
    HAS_TOKEN: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_CHUNKS: tl.constexpr,
    CENTRED: tl.constexpr,
    SLACK: tl.constexpr,
    SCORE: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    PS: tl.constexpr,
    HK: tl.constexpr,
    G: tl.constexpr,
    G_ROWS: tl.constexpr,
    SCORE_ROWS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BATCH_PAD: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    STRATA: tl.constexpr,
    SCORE_PAGES: tl.constexpr,
    SCORE_STAGES: tl.constexpr,
    RANK_PAGES: tl.constexpr,
    RANK_OTHERS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    rows = tl.arange(0, BATCH_PAD)
    real = rows < batch
    lengths = tl.load(seq_lens_ptr + rows, real, other=0)
    sparse_rows = real & (tl.load(sparse_ptr + rows, real, other=0) != 0) & (lengths > 0)
    _, _, items = count_candidates(tl.maximum(lengths, 1), budget_ptr, SINK, RECENT, PS)
    # One more for each row sets it up.
    items = tl.where(sparse_rows, (items + STRATA - 1) // STRATA, 0) + real.to(tl.int32)
    ends = tl.cumsum(items, 0)
    for item in range(tl.program_id(0), tl.sum(items, 0) * HK, tl.num_programs(0)):
        row, head_kv, turn = locate_block(item, items, ends, HK)
        row64 = row.to(tl.int64)
        pair = row * HK + head_kv
        pair64 = pair.to(tl.int64)
        q_group_ptr = q_ptr + row64 * stride_q_row + head_kv * G * stride_q_head
        length = tl.load(seq_lens_ptr + row)
        is_sparse = (tl.load(sparse_ptr + row) != 0) & (length > 0)
        pages, count, strata = count_candidates(tl.maximum(length, 1), budget_ptr, SINK, RECENT, PS)
        if turn == 0:
            tokens = tl.maximum(length, 0)
            if is_sparse:
                tokens = count * PS - (pages * PS - length)
            else:
                count = 0
            tl.store(counts_ptr + pair, count)
            tl.store(candidate_tokens_ptr + pair, tokens)
            tl.store(kept_tokens_ptr + pair, tokens)
            if HAS_CHUNKS:
                chunk = tl.arange(0, CHUNKS_PAD)
                tl.store(chunk_counts_ptr + pair * num_chunks + chunk, 0, chunk < num_chunks)
            if length <= 0:
                out_group_ptr = out_ptr + row64 * stride_out_row + head_kv * G * stride_out_head
                zero_group(out_group_ptr, stride_out_head, G, G_ROWS, DV, DV_PAD)
            elif HAS_TOKEN:
                write_token(
                    new_keys_ptr + row64 * stride_new_key_row + head_kv * D,
                    new_values_ptr + row64 * stride_new_value_row + head_kv * DV,
                    keys_ptr + head_kv * stride_key_head,
                    values_ptr + head_kv * stride_value_head,
                    page_ids_ptr + row64 * stride_page_ids,
                    length,
                    KEY_STRIDE,
                    VALUE_STRIDE,
                    PS,
                    D,
                    D_PAD,
                    DV,
                    DV_PAD,
                )
            if HAS_CODES and is_sparse:
                store_digits(
                    q_group_ptr,
                    q_codes_ptr + pair64 * G * 2 * D,
                    q_scale_sum_ptr + pair64 * G * 2,
                    stride_q_head,
                    G,
                    G_ROWS,
                    D // 2,
                    HALF_PAD,
                )
        else:
            choose_in_strata(
                q_group_ptr,
                min_max_ptr,
                page_ids_ptr + row64 * stride_page_ids,
                rank_keys_ptr + pair64 * stride_rank_keys,
                middles_ptr + pair64 * stride_middles,
                candidate_page_ids_ptr + pair64 * width,
                positions_ptr + pair64 * width,
                head_kv,
                length,
                pages,
                count,
                strata,
                (turn - 1) * STRATA,
                stride_q_head,
                CENTRED,
                SLACK,
                SCORE,
                SINK,
                RECENT,
                PS,
                HK,
                G,
                G_ROWS,
                SCORE_ROWS,
                D,
                D_PAD,
                STRATA,
                SCORE_PAGES,
                SCORE_STAGES,
                RANK_PAGES,
                RANK_OTHERS,
            )


def select_options(
    q: torch.Tensor,
    min_max: torch.Tensor,
    middles: torch.Tensor | None,
    *,
    page_size: int,
    sink_tokens: int,
    recent_tokens: int,
    slack: float,
) -> dict[str, object]:
    """What kernels with `choose_in_strata` in them are compiled for."""
    dim, heads_kv = q.shape[2], min_max.shape[1]
    group = q.shape[1] // heads_kv
    return {
        "CENTRED": middles is not None,
        "SLACK": slack,
        "SCORE": score_dtype(q.dtype, min_max.dtype),
        "SINK": sink_tokens,
        "RECENT": max(recent_tokens, 1),
        "PS": page_size,
        "HK": heads_kv,
        "G": group,
        "G_ROWS": triton.next_power_of_2(group),
        "SCORE_ROWS": product_rows(group, middles is not None),
        "D": dim,
        "D_PAD": triton.next_power_of_2(dim),
        "RANK_PAGES": 16 if is_interpreted() else STRATUM_PAGES,
    }


class Tiling(NamedTuple):
    """How work is laid over programs; what it finds is the same."""

    strata: int  # of a program
    score_pages: int
    stages: int
    rank_others: int
    warps: int
    programs: int  # an SM
    max_registers: int | None = None


def _tiling(pages: int, page_bytes: int) -> Tiling:
    if is_interpreted():
        return Tiling(2, 16, 1, 16, 4, 1)
    if page_bytes > 256:  # bounds of 16 bits, or many channels
        return Tiling(2, 64 if page_bytes <= 512 else 32, 3, 16, 4, 4)
    if pages < 65536:
        return Tiling(2, 128, 3, 32, 4, 4)
    if page_bytes > 128 and pages < 262144:
        return Tiling(1, 64, 3, 8, 2, 8)
    return Tiling(2, 64, 3, 8, 2, 8, 128)


def select_pages(
    q: torch.Tensor,
    min_max: torch.Tensor,
    page_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    sparse: torch.Tensor,
    budgets: torch.Tensor,
    rank_keys: torch.Tensor,
    middles: torch.Tensor | None,
    candidate_page_ids: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    candidate_tokens: torch.Tensor,
    kept_tokens: torch.Tensor,
    q_codes: torch.Tensor | None,
    q_scale_sum: torch.Tensor | None,
    chunk_counts: torch.Tensor | None,
    out: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    token: Token | None,
    *,
    page_size: int,
    sink_tokens: int,
    recent_tokens: int,
    slack: float = 1.0,
) -> None:
    """Pick each KV head's best pages, as `reference.select_pages`, and prepare the row.

    Full pages are scored by their bounds, see `page_score.reference.page_scores`; scores of a
    stratum nearer to each other than 2**-17 of themselves may count as equal (less near where it
    has more than STRATUM_PAGES pages), and of equal ones the earlier page goes first. The kernel
    also quantizes the group's queries for the INT4 estimate, writes the step's new keys and values
    into the cache, and zeroes the output of padded rows, which no later kernel looks at.

    Args:
        q: [B, HQ, D], last dimension contiguous.
        min_max: [P, HK, 2, D] page bounds of one layer, in the dtype of the keys or float8.
        page_ids: [B, T] int32; seq_lens: [B] int32; sparse: [B] bool: see `DecodePlan`.
        budgets: [T + 1] int32 from `budget_table`.
        rank_keys: [B, HK, T] int32, written: what pages are ranked by, in the order of their
            strata; the rest keeps what it held.
        middles: [B, HK, T, G_ROWS] float32, G_ROWS being the next power of two of G: written for
            full pages by logical page, the unscaled product of the group's query head g with the
            middle of the page's bounds in column g; None for estimators other than `int4_centred`.
        candidate_page_ids: [B, HK, C] int32, written: the candidates' physical pages by stratum,
            in ascending order in each; the rest keeps what it held. positions: [B, HK, C] int32,
            written: the same candidates' logical pages.
        counts: [B, HK] int32, written: candidate pages; 0 for rows that are not sparse.
        candidate_tokens: [B, HK] int32, written: tokens of them; all tokens of a row that is
            not sparse.
        kept_tokens: [B, HK] int32, written: the same; pruning then overwrites sparse rows'.
        q_codes: [B, HQ, 2, D] int8 and q_scale_sum: [B, HQ, 2] float32, written for sparse rows,
            see `store_digits`; None for the `exact` estimator.
        chunk_counts: [B, HK, chunks] int32, zeroed for `unite_kept`; None without pruning.
        out: [B, HQ, DV], zeroed for rows of length 0.
        key_cache: [P, PS, HK, D], value_cache: [P, PS, HK, DV]; written with a token.
        token: each row's newest key and value, see `Token`; None where the cache holds them.
        page_size: PS, tokens; slack: see `page_score.reference.page_scores`, compiled in.
    """
    batch = q.shape[0]
    tiling = _tiling(
        batch * min_max.shape[1] * page_ids.shape[1], 2 * q.shape[2] * min_max.element_size()
    )
    num_chunks = 1 if chunk_counts is None else chunk_counts.shape[-1]
    launch(_select_kernel, grid_programs(q.device, tiling.programs))(
        q,
        min_max,
        page_ids,
        seq_lens,
        sparse,
        budgets,
        rank_keys,
        rank_keys if middles is None else middles,
        candidate_page_ids,
        positions,
        counts,
        candidate_tokens,
        kept_tokens,
        q if q_codes is None else q_codes,
        q if q_scale_sum is None else q_scale_sum,
        counts if chunk_counts is None else chunk_counts,
        out,
        *(token or (q, q)),
        key_cache,
        value_cache,
        batch,
        candidate_page_ids.shape[-1],
        num_chunks,
        rank_keys.stride(1),
        0 if middles is None else middles.stride(1),
        page_ids.stride(0),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        *token_strides(token),
        key_cache.stride(2),
        value_cache.stride(2),
        HAS_TOKEN=token is not None,
        KEY_STRIDE=key_cache.stride(1),
        VALUE_STRIDE=value_cache.stride(1),
        HAS_CODES=q_codes is not None,
        HAS_CHUNKS=chunk_counts is not None,
        HALF_PAD=triton.next_power_of_2(q.shape[2] // 2),
        DV=out.shape[-1],
        DV_PAD=triton.next_power_of_2(out.shape[-1]),
        BATCH_PAD=triton.next_power_of_2(batch),
        CHUNKS_PAD=triton.next_power_of_2(num_chunks),
        STRATA=tiling.strata,
        SCORE_PAGES=tiling.score_pages,
        SCORE_STAGES=tiling.stages,
        RANK_OTHERS=tiling.rank_others,
        **select_options(
            q,
            min_max,
            middles,
            page_size=page_size,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
            slack=slack,
        ),
        **launch_options(tiling.warps, max_registers=tiling.max_registers),
    )
