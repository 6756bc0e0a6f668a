"""How much of the true attention a kept set holds."""

from collections.abc import Sequence

import torch

from twilight_sgl.attention import selectors
from twilight_sgl.attention.plan import DecodePlan, LayerCache, Selection
from twilight_sgl.kernels.estimate.reference import candidate_tokens, estimate_logits
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
    scores = selectors.get(selection.selector)(q, cache, plan.page_ids)
    positions, _ = select_pages(
        scores,
        plan.seq_lens,
        plan.sparse,
        page_size=size,
        budget=selection.budget,
        sink_tokens=selection.sink_tokens,
        recent_tokens=selection.recent_tokens,
        least_tokens=selection.min_candidate_tokens,
    )
    codes = None if selection.estimator == "exact" else cache.codes
    scale_zero = None if selection.estimator == "exact" else cache.scale_zero
    logits = estimate_logits(
        q,
        cache.keys,
        codes,
        scale_zero,
        plan.page_ids,
        positions,
        plan.seq_lens,
        sm_scale=sm_scale,
        min_max=cache.min_max if selection.centred else None,
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


def row_figures(mass: dict[str, torch.Tensor], seq_lens: torch.Tensor) -> list[dict[str, float]]:
    """Each row's figures from `kept_mass`, budgets as shares of its context `seq_lens` [B].

    `head_share` is B1 of a query head before the union, `head_spread` the largest over the
    smallest of them, `union_share` what a KV head attends to, `candidate_share` B0; `mass` and
    `candidate_mass` are means over query heads and `least_` the worst head's.
    """
    rows = []
    for row, tokens in enumerate(seq_lens.tolist()):
        heads = mass["head_tokens"][row].float()
        rows.append(
            {
                "mass": mass["mass"][row].mean().item(),
                "least_mass": mass["mass"][row].min().item(),
                "candidate_mass": mass["candidate_mass"][row].mean().item(),
                "least_candidate_mass": mass["candidate_mass"][row].min().item(),
                "head_share": heads.mean().item() / tokens,
                "head_spread": (heads.max() / heads.min().clamp(min=1)).item(),
                "union_share": mass["kept_tokens"][row].float().mean().item() / tokens,
                "candidate_share": mass["candidate_tokens"][row].float().mean().item() / tokens,
            }
        )
    return rows


def over_layers(rows: Sequence[dict[str, float]], layer_ids: Sequence[int]) -> dict[str, object]:
    """Join the layers' figures: means, `least_` ones the least and the spread the largest.

    `worst_layer` holds the figures of the layer that keeps least mass on average, `per_layer` all.
    """
    joined: dict[str, object] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name.startswith("least_"):
            joined[name] = min(values)
        elif name == "head_spread":
            joined[name] = max(values)
        else:
            joined[name] = sum(values) / len(values)
    per_layer = [{"layer": layer, **row} for layer, row in zip(layer_ids, rows, strict=True)]
    joined["worst_layer"] = min(per_layer, key=lambda row: row["mass"])
    joined["per_layer"] = per_layer
    return joined
