"""How much of the true attention a kept set holds."""

import torch

from twilight_sgl.attention.plan import DecodePlan, LayerCache, Selection
from twilight_sgl.kernels.estimate.reference import candidate_tokens, estimate_logits
from twilight_sgl.kernels.page_score.reference import page_scores
from twilight_sgl.kernels.select.reference import select_pages
from twilight_sgl.kernels.top_p.reference import forced_tokens, top_p_mask


def kept_mass(
    q: torch.Tensor,
    cache: LayerCache,
    plan: DecodePlan,
    selection: Selection,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """Run the reference selection and weigh what it keeps by full attention.

    Returns:
        mass: [B, HQ] share of full attention on the tokens attended to (the union);
        candidate_mass: [B, HQ] share on the candidates;
        head_tokens: [B, HQ] tokens that top-p keeps of each query head, before the union;
        kept_tokens: [B, HK] tokens attended to: the union and what is always kept;
        candidate_tokens: [B, HK] tokens of the candidate pages.
    """
    batch, heads_q, _ = q.shape
    heads_kv = cache.keys.shape[2]
    size = selection.page_size
    scores = page_scores(q, cache.min_max, plan.page_ids)
    positions, _ = select_pages(
        scores,
        plan.seq_lens,
        plan.sparse,
        page_size=size,
        budget=selection.budget,
        sink_tokens=selection.sink_tokens,
        recent_tokens=selection.recent_tokens,
    )
    codes = None if selection.estimator == "exact" else cache.codes
    scale_zero = None if selection.estimator == "exact" else cache.scale_zero
    logits = estimate_logits(
        q, cache.keys, codes, scale_zero, plan.page_ids, positions, plan.seq_lens, sm_scale=sm_scale
    )
    _, token_positions = candidate_tokens(plan.page_ids, positions, plan.seq_lens, size)
    forced = forced_tokens(
        token_positions,
        plan.seq_lens,
        page_size=size,
        sink_tokens=selection.sink_tokens,
        recent_tokens=selection.recent_tokens,
    )
    mask = top_p_mask(logits, plan.p)
    kept = mask.view(batch, heads_kv, -1, mask.shape[-1]).any(2) | forced

    every = torch.arange(plan.page_ids.shape[1], device=q.device, dtype=torch.int32)
    every = every.expand(batch, heads_kv, -1)
    full = estimate_logits(
        q, cache.keys, None, None, plan.page_ids, every, plan.seq_lens, sm_scale=sm_scale
    )
    weights = torch.softmax(full, -1).view(batch, heads_kv, -1, full.shape[-1])
    place = token_positions.clamp(min=0).unsqueeze(2).expand(-1, -1, heads_q // heads_kv, -1)
    there = (token_positions >= 0).unsqueeze(2)
    gathered = weights.gather(3, place) * there
    return {
        "mass": (gathered * kept.unsqueeze(2)).sum(-1).flatten(1),
        "candidate_mass": gathered.sum(-1).flatten(1),
        "head_tokens": mask.sum(-1),
        "kept_tokens": kept.sum(-1),
        "candidate_tokens": (token_positions >= 0).sum(-1),
    }
