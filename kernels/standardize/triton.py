"""Standard scores of pages in Triton, between `page_scores` by head and `select_pages`."""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.launch import is_interpreted, launch_options, wait_for_inputs


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _standardize_kernel(
    head_scores_ptr,
    seq_lens_ptr,
    sparse_ptr,
    scores_ptr,
    stride_head_scores,
    stride_scores,
    HK: tl.constexpr,
    G: tl.constexpr,
    PS: tl.constexpr,
    COLUMNS_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    pair = tl.program_id(0).to(tl.int64)
    length = tl.load(seq_lens_ptr + pair // HK)
    is_sparse = tl.load(sparse_ptr + pair // HK) != 0
    if is_sparse & (length > 0):
        infinity = float("inf")
        column = tl.arange(0, COLUMNS_PAD)
        full = column < (length - 1) // PS
        best = tl.full([COLUMNS_PAD], -infinity, tl.float32)
        for member in tl.static_range(G):
            row_ptr = head_scores_ptr + (pair * G + member) * stride_head_scores
            score = tl.load(row_ptr + column, full, other=0.0, cache_modifier=".cg")
            counted = full & (tl.abs(score) < infinity)  # not NaN either
            number, total = tl.reduce(
                (counted.to(tl.float32), tl.where(counted, score, 0.0)), 0, _add2
            )
            number = tl.maximum(number, 1.0)
            off = tl.where(counted, score - total / number, 0.0)
            deviation = tl.sqrt(tl.sum(off * off, 0) / number)
            standard = off / tl.where(deviation > 0, deviation, 1.0)
            score = tl.where(score == score, score, -infinity)
            best = tl.maximum(best, tl.where(counted, standard, score))
        tl.store(scores_ptr + pair * stride_scores + column, best, full)


def _warps(columns_pad: int) -> int:
    if is_interpreted():
        return 4
    return 16 if columns_pad > 4096 else 8 if columns_pad > 1024 else 4


def standardize_scores(
    head_scores: torch.Tensor,
    seq_lens: torch.Tensor,
    sparse: torch.Tensor,
    scores: torch.Tensor,
    *,
    page_size: int,
) -> None:
    """What `reference.standardize_scores` says of each full page of sparse rows.

    Args:
        head_scores: [B, HQ, T] float32 from `page_scores`.
        seq_lens: [B] int32; sparse: [B] bool: see `DecodePlan`.
        scores: [B, HK, T] float32, written for the full pages; the rest keeps what it held.
        page_size: PS, tokens.
    """
    batch, heads_kv, columns = scores.shape
    columns_pad = max(16, triton.next_power_of_2(columns))
    _standardize_kernel[(batch * heads_kv,)](
        head_scores,
        seq_lens,
        sparse,
        scores,
        head_scores.stride(1),
        scores.stride(1),
        HK=heads_kv,
        G=head_scores.shape[1] // heads_kv,
        PS=page_size,
        COLUMNS_PAD=columns_pad,
        **launch_options(_warps(columns_pad)),
    )
