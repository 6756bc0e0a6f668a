"""Score, select, estimate, prune and attend in one launch.

A (request, KV head) is given to `parts` programs. Each scores a part of the pages; all then choose
the same candidates, each in its own registers, and take every `parts`-th of them; they estimate,
unite and attend to their own. The search for thresholds and the merge of the results are dealt to
them by query head. In between they wait for each other. The reference is
`twilight_sgl.attention.pipeline.decode_reference`.

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
    launch_options,
    shared_memory,
)
from twilight_sgl.kernels.page_score.triton import product_rows, score_dtype

MOST_COLUMNS = 2048
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
    scores: torch.Tensor,
    middles: torch.Tensor | None,
    candidate_page_ids: torch.Tensor,
    positions: torch.Tensor | None,
    counts: torch.Tensor,
    candidate_tokens: torch.Tensor,
    kept_tokens: torch.Tensor,
    q_codes: torch.Tensor | None,
    q_scale_sum: torch.Tensor | None,
    logits: torch.Tensor,
    thresholds: torch.Tensor,
    masses: torch.Tensor,
    kept_token_slots: torch.Tensor,
    workspace: AttendWorkspace,
    out: torch.Tensor,
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
        page_ids, seq_lens, sparse, p: see `DecodePlan`; at most MOST_COLUMNS pages a row.
        budgets to kept_token_slots: as for `page_scores`, `select_pages`, `estimate_logits`,
            `top_p_thresholds` and `unite_kept`, except that kept slots are listed apart for every
            part of the candidates.
        workspace: as for `attend`.
        out: [B, HQ, DV], written; zeros for rows of length 0.
        slack: as for `page_scores`; sinks: as for `attend`.
    """
    batch, heads_q, dim = q.shape
    page_size, heads_kv, dim_v = value_cache.shape[1:]
    group = heads_q // heads_kv
    rows = triton.next_power_of_2(group)
    dim_v_pad = triton.next_power_of_2(dim_v)
    pairs = batch * heads_kv
    wide = key_cache.element_size() > 2 or (codes is None and dim > 128)
    parts = decode_parts(pairs, wide, q.device)
    interpreted = is_interpreted()
    decode_kernel[(pairs * parts,)](
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
        scores,
        middles,
        candidate_page_ids,
        positions,
        counts,
        candidate_tokens,
        kept_tokens,
        q if q_codes is None else q_codes,
        q if q_scale_sum is None else q_scale_sum,
        logits,
        thresholds,
        masses,
        kept_token_slots,
        workspace.partial,
        workspace.partial_stats,
        workspace.arrivals,
        q if sinks is None else sinks,
        out,
        parts,
        scores.stride(1),
        0 if middles is None else middles.stride(1),
        candidate_page_ids.shape[-1],
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
        EXACT=codes is None,
        CENTRED=middles is not None,
        SLACK=slack,
        SCORE=score_dtype(q.dtype, min_max.dtype),
        COMPUTE=compute_dtype(q.dtype),
        STEPS=steps,
        SINK=sink_tokens,
        RECENT=max(recent_tokens, 1),
        PS=page_size,
        HK=heads_kv,
        G=group,
        G_ROWS=rows,
        G_PAD=max(16, rows),
        SCORE_ROWS=product_rows(group, middles is not None),
        D=dim,
        D_PAD=triton.next_power_of_2(dim),
        HALF_PAD=max(32, triton.next_power_of_2(dim // 2)),
        DV=dim_v,
        DV_PAD=dim_v_pad,
        COLUMNS_PAD=max(16, triton.next_power_of_2(page_ids.shape[1])),
        CAPACITY=max(16, triton.next_power_of_2(logits.shape[-1])),
        HEADS=1 if group <= parts else 2,
        PARTS_PAD=MOST_PARTS,
        SCORE_PAGES=16 if interpreted else 64 if dim <= 128 else 32,
        SCORE_STAGES=1 if interpreted else 5,
        ESTIMATE_TOKENS=max(64 if interpreted else 128, page_size),
        ESTIMATE_STAGES=1 if interpreted else 5,
        UNITE_TOKENS=64 if interpreted else 512 if parts > 8 else 2048,
        ATTEND_TOKENS=16 if interpreted else 64 if (dim + dim_v) <= 256 else 32,
        ATTEND_STAGES=1 if interpreted else 5,
        PACKED_ASM=not interpreted,
        **launch_options(_tiling(pairs, wide, q.device)[0]),
    )
