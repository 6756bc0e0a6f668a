"""Attention over kept tokens in plain PyTorch."""

import torch

from twilight_sgl.kernels.estimate.reference import soft_cap


def attend(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kept_token_slots: torch.Tensor,
    kept_tokens: torch.Tensor,
    *,
    sm_scale: float,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact softmax attention of one query token over each KV head's kept tokens.

    Args:
        q: [B, HQ, D].
        key_cache: [P, PS, HK, D] one layer's keys by page.
        value_cache: [P, PS, HK, DV] its values.
        kept_token_slots: [B, HK, K] physical slots (page * PS + offset).
        kept_tokens: [B, HK] how many of them count.
        sm_scale, logit_cap: see `estimate_logits`.
        sinks: [HQ] learned attention sinks: a logit of each query head, not scaled, that takes
            weight and has no value (gpt-oss, arXiv 2508.10925); None for none.
    Returns:
        [B, HQ, DV] float32; zeros where nothing is kept.
    """
    batch, heads_q, dim = q.shape
    heads_kv, dim_v = value_cache.shape[2:]
    head = torch.arange(heads_kv, device=q.device).view(1, -1, 1)
    slots = kept_token_slots.long()
    keys = key_cache.flatten(0, 1)[slots, head].float()  # [B, HK, K, D]
    values = value_cache.flatten(0, 1)[slots, head].float()
    counts = torch.arange(slots.shape[-1], device=q.device) < kept_tokens.unsqueeze(-1)
    values = values.masked_fill(~counts.unsqueeze(-1), 0.0)
    grouped = q.float().view(batch, heads_kv, -1, dim)
    logits = soft_cap(torch.einsum("bhgd,bhtd->bhgt", grouped, keys) * sm_scale, logit_cap)
    logits = logits.masked_fill(~counts.unsqueeze(2), -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(1, heads_kv, -1, 1).expand(batch, -1, -1, 1)
        logits = torch.cat((logits, sink), -1)
    weights = torch.softmax(logits, dim=-1).nan_to_num(0.0)[..., : slots.shape[-1]]
    return torch.einsum("bhgt,bhtd->bhgd", weights, values).reshape(batch, heads_q, dim_v)
