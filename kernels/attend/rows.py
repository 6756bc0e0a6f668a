"""Exact attention over whole rows in Triton, for layers and steps that do not select.

The rows' tokens are cut into tiles, and the tiles of all (request, KV head)s, one after another,
into as many equal parts as there are programs. The programs that have a part of the same (request,
KV head) wait for each other and share out its query heads to merge the partial results. A row's
newest token is written into the cache by the program that reads it.

Two such kernels must not run at once, as on two streams: programs that wait must all be running.
"""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.attend.parts import (
    LOG2E,
    attend_span,
    merge_together,
    store_group,
    store_partial,
)
from twilight_sgl.kernels.attend.triton import MOST_PROGRAMS, AttendWorkspace
from twilight_sgl.kernels.launch import (
    compute_dtype,
    grid_programs,
    is_interpreted,
    launch,
    launch_options,
    shared_memory,
    wait_for_inputs,
)
from twilight_sgl.kernels.row import Token, token_strides, write_token, zero_group

_FEW_PAIRS = 64
_FEW_WIDE_PAIRS = 256
_SHARED = 166 << 10  # bytes of an SM
_REGISTERS = 64 << 10  # of an SM
_MOST_REGISTERS = 255  # of a thread


@triton.jit
def _attend_rows_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    page_ids_ptr,
    seq_lens_ptr,
    partial_ptr,
    partial_stats_ptr,
    arrivals_ptr,
    sinks_ptr,
    out_ptr,
    new_keys_ptr,
    new_values_ptr,
    rows,
    stride_page_ids,
    stride_q_row,
    stride_q_head,
    stride_key_head,
    stride_value_head,
    stride_out_row,
    stride_out_head,
    stride_new_key_row,
    stride_new_value_row,
    sm_scale,
    logit_cap,
    HAS_TOKEN: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    LOG2E: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
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
    ROWS_PAD: tl.constexpr,
    MERGERS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    GAP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    program = tl.program_id(0)
    every = tl.arange(0, ROWS_PAD)
    lengths = tl.load(seq_lens_ptr + every, every < rows, other=0)
    # Behind each list's tiles are GAP places of none, for the time that beginning a list takes.
    spans = tl.where(lengths > 0, (lengths + TILE - 1) // TILE + GAP, 0)
    ends = tl.cumsum(spans * HK, 0)
    total = tl.max(ends, 0)
    share = tl.maximum((total + tl.num_programs(0) - 1) // tl.num_programs(0), 1)
    place = program * share
    last = tl.minimum(place + share, total)
    tail_pair, tail_split, tail_splits = -1, 0, 1  # of a list that an earlier program began
    head_pair, head_splits = -1, 1  # of a list that this one began and a later one goes on with
    while place < last:
        before = ends <= place
        row = tl.sum(before.to(tl.int32), 0)
        row64 = row.to(tl.int64)
        length = tl.sum(tl.where(every == row, lengths, 0), 0)
        tiles = (length + TILE - 1) // TILE
        behind = place - tl.max(tl.where(before, ends, 0), 0)
        head_kv = behind // (tiles + GAP)
        tile = behind % (tiles + GAP)
        first = place - tile
        until = tl.minimum(last - first, tiles)
        place = first + tiles + GAP
        if tile < tiles:
            end = tl.minimum(until * TILE, length)
            keys_head_ptr = keys_ptr + head_kv * stride_key_head
            values_head_ptr = values_ptr + head_kv * stride_value_head
            row_page_ids_ptr = page_ids_ptr + row64 * stride_page_ids
            if HAS_TOKEN and end == length:
                write_token(
                    new_keys_ptr + row64 * stride_new_key_row + head_kv * D,
                    new_values_ptr + row64 * stride_new_value_row + head_kv * DV,
                    keys_head_ptr,
                    values_head_ptr,
                    row_page_ids_ptr,
                    length,
                    KEY_STRIDE,
                    VALUE_STRIDE,
                    PS,
                    D,
                    D_PAD,
                    DV,
                    DV_PAD,
                )
                tl.debug_barrier()
            most, sums, acc = attend_span(
                q_ptr + row64 * stride_q_row + head_kv * G * stride_q_head,
                keys_head_ptr,
                values_head_ptr,
                row_page_ids_ptr,
                tile * TILE,
                end,
                False,
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
            if (tile == 0) & (until == tiles):
                store_group(
                    out_ptr + row64 * stride_out_row + head_kv * G * stride_out_head,
                    sinks_ptr + head_kv * G,
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
                    program * 2 + (tile == 0).to(tl.int32),
                    most,
                    sums,
                    acc,
                    G,
                    G_ROWS,
                    G_PAD,
                    DV,
                    DV_PAD,
                )
                pair = row * HK + head_kv
                first_program = first // share
                splits = (first + tiles - 1) // share - first_program + 1
                if tile == 0:
                    head_pair, head_splits = pair, splits
                else:
                    tail_pair, tail_split, tail_splits = pair, program - first_program, splits
                tl.debug_barrier()
                tl.atomic_add(arrivals_ptr + pair, 1, sem="release")
    # All of a program's parts are there before it waits for others': nobody waits in a circle.
    for began in tl.static_range(2):
        pair, split, splits = tail_pair, tail_split, tail_splits
        if began:
            pair, split, splits = head_pair, 0, head_splits
        if (pair >= 0) & (split >= splits - MERGERS):
            merge_together(
                partial_ptr,
                partial_stats_ptr,
                sinks_ptr + pair % HK * G,
                out_ptr
                + (pair // HK).to(tl.int64) * stride_out_row
                + pair % HK * G * stride_out_head,
                arrivals_ptr + pair,
                program - split,
                split,
                splits,
                stride_out_head,
                LOG2E,
                HAS_SINKS,
                G,
                G_ROWS,
                DV,
                DV_PAD,
                MERGERS,
                BLOCK,
            )
    for empty in range(program, rows, tl.num_programs(0)):
        if tl.load(seq_lens_ptr + empty) <= 0:
            for head in range(HK):
                zero_group(
                    out_ptr + empty * stride_out_row + head * G * stride_out_head,
                    stride_out_head,
                    G,
                    G_ROWS,
                    DV,
                    DV_PAD,
                )


def _tiling(
    dim: int, itemsize: int, pairs: int, device: torch.device
) -> tuple[int, int, int, int, int]:
    """Tokens of a tile, tiles of a gap, stages, warps, programs an SM.

    Programs that wait for each other must run at the same time: `attend_rows` sees to their
    registers, and their tiles take up to 160 KiB of an SM's shared memory.
    """
    if is_interpreted():
        return 16, 1, 1, 4, 1
    if dim > 128 or itemsize > 2 or shared_memory(device) < _SHARED:
        return 32, 3, 3, 4, 1
    if dim > 64:
        return (64, 3, 3, 4, 3) if pairs <= _FEW_WIDE_PAIRS else (128, 2, 3, 4, 2)
    return (64, 4, 5, 2, 2) if pairs <= _FEW_PAIRS else (32, 3, 5, 1, MOST_PROGRAMS)


def attend_rows(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    workspace: AttendWorkspace,
    out: torch.Tensor,
    token: Token | None = None,
    *,
    sm_scale: float,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    """Softmax attention of one query token over all of its row's tokens.

    The result of a run does not depend on the order in which programs finish.

    Args:
        q: [B, HQ, D]; key_cache: [P, PS, HK, D]; value_cache: [P, PS, HK, DV].
        page_ids, seq_lens: see `DecodePlan`.
        workspace: as for `attend`.
        out: [B, HQ, DV], written; zeros for rows of length 0.
        token: this step's keys [B, HK, D] and values [B, HK, DV], written into the cache first;
            None where it holds them.
        sm_scale, logit_cap, sinks: as for `attend`.
    """
    batch, heads_q, dim = q.shape
    page_size, heads_kv, dim_v = value_cache.shape[1:]
    group = heads_q // heads_kv
    group_rows = triton.next_power_of_2(group)
    dim_v_pad = triton.next_power_of_2(dim_v)
    tile, gap, stages, warps, programs = _tiling(
        max(dim, dim_v), key_cache.element_size(), batch * heads_kv, q.device
    )
    registers = _REGISTERS // (programs * warps * 32) // 8 * 8  # an SM gives them out by eight
    grid = grid_programs(q.device, programs)
    launch(_attend_rows_kernel, grid)(
        q,
        key_cache,
        value_cache,
        page_ids,
        seq_lens,
        workspace.partial,
        workspace.partial_stats,
        workspace.arrivals,
        q if sinks is None else sinks,
        out,
        *(token or (q, q)),
        batch,
        page_ids.stride(0),
        q.stride(0),
        q.stride(1),
        key_cache.stride(2),
        value_cache.stride(2),
        out.stride(0),
        out.stride(1),
        *token_strides(token),
        sm_scale,
        logit_cap,
        HAS_TOKEN=token is not None,
        KEY_STRIDE=key_cache.stride(1),
        VALUE_STRIDE=value_cache.stride(1),
        LOG2E=LOG2E,
        HAS_CAP=logit_cap != 0,
        HAS_SINKS=sinks is not None,
        COMPUTE=compute_dtype(q.dtype),
        HK=heads_kv,
        G=group,
        G_ROWS=group_rows,
        G_PAD=max(16, group_rows),
        D=dim,
        D_PAD=triton.next_power_of_2(dim),
        DV=dim_v,
        DV_PAD=dim_v_pad,
        PS=page_size,
        ROWS_PAD=triton.next_power_of_2(batch),
        MERGERS=1 if is_interpreted() else group,
        BLOCK=max(1, warps * 1024 // dim_v_pad),
        TILE=tile,
        GAP=gap,
        STAGES=stages,
        **launch_options(warps, registers if registers < _MOST_REGISTERS else None),
    )
