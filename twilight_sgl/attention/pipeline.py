"""The decode pipeline of one layer: select, estimate, prune, attend."""

from dataclasses import dataclass

import torch

from twilight_sgl.attention import selectors
from twilight_sgl.attention.plan import DecodePlan, LayerCache, Selection
from twilight_sgl.kernels.attend.reference import attend
from twilight_sgl.kernels.estimate.reference import candidate_tokens, estimate_logits
from twilight_sgl.kernels.select.reference import select_pages
from twilight_sgl.kernels.top_p.reference import forced_tokens, keep_union, kept_mass, top_p_mask


@dataclass(frozen=True)
class LayerOutput:
    """What a layer computed.

    Attributes:
        output: [B, HQ, DV] float32; zeros for padded rows.
        candidate_tokens: [B, HK] int32, B0 of each KV head.
        kept_tokens: [B, HK] int32, B1 of each KV head (the union over its group).
        kept_mass: [B, HQ] float32, share of the candidates' estimated weight that top-p kept of
            sparse rows; 1 without a pruner.
    """

    output: torch.Tensor
    candidate_tokens: torch.Tensor
    kept_tokens: torch.Tensor
    kept_mass: torch.Tensor


def decode_reference(
    q: torch.Tensor,
    cache: LayerCache,
    plan: DecodePlan,
    selection: Selection,
    *,
    sm_scale: float,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> LayerOutput:
    """Run the pipeline of one layer in plain PyTorch (arXiv 2502.02770, figure 4).

    Args:
        q: [B, HQ, D] queries, any float dtype.
        cache: the layer's KV cache, holding this step's key and value already, and summaries of
            every full page that a sparse row of the plan names.
        sm_scale: softmax scale; logit_cap: soft cap on logits, 0 for none.
        sinks: [HQ] learned attention sinks, see `attend`; top-p does not count their weight.
    """
    scores = selectors.get(selection.selector)(q, cache, plan.page_ids)
    positions, _ = select_pages(
        scores,
        plan.seq_lens,
        plan.sparse,
        page_size=selection.page_size,
        budget=selection.budget,
        sink_tokens=selection.sink_tokens,
        recent_tokens=selection.recent_tokens,
        least_tokens=selection.min_candidate_tokens,
    )
    token_slots, token_positions = candidate_tokens(
        plan.page_ids, positions, plan.seq_lens, selection.page_size
    )
    forced = forced_tokens(
        token_positions,
        plan.seq_lens,
        page_size=selection.page_size,
        sink_tokens=selection.sink_tokens,
        recent_tokens=selection.recent_tokens,
    )
    if selection.pruner == "none":
        mask = (token_positions >= 0).repeat_interleave(q.shape[1] // token_positions.shape[1], 1)
        mass = torch.ones(q.shape[:2], device=q.device)
    else:
        exact = selection.estimator == "exact"
        logits = estimate_logits(
            q,
            cache.keys,
            None if exact else cache.codes,
            None if exact else cache.scale_zero,
            plan.page_ids,
            positions,
            plan.seq_lens,
            sm_scale=sm_scale,
            logit_cap=logit_cap,
            min_max=cache.min_max if selection.centred else None,
        )
        mask = top_p_mask(logits, plan.p)
        mass = kept_mass(logits, mask)
    slots, kept = keep_union(mask, token_slots, token_positions, forced, plan.sparse)
    scales = {"sm_scale": sm_scale, "logit_cap": logit_cap}
    output = attend(q, cache.keys, cache.values, slots, kept, **scales, sinks=sinks)
    return LayerOutput(output, (token_positions >= 0).sum(-1).int(), kept, mass)
