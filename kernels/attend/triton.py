"""Exact attention over kept tokens in Triton.

Every (request, KV head) has a number of tokens and a way to find their slots: a packed list after
pruning, candidate pages without it, the page table for rows that are not sparse. The tokens of all,
one after another, are cut into as many equal parts as there are programs. So a program attends to
the end of one list, some whole ones, and the beginning of another; whoever is last to finish with a
list that several have a part of merges their partial results. Behind each list comes a gap of no
tokens, which counts for the time that beginning a list takes: else the programs with many short
lists would be late.
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
    launch,
    launch_options,
    wait_for_inputs,
)

MOST_PROGRAMS = 8  # an SM, of any kernel that writes partial results
_PROGRAMS = 4
_FEW_PAIRS = 8


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
    stride_key_head,
    stride_value_head,
    stride_out_row,
    stride_out_head,
    sm_scale,
    logit_cap,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
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
    SPLIT_BLOCK: tl.constexpr,
    LEAST: tl.constexpr,
    GAP: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    every = tl.arange(0, PAIRS_PAD)
    kept = tl.load(kept_tokens_ptr + every, every < pairs, other=0)
    ends = tl.cumsum(tl.where(kept > 0, kept + GAP, 0), 0)
    total = tl.max(ends, 0)
    share = (total + tl.num_programs(0) - 1) // tl.num_programs(0)
    share = tl.maximum((share + TILE - 1) // TILE * TILE, LEAST)
    program = tl.program_id(0)
    place = program * share
    last = tl.minimum(place + share, total)
    place = tl.max(tl.where((ends - GAP <= place) & (place < ends), ends, place), 0)
    while place < last:
        before = ends <= place
        pair = tl.sum(before.to(tl.int32), 0)
        first = tl.max(tl.where(before, ends, 0), 0)
        row64 = (pair // HK).to(tl.int64)
        head_kv = pair % HK
        tokens = tl.load(kept_tokens_ptr + pair)
        is_sparse = tl.load(sparse_ptr + row64) != 0
        by_token = LISTS_TOKENS & is_sparse
        start = place - first
        end = tl.minimum(tokens, last - first)
        place = first + tokens + GAP
        list_ptr = lists_ptr + pair.to(tl.int64) * stride_list
        if not is_sparse:
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
            sm_scale,
            logit_cap,
            KEY_STRIDE,
            VALUE_STRIDE,
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
        if (start == 0) & (end == tokens):
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
                program * 2 + (start == 0).to(tl.int32),
                most,
                sums,
                acc,
                G,
                G_ROWS,
                G_PAD,
                DV,
                DV_PAD,
            )
            first_program = first // share
            splits = (first + tokens - 1) // share - first_program + 1
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel")
            if arrived == splits - 1:
                tl.debug_barrier()
                merge_partials(
                    partial_ptr,
                    partial_stats_ptr,
                    group_sinks_ptr,
                    out_group_ptr,
                    first_program,
                    splits,
                    stride_out_head,
                    LOG2E,
                    HAS_SINKS,
                    SPLIT_BLOCK,
                    G,
                    G_ROWS,
                    DV,
                    DV_PAD,
                )
                tl.store(arrivals_ptr + pair, 0)


class AttendWorkspace:
    """Memory of `attend`, `attend_rows` and `decode_layer` that outlives a call.

    Attributes:
        partial: float32 partial outputs, [programs, 2, G, DV] with G and DV padded to powers of
            two; partial_stats: float32 [programs, 2, 2, G], largest logit and sum.
        arrivals: [B, HK] int32 programs that have finished with each; 0 between calls.
    """

    def __init__(
        self, max_batch: int, heads_q: int, heads_kv: int, dim_v: int, device: torch.device
    ) -> None:
        rows = triton.next_power_of_2(heads_q // heads_kv)
        partials = 2 * grid_programs(device, MOST_PROGRAMS)
        padded = triton.next_power_of_2(dim_v)
        self.partial = torch.empty(partials * rows * padded, dtype=torch.float32, device=device)
        self.partial_stats = torch.empty(partials * 2 * rows, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(max_batch * heads_kv, dtype=torch.int32, device=device)


def _tiling(bytes_per_token: int, pairs: int) -> tuple[int, int, int, int, int, int]:
    """Least tokens of a program, gap, tokens of a tile, stages, warps, programs an SM."""
    if is_interpreted():
        return 16, 16, 16, 1, 4, 1
    if bytes_per_token > 512:
        return 128, 0, 32, 1, 2, _PROGRAMS
    if bytes_per_token > 256 and pairs <= _FEW_PAIRS:
        return 128, 0, 128, 1, 4, 2  # one tile, and fewer to merge
    if bytes_per_token > 256:
        return 128, 128, 64, 3, 2, _PROGRAMS
    return 128, 192, 64, 5, 2, _PROGRAMS


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
    token_bytes = (dim + dim_v) * key_cache.element_size()
    least, gap, tile, stages, warps, programs = _tiling(token_bytes, batch * heads_kv)
    launch(_attend_kernel, grid_programs(q.device, programs))(
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
        key_cache.stride(2),
        value_cache.stride(2),
        out.stride(0),
        out.stride(1),
        sm_scale,
        logit_cap,
        KEY_STRIDE=key_cache.stride(1),
        VALUE_STRIDE=value_cache.stride(1),
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
        SPLIT_BLOCK=max(1, warps * 4096 // (rows * dim_v_pad)),
        LEAST=least,
        GAP=gap,
        TILE=tile,
        STAGES=stages,
        **launch_options(warps),
    )
