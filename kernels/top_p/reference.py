"""Top-p pruning in plain PyTorch."""

import torch

BISECTION_STEPS = 24


def top_p_mask(logits: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Keep the tokens of largest weight that together hold mass p (Twilight, algorithm 1).

    The threshold is found by bisection over (0, largest weight], so nothing is sorted. Weights
    are taken relative to the largest one; the search ends after `BISECTION_STEPS` halvings, which
    leaves the threshold within 2 ** -24 of the largest weight below the exact one. Equal weights
    are kept or dropped together. p >= 1 keeps every token.

    Args:
        logits: [B, HQ, N] float32, -inf where there is no token.
        p: [B] float32 in (0, 1]; larger values mean 1.
    Returns:
        [B, HQ, N] bool. The kept mass is at least p of the row's, up to float32 rounding.
    """
    exists = logits > -torch.inf
    if not logits.shape[-1]:
        return exists
    top = logits.amax(-1, keepdim=True)
    weights = torch.where(exists, torch.exp(logits - top), 0.0)
    target = p.view(-1, 1, 1) * weights.sum(-1, keepdim=True)
    low = torch.zeros_like(top)
    for step in range(1, BISECTION_STEPS + 1):
        middle = low + 0.5**step
        mass = (weights * (weights >= middle)).sum(-1, keepdim=True)
        low = torch.where(mass >= target, middle, low)
    low = torch.where(p.view(-1, 1, 1) >= 1, 0.0, low)
    return exists & (weights >= low)


def kept_mass(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Share of a row's weight that its kept tokens hold.

    Args:
        logits: [B, HQ, N] float32, -inf where there is no token; mask: [B, HQ, N] bool.
    Returns:
        [B, HQ] float32; 0 for rows without a token.
    """
    weights = logits.softmax(-1).nan_to_num(0.0)
    return (weights * mask).sum(-1)


def forced_tokens(
    token_positions: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    sink_tokens: int,
    recent_tokens: int,
) -> torch.Tensor:
    """Tokens kept whatever their weight: sink, recent window and open page.

    Args:
        token_positions: [B, HK, N] positions in the request, -1 where there is no token.
        seq_lens: [B] tokens, the one being decoded included.
    Returns:
        [B, HK, N] bool.
    """
    length = seq_lens.long().view(-1, 1, 1)
    open_from = (length - 1) // page_size * page_size
    keep_from = torch.minimum(open_from, length - recent_tokens)
    forced = (token_positions < sink_tokens) | (token_positions >= keep_from)
    return forced & (token_positions >= 0)


def keep_union(
    mask: torch.Tensor,
    token_slots: torch.Tensor,
    token_positions: torch.Tensor,
    forced: torch.Tensor,
    sparse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Union the kept tokens over each group's query heads and compact them.

    Args:
        mask: [B, HQ, N] bool from `top_p_mask`.
        token_slots, token_positions: [B, HK, N], see `candidate_tokens`.
        forced: [B, HK, N] bool from `forced_tokens`.
        sparse: [B] bool; a row that is not sparse keeps all its tokens.
    Returns:
        kept_token_slots: [B, HK, K] int32 in the order of the candidates, 0 behind the last; K is
            the largest count.
        kept_tokens: [B, HK] int32.
    """
    batch, heads_kv, num_tokens = token_slots.shape
    union = mask.view(batch, heads_kv, -1, num_tokens).any(2) | forced
    union |= ~sparse.view(-1, 1, 1)
    union &= token_positions >= 0
    kept_tokens = union.sum(-1)
    width = int(kept_tokens.max()) if kept_tokens.numel() else 0
    order = union.byte().sort(dim=-1, descending=True, stable=True).indices[..., :width]
    slots = token_slots.gather(2, order)
    slots *= torch.arange(width, device=slots.device) < kept_tokens.unsqueeze(-1)
    return slots.int(), kept_tokens.int()
