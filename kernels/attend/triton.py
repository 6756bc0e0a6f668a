"""Exact attention over kept tokens in Triton.

Work is laid out by candidate tokens, not by kept ones: a work item is a slice of a request's
candidates for one KV head. It unions the group's kept tokens, packs their slots into a scratch of
its own, attends to those, and the last item of a (request, KV head) merges the partial results.
Rows that are not sparse take the same path with every token kept.
"""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.launch import (
    compute_dtype,
    grid_programs,
    is_interpreted,
    locate_block,
    soft_cap_logits,
)

CHUNK_TOKENS = 1024
_TILE_TOKENS = 64
_PROGRAMS_PER_MULTIPROCESSOR = 4
_LOG2E = 1.4426950408889634


@triton.jit
def _merge(
    partial_ptr,
    partial_stats_ptr,
    out_ptr,
    pair,
    splits,
    stride_out_head,
    SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    G: tl.constexpr,
    G_ROWS: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """Combine the partial results of one (request, KV head), always in the same order."""
    split = tl.arange(0, SPLITS)
    head = tl.arange(0, G_ROWS)
    stats_ptr = partial_stats_ptr + (pair * SPLITS + split)[:, None] * (2 * G_ROWS) + head[None, :]
    there = (split < splits)[:, None] & (head < G)[None, :]
    most = tl.load(stats_ptr, there, other=-float("inf"), cache_modifier=".cg")  # [SPLITS, G_ROWS]
    sums = tl.load(stats_ptr + G_ROWS, there, other=0.0, cache_modifier=".cg")
    top = tl.max(most, 0)
    top = tl.where(head < G, top, 0.0)
    total = tl.sum(tl.exp2(most - top[None, :]) * sums, 0)
    channel = tl.arange(0, DV_PAD)
    out = tl.zeros([G_ROWS, DV_PAD], tl.float32)
    for start in range(0, splits, SPLIT_BLOCK):
        part = start + tl.arange(0, SPLIT_BLOCK)
        part_stats = partial_stats_ptr + (pair * SPLITS + part)[:, None] * (2 * G_ROWS)
        part_there = (part < splits)[:, None] & (head < G)[None, :]
        weight = tl.load(
            part_stats + head[None, :], part_there, other=-float("inf"), cache_modifier=".cg"
        )
        weight = tl.exp2(weight - top[None, :])  # [SPLIT_BLOCK, G_ROWS]
        values_ptr = partial_ptr + (pair * SPLITS + part)[:, None, None] * (G_ROWS * DV_PAD)
        values_ptr += head[None, :, None] * DV_PAD + channel[None, None, :]
        values = tl.load(
            values_ptr,
            part_there[:, :, None] & (channel[None, None, :] < DV),
            other=0.0,
            cache_modifier=".cg",
        )
        out += tl.sum(values * weight[:, :, None], 0)
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    inside = (head[:, None] < G) & (channel[None, :] < DV)
    out_offset = head[:, None] * stride_out_head + channel[None, :]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _attend_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    page_ids_ptr,
    seq_lens_ptr,
    sparse_ptr,
    positions_ptr,
    candidate_page_ids_ptr,
    counts_ptr,
    candidate_tokens_ptr,
    logits_ptr,
    thresholds_ptr,
    kept_tokens_ptr,
    scratch_ptr,
    partial_ptr,
    partial_stats_ptr,
    arrivals_ptr,
    out_ptr,
    batch,
    width,
    stride_page_ids,
    stride_q_row,
    stride_q_head,
    stride_key_slot,
    stride_key_head,
    stride_value_slot,
    stride_value_head,
    stride_out_row,
    stride_out_head,
    sm_scale,
    logit_cap,
    LOG2E: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRUNE: tl.constexpr,
    SINK: tl.constexpr,
    RECENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    HK: tl.constexpr,
    G: tl.constexpr,
    G_ROWS: tl.constexpr,
    G_PAD: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    PS: tl.constexpr,
    BATCH_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.arange(0, BATCH_PAD)
    # A row's tokens to look at; every head of a row has as many.
    row_tokens = tl.load(candidate_tokens_ptr + rows * HK, rows < batch, other=0)
    row_chunks = (row_tokens + CHUNK - 1) // CHUNK
    chunks_per_split = tl.maximum((row_chunks + SPLITS - 1) // SPLITS, 1)
    row_splits = (row_chunks + chunks_per_split - 1) // chunks_per_split
    row_ends = tl.cumsum(row_splits, 0)
    head = tl.arange(0, G_PAD)
    few_heads = tl.arange(0, G_ROWS)
    channel = tl.arange(0, D_PAD)
    value_channel = tl.arange(0, DV_PAD)
    chunk_token = tl.arange(0, CHUNK)
    tile_token = tl.arange(0, TILE)
    slots_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * CHUNK
    for item in range(tl.program_id(0), tl.sum(row_splits, 0) * HK, tl.num_programs(0)):
        row, head_kv, split = locate_block(item, row_splits, row_ends, HK)
        row64 = row.to(tl.int64)
        pair = row64 * HK + head_kv
        tokens = tl.load(candidate_tokens_ptr + pair)
        length = tl.load(seq_lens_ptr + row)
        is_sparse = tl.load(sparse_ptr + row) != 0
        chunks = (tokens + CHUNK - 1) // CHUNK
        per_split = (chunks + SPLITS - 1) // SPLITS
        splits = (chunks + per_split - 1) // per_split
        start = split * per_split * CHUNK
        end = tl.minimum(start + per_split * CHUNK, tokens)
        q = tl.load(
            q_ptr
            + row64 * stride_q_row
            + (head_kv * G + head)[:, None] * stride_q_head
            + channel[None, :],
            (head[:, None] < G) & (channel[None, :] < D),
            other=0.0,
        ).to(COMPUTE)
        most = tl.full([G_PAD], -float("inf"), tl.float32)
        sums = tl.zeros([G_PAD], tl.float32)
        acc = tl.zeros([G_PAD, DV_PAD], tl.float32)
        kept_here = 0
        for first in range(start, end, CHUNK):
            token = first + chunk_token
            inside = token < end
            if is_sparse:
                place = pair * width + token // PS
                page = tl.load(candidate_page_ids_ptr + place, inside, other=0)
                if PRUNE:
                    position = tl.load(positions_ptr + place, inside, other=0) * PS + token % PS
                    open_from = (length - 1) // PS * PS
                    keep_from = tl.minimum(open_from, length - RECENT)
                    keep = (position < SINK) | (position >= keep_from)
                    threshold = tl.load(
                        thresholds_ptr + pair * G + few_heads,
                        few_heads < G,
                        other=float("inf"),
                    )
                    logit_ptr = logits_ptr + (pair * G + few_heads)[:, None] * (width * PS)
                    logit = tl.load(
                        logit_ptr + token[None, :],
                        (few_heads < G)[:, None] & inside[None, :],
                        other=-float("inf"),
                    ).to(tl.float32)
                    over = (logit >= threshold[:, None]).to(tl.int32)
                    keep = (keep | (tl.max(over, 0) != 0)) & inside
                else:
                    keep = inside
            else:
                page = tl.load(
                    page_ids_ptr + row64 * stride_page_ids + token // PS, inside, other=0
                )
                keep = inside
            packed = keep.to(tl.int32)
            kept = tl.sum(packed, 0)
            tl.store(slots_ptr + tl.cumsum(packed, 0) - 1, page * PS + token % PS, keep)
            tl.debug_barrier()
            kept_here += kept
            for tile in range(0, kept, TILE):
                valid = tile + tile_token < kept
                slot = tl.load(slots_ptr + tile + tile_token, valid, other=0).to(tl.int64)
                keys = tl.load(
                    keys_ptr
                    + head_kv * stride_key_head
                    + slot[:, None] * stride_key_slot
                    + channel[None, :],
                    valid[:, None] & (channel[None, :] < D),
                    other=0.0,
                ).to(COMPUTE)
                values = tl.load(
                    values_ptr
                    + head_kv * stride_value_head
                    + slot[:, None] * stride_value_slot
                    + value_channel[None, :],
                    valid[:, None] & (value_channel[None, :] < DV),
                    other=0.0,
                ).to(COMPUTE)
                scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * sm_scale
                scores = soft_cap_logits(scores, logit_cap, HAS_CAP) * LOG2E
                scores = tl.where(valid[None, :], scores, -float("inf"))
                new_most = tl.maximum(most, tl.max(scores, 1))
                weights = tl.exp2(scores - new_most[:, None])
                shrink = tl.exp2(most - new_most)
                sums = sums * shrink + tl.sum(weights, 1)
                acc = acc * shrink[:, None]
                acc = tl.dot(weights.to(COMPUTE), values, acc, input_precision="ieee")
                most = new_most
            tl.debug_barrier()
        if PRUNE:
            tl.atomic_add(kept_tokens_ptr + pair, kept_here, is_sparse, sem="relaxed")
        inside_out = (head[:, None] < G) & (value_channel[None, :] < DV)
        out_group_ptr = out_ptr + row64 * stride_out_row + head_kv * G * stride_out_head
        if splits == 1:
            result = acc / tl.where(sums > 0, sums, 1.0)[:, None]
            out_offset = head[:, None] * stride_out_head + value_channel[None, :]
            result = result.to(out_ptr.dtype.element_ty)
            tl.store(out_group_ptr + out_offset, result, inside_out)
        else:
            part = pair * SPLITS + split
            offset = head[:, None] * DV_PAD + value_channel[None, :]
            tl.store(partial_ptr + part * (G_ROWS * DV_PAD) + offset, acc, inside_out)
            stats_ptr = partial_stats_ptr + part * (2 * G_ROWS) + head
            tl.store(stats_ptr, most, head < G)
            tl.store(stats_ptr + G_ROWS, sums, head < G)
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel")
            if arrived == splits - 1:
                tl.debug_barrier()
                _merge(
                    partial_ptr,
                    partial_stats_ptr,
                    out_group_ptr,
                    pair,
                    splits,
                    stride_out_head,
                    SPLITS,
                    SPLIT_BLOCK,
                    G,
                    G_ROWS,
                    DV,
                    DV_PAD,
                )
                tl.store(arrivals_ptr + pair, 0)


def max_splits(batch: int, heads_kv: int) -> int:
    """Slices into which one (request, KV head) may be cut; a power of two."""
    wanted = triton.cdiv(2048, batch * heads_kv)
    return min(128, max(8, triton.next_power_of_2(wanted)))


class AttendWorkspace:
    """Memory of `attend` that outlives a call.

    Attributes:
        scratch: [programs, CHUNK_TOKENS] int32 packed token slots of each running program.
        partial: float32 partial outputs, [B, HK, splits, G, DV] with G and DV padded to powers
            of two; partial_stats: float32 [B, HK, splits, 2, G], largest logit and sum.
        arrivals: [B, HK] int32 finished slices; 0 between calls.
    """

    def __init__(
        self, max_batch: int, heads_q: int, heads_kv: int, dim_v: int, device: torch.device
    ) -> None:
        rows = triton.next_power_of_2(heads_q // heads_kv)
        slices = max(b * max_splits(b, heads_kv) for b in range(1, max_batch + 1)) * heads_kv
        programs = grid_programs(device, _PROGRAMS_PER_MULTIPROCESSOR)
        padded = triton.next_power_of_2(dim_v)
        self.scratch = torch.zeros(programs, CHUNK_TOKENS, dtype=torch.int32, device=device)
        self.partial = torch.empty(slices * rows * padded, dtype=torch.float32, device=device)
        self.partial_stats = torch.empty(slices * 2 * rows, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(max_batch * heads_kv, dtype=torch.int32, device=device)


def attend(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    sparse: torch.Tensor,
    positions: torch.Tensor,
    candidate_page_ids: torch.Tensor,
    counts: torch.Tensor,
    candidate_tokens: torch.Tensor,
    logits: torch.Tensor | None,
    thresholds: torch.Tensor | None,
    kept_tokens: torch.Tensor,
    workspace: AttendWorkspace,
    out: torch.Tensor,
    *,
    sink_tokens: int,
    recent_tokens: int,
    sm_scale: float,
    logit_cap: float = 0.0,
) -> None:
    """Softmax attention of one query token over the union of each group's kept tokens.

    Sink, recent and open tokens are kept whatever their logit. The result of a run does not
    depend on the order in which programs finish.

    Args:
        q: [B, HQ, D]; key_cache: [P, PS, HK, D]; value_cache: [P, PS, HK, DV].
        page_ids, seq_lens, sparse: see `DecodePlan`.
        positions, candidate_page_ids, counts, candidate_tokens: from `select_pages`.
        logits, thresholds: from `estimate_logits` and `top_p_thresholds`; both None to attend
            to every candidate.
        kept_tokens: [B, HK] int32, increased by the tokens kept of sparse rows when pruning.
        out: [B, HQ, DV], written for rows with tokens.
    """
    batch, heads_q, dim = q.shape
    page_size, heads_kv, dim_v = value_cache.shape[1:]
    group = heads_q // heads_kv
    rows = triton.next_power_of_2(group)
    dim_v_pad = triton.next_power_of_2(dim_v)
    splits = max_splits(batch, heads_kv)
    _attend_kernel[(workspace.scratch.shape[0],)](
        q,
        key_cache,
        value_cache,
        page_ids,
        seq_lens,
        sparse,
        positions,
        candidate_page_ids,
        counts,
        candidate_tokens,
        logits,
        thresholds,
        kept_tokens,
        workspace.scratch,
        workspace.partial,
        workspace.partial_stats,
        workspace.arrivals,
        out,
        batch,
        candidate_page_ids.shape[-1],
        page_ids.stride(0),
        q.stride(0),
        q.stride(1),
        key_cache.stride(1),
        key_cache.stride(2),
        value_cache.stride(1),
        value_cache.stride(2),
        out.stride(0),
        out.stride(1),
        sm_scale,
        logit_cap,
        LOG2E=_LOG2E,
        HAS_CAP=logit_cap != 0,
        PRUNE=logits is not None,
        SINK=sink_tokens,
        RECENT=recent_tokens,
        COMPUTE=compute_dtype(q.dtype),
        HK=heads_kv,
        G=group,
        G_ROWS=rows,
        G_PAD=max(16, rows),
        D=dim,
        D_PAD=triton.next_power_of_2(dim),
        DV=dim_v,
        DV_PAD=dim_v_pad,
        PS=page_size,
        BATCH_PAD=triton.next_power_of_2(batch),
        SPLITS=splits,
        SPLIT_BLOCK=min(splits, max(1, 8192 // (rows * dim_v_pad))),
        CHUNK=64 if is_interpreted() else CHUNK_TOKENS,
        TILE=16 if is_interpreted() else _TILE_TOKENS,
        num_warps=4,
        num_stages=2,
    )
