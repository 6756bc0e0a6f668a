"""Exact attention over kept tokens in Triton.

Every (request, KV head) has a number of tokens and a way to find their slots: a packed list after
pruning, candidate pages without it, the page table for rows that are not sparse. The tokens of all
are cut into slices of about equal size and dealt to a fixed grid; the last slice of a (request, KV
head) to finish merges the partial results.
"""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.attend.parts import (
    LOG2E,
    attend_span,
    merge_partials,
    store_group,
    store_partial,
)
from twilight_sgl.kernels.launch import (
    compute_dtype,
    grid_programs,
    is_interpreted,
    launch_options,
    wait_for_inputs,
)


@triton.jit
def _slice_tokens(tokens, ITEM: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Tokens of one slice: ITEM, or more where that would give over SPLITS slices."""
    least = (tokens + SPLITS - 1) // SPLITS
    return tl.maximum((least + TILE - 1) // TILE * TILE, ITEM)


@triton.jit
def _attend_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    page_ids_ptr,
    sparse_ptr,
    lists_ptr,
    kept_tokens_ptr,
    partial_ptr,
    partial_stats_ptr,
    arrivals_ptr,
    sinks_ptr,
    out_ptr,
    pairs,
    stride_list,
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
    HAS_SINKS: tl.constexpr,
    LISTS_TOKENS: tl.constexpr,
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
    PAIRS_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    ITEM: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    every = tl.arange(0, PAIRS_PAD)
    all_tokens = tl.load(kept_tokens_ptr + every, every < pairs, other=0)
    slices = _slice_tokens(all_tokens, ITEM, SPLITS, TILE)
    slices = (all_tokens + slices - 1) // slices
    ends = tl.cumsum(slices, 0)
    for item in range(tl.program_id(0), tl.sum(slices, 0), tl.num_programs(0)):
        before = ends <= item
        pair = tl.sum(before.to(tl.int32), 0)
        split = item - tl.sum(tl.where(before, slices, 0), 0)
        row64 = (pair // HK).to(tl.int64)
        head_kv = pair % HK
        tokens = tl.load(kept_tokens_ptr + pair)
        by_token = LISTS_TOKENS & (tl.load(sparse_ptr + row64) != 0)
        per_slice = _slice_tokens(tokens, ITEM, SPLITS, TILE)
        splits = (tokens + per_slice - 1) // per_slice
        start = split * per_slice
        end = tl.minimum(start + per_slice, tokens)
        pair = pair.to(tl.int64)
        list_ptr = lists_ptr + pair * stride_list
        if tl.load(sparse_ptr + row64) == 0:
            list_ptr = page_ids_ptr + row64 * stride_page_ids
        most, sums, acc = attend_span(
            q_ptr + row64 * stride_q_row + head_kv * G * stride_q_head,
            keys_ptr + head_kv * stride_key_head,
            values_ptr + head_kv * stride_value_head,
            list_ptr,
            start,
            end,
            by_token,
            stride_q_head,
            stride_key_slot,
            stride_value_slot,
            sm_scale,
            logit_cap,
            LOG2E,
            HAS_CAP,
            COMPUTE,
            G,
            G_PAD,
            D,
            D_PAD,
            DV,
            DV_PAD,
            PS,
            TILE,
            STAGES,
        )
        out_group_ptr = out_ptr + row64 * stride_out_row + head_kv * G * stride_out_head
        group_sinks_ptr = sinks_ptr + head_kv * G
        if splits == 1:
            store_group(
                out_group_ptr,
                group_sinks_ptr,
                most,
                sums,
                acc,
                stride_out_head,
                LOG2E,
                HAS_SINKS,
                G,
                G_PAD,
                DV,
                DV_PAD,
            )
        else:
            store_partial(
                partial_ptr,
                partial_stats_ptr,
                pair * SPLITS + split,
                most,
                sums,
                acc,
                G,
                G_ROWS,
                G_PAD,
                DV,
                DV_PAD,
            )
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel")
            if arrived == splits - 1:
                tl.debug_barrier()
                merge_partials(
                    partial_ptr,
                    partial_stats_ptr,
                    group_sinks_ptr,
                    out_group_ptr,
                    pair * SPLITS,
                    splits,
                    stride_out_head,
                    LOG2E,
                    HAS_SINKS,
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
    return min(128, max(16, triton.next_power_of_2(wanted)))


class AttendWorkspace:
    """Memory of `attend` that outlives a call.

    Attributes:
        partial: float32 partial outputs, [B, HK, splits, G, DV] with G and DV padded to powers
            of two; partial_stats: float32 [B, HK, splits, 2, G], largest logit and sum.
        arrivals: [B, HK] int32 finished slices; 0 between calls.
    """

    def __init__(
        self, max_batch: int, heads_q: int, heads_kv: int, dim_v: int, device: torch.device
    ) -> None:
        rows = triton.next_power_of_2(heads_q // heads_kv)
        slices = max(b * max_splits(b, heads_kv) for b in range(1, max_batch + 1)) * heads_kv
        slices = max(slices, grid_programs(device, 2))  # of the one-launch pipeline
        padded = triton.next_power_of_2(dim_v)
        self.partial = torch.empty(slices * rows * padded, dtype=torch.float32, device=device)
        self.partial_stats = torch.empty(slices * 2 * rows, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(max_batch * heads_kv, dtype=torch.int32, device=device)


def _tiling(pairs: int, columns: int, bytes_per_token: int) -> tuple[int, int, int, int, int]:
    """Tokens of a slice and of a tile, pipeline stages, warps, programs an SM."""
    if is_interpreted():
        return 32, 16, 1, 4, 1
    tile = 64 if bytes_per_token <= 512 else 32
    if pairs < 128 and columns < 4096:
        return (64 if pairs < 32 else 128), tile, 1, 2, 4
    if pairs < 32:
        return 128, tile, 1, 2, 4
    return (512 if columns < 4096 else 1024), tile, 5, 4, (4 if columns < 4096 else 3)


def attend(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_ids: torch.Tensor,
    sparse: torch.Tensor,
    lists: torch.Tensor,
    kept_tokens: torch.Tensor,
    workspace: AttendWorkspace,
    out: torch.Tensor,
    *,
    lists_tokens: bool,
    sm_scale: float,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    """Softmax attention of one query token over each (request, KV head)'s tokens.

    The result of a run does not depend on the order in which programs finish.

    Args:
        q: [B, HQ, D]; key_cache: [P, PS, HK, D]; value_cache: [P, PS, HK, DV].
        page_ids: [B, T] int32; sparse: [B] bool: see `DecodePlan`.
        lists: [B, HK, K] int32 of sparse rows: with lists_tokens kept token slots from
            `unite_kept`, else candidate physical pages from `select_pages`. Rows that are not
            sparse use page_ids.
        kept_tokens: [B, HK] int32 tokens to attend to; 0 leaves the output alone.
        out: [B, HQ, DV], written.
        sm_scale, logit_cap: softmax scale and soft cap, 0 for none.
        sinks: [HQ] learned attention sinks, see `reference.attend`; None for none.
    """
    batch, heads_q, dim = q.shape
    page_size, heads_kv, dim_v = value_cache.shape[1:]
    group = heads_q // heads_kv
    rows = triton.next_power_of_2(group)
    dim_v_pad = triton.next_power_of_2(dim_v)
    splits = max_splits(batch, heads_kv)
    pairs = batch * heads_kv
    token_bytes = (dim + dim_v) * key_cache.element_size()
    item, tile, stages, warps, programs = _tiling(pairs, page_ids.shape[1], token_bytes)
    _attend_kernel[(grid_programs(q.device, programs),)](
        q,
        key_cache,
        value_cache,
        page_ids,
        sparse,
        lists,
        kept_tokens,
        workspace.partial,
        workspace.partial_stats,
        workspace.arrivals,
        q if sinks is None else sinks,
        out,
        batch * heads_kv,
        lists.stride(1),
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
        LOG2E=LOG2E,
        HAS_CAP=logit_cap != 0,
        HAS_SINKS=sinks is not None,
        LISTS_TOKENS=lists_tokens,
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
        PAIRS_PAD=triton.next_power_of_2(batch * heads_kv),
        SPLITS=splits,
        SPLIT_BLOCK=min(splits, max(1, 8192 // (rows * dim_v_pad))),
        ITEM=item,
        TILE=tile,
        STAGES=stages,
        **launch_options(warps),
    )
