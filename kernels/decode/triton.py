"""Score, select, estimate, prune and attend in one launch.

A (request, KV head) is given to `parts` programs, and each of those some of its strata: it finds
their candidates, unites what the heads keep of them, and attends to that. The thresholds and the
merge of the results are dealt out by query head. In between the programs wait for each other. The
reference is `twilight_sgl.attention.pipeline.decode_reference`.

Programs that wait for each other must run at the same time. So the grid never has more of them than
the GPU holds, and two such kernels must not run at once, as on two streams. With one part nobody
waits, and any number of programs may run.
"""

import torch
import triton

from twilight_sgl.kernels.attend.parts import LOG2E
from twilight_sgl.kernels.attend.triton import AttendWorkspace
from twilight_sgl.kernels.decode.program import decode_kernel
from twilight_sgl.kernels.launch import (
    compute_dtype,
    grid_programs,
    is_interpreted,
    launch,
    launch_options,
    shared_memory,
)
from twilight_sgl.kernels.row import Token, token_strides
from twilight_sgl.kernels.select.triton import select_options

MOST_PARTS = 32  # programs that share a (request, KV head)
_FEW_PAIRS = 8
_SHARED_OF_TWO = 166 << 10  # bytes


def _tiling(pairs: int, wide: bool, device: torch.device) -> tuple[int, int]:
    """Warps of a program, and programs that an SM surely holds at once.

    An SM's 64 Ki registers are 255 for each thread of 8 warps, the most the compiler takes. Two
    programs need up to 164 KiB of its shared memory, unless tiles are `wide`: keys of 4 bytes, or
    exact keys of more than 128 channels for the estimate (tests/gpu reads what the compiler took).
    """
    if pairs <= _FEW_PAIRS or wide or is_interpreted() or shared_memory(device) < _SHARED_OF_TWO:
        return 8, 1
    return 4, 2


def decode_parts(pairs: int, wide: bool, device: torch.device) -> int:
    """Programs for each of `pairs` (request, KV head)s; for `wide` see `_tiling`."""
    if is_interpreted():
        return 1  # it runs one program at a time
    _, at_once = _tiling(pairs, wide, device)
    return max(1, min(MOST_PARTS, grid_programs(device, at_once) // pairs))


def decode_layer(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    min_max: torch.Tensor,
    codes: torch.Tensor | None,
    scale_zero: torch.Tensor | None,
    page_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    sparse: torch.Tensor,
    p: torch.Tensor,
    budgets: torch.Tensor,
    rank_keys: torch.Tensor,
    middles: torch.Tensor | None,
    candidate_page_ids: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    candidate_tokens: torch.Tensor,
    kept_tokens: torch.Tensor,
    logits: torch.Tensor,
    thresholds: torch.Tensor,
    masses: torch.Tensor,
    kept_token_slots: torch.Tensor,
    workspace: AttendWorkspace,
    out: torch.Tensor,
    token: Token | None,
    *,
    sink_tokens: int,
    recent_tokens: int,
    steps: int,
    slack: float,
    sm_scale: float,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    """Run the pipeline of one layer; see the operators' own functions for what tensors hold.

    Args:
        q: [B, HQ, D]; key_cache: [P, PS, HK, D]; value_cache: [P, PS, HK, DV].
        min_max, codes, scale_zero: page summaries; codes None for the `exact` estimator.
        page_ids, seq_lens, sparse, p: see `DecodePlan`.
        budgets to kept_token_slots: as for `select_pages`, `estimate_logits`,
            `top_p_thresholds` and `unite_kept`, except that kept slots are listed apart for every
            part of the candidates.
        workspace: as for `attend`.
        out: [B, HQ, DV], written; zeros for rows of length 0.
        token: as for `select_pages`.
        slack: as for `select_pages`; sinks: as for `attend`.
    """
    batch, heads_q, dim = q.shape
    page_size, heads_kv, dim_v = value_cache.shape[1:]
    group = heads_q // heads_kv
    pairs = batch * heads_kv
    wide = key_cache.element_size() > 2 or (codes is None and dim > 128)
    parts = decode_parts(pairs, wide, q.device)
    interpreted = is_interpreted()
    launch(decode_kernel, pairs * parts)(
        q,
        key_cache,
        value_cache,
        min_max,
        codes,
        None if scale_zero is None else scale_zero.view(torch.int32),  # scale low, zero high
        page_ids,
        seq_lens,
        sparse,
        p,
        budgets,
        rank_keys,
        rank_keys if middles is None else middles,
        candidate_page_ids,
        positions,
        counts,
        candidate_tokens,
        kept_tokens,
        logits,
        thresholds,
        masses,
        kept_token_slots,
        workspace.partial,
        workspace.partial_stats,
        workspace.arrivals,
        q if sinks is None else sinks,
        out,
        *(token or (q, q)),
        parts,
        rank_keys.stride(1),
        0 if middles is None else middles.stride(1),
        candidate_page_ids.shape[-1],
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
        EXACT=codes is None,
        COMPUTE=compute_dtype(q.dtype),
        STEPS=steps,
        G_PAD=max(16, triton.next_power_of_2(group)),
        HALF_PAD=max(32, triton.next_power_of_2(dim // 2)),
        DV=dim_v,
        DV_PAD=triton.next_power_of_2(dim_v),
        CAPACITY=max(16, triton.next_power_of_2(logits.shape[-1])),
        HEADS=1 if group <= parts else 2,
        PARTS_PAD=MOST_PARTS,
        STRATA=2,
        SCORE_PAGES=16 if interpreted else 64 if dim <= 128 else 32,
        SCORE_STAGES=1 if interpreted else 3,
        RANK_OTHERS=16 if interpreted else 32,
        ESTIMATE_TOKENS=max(64 if interpreted else 128, page_size),
        ESTIMATE_STAGES=1 if interpreted else 5,
        UNITE_TOKENS=64 if interpreted else 512 if parts > 8 else 2048,
        ATTEND_TOKENS=16 if interpreted else 64 if (dim + dim_v) <= 256 else 32,
        ATTEND_STAGES=1 if interpreted else 5,
        ASM=not interpreted,
        **select_options(
            q,
            min_max,
            middles,
            page_size=page_size,
            sink_tokens=sink_tokens,
            recent_tokens=recent_tokens,
            slack=slack,
        ),
        **launch_options(_tiling(pairs, wide, q.device)[0]),
    )
