"""Estimated logits in plain PyTorch."""

import torch

from twilight_sgl.kernels.seal.reference import dequantize_int4, page_middles


def soft_cap(logits: torch.Tensor, logit_cap: float) -> torch.Tensor:
    """Squash logits into (-logit_cap, logit_cap), as Gemma-2 does; 0 leaves them alone."""
    return logit_cap * torch.tanh(logits / logit_cap) if logit_cap else logits


def candidate_tokens(
    page_ids: torch.Tensor, positions: torch.Tensor, seq_lens: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out the tokens of candidate pages.

    Args:
        page_ids: [B, T] physical page of every logical page.
        positions: [B, HK, C] candidate logical pages, -1 for none.
        seq_lens: [B] tokens, the one being decoded included.
    Returns:
        token_slots: [B, HK, C * PS] int64 physical KV slots, 0 where there is no token.
        token_positions: [B, HK, C * PS] int64 positions in the request, -1 where there is none.
    """
    offset = torch.arange(page_size, device=page_ids.device)
    pages = positions.long().clamp(min=0)
    physical = page_ids.long().unsqueeze(1).expand(-1, pages.shape[1], -1).gather(2, pages)
    token_positions = (pages.unsqueeze(-1) * page_size + offset).flatten(2)
    token_slots = (physical.unsqueeze(-1) * page_size + offset).flatten(2)
    missing = (positions < 0).repeat_interleave(page_size, dim=2)
    missing |= token_positions >= seq_lens.view(-1, 1, 1)
    return token_slots.masked_fill(missing, 0), token_positions.masked_fill(missing, -1)


def estimate_logits(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    codes: torch.Tensor | None,
    scale_zero: torch.Tensor | None,
    page_ids: torch.Tensor,
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float,
    logit_cap: float = 0.0,
    min_max: torch.Tensor | None = None,
) -> torch.Tensor:
    """Estimate the scaled logits of every token of the candidate pages.

    Full pages are read from their INT4 keys (Twilight, arXiv 2502.02770, 4.2). The open page has
    none and is read from the key cache; so are all pages when `codes` is None (the `exact`
    estimator).

    Args:
        q: [B, HQ, D].
        key_cache: [P, PS, HK, D] one layer's keys by page.
        codes, scale_zero: [P, HK, PS, D // 2] uint8 and [P, HK, PS, 2] float16, see
            `quantize_int4`.
        page_ids, positions, seq_lens: as in `candidate_tokens`.
        sm_scale: softmax scale, usually D ** -0.5.
        logit_cap: see `soft_cap`.
        min_max: [P, HK, 2, D] bounds of the pages, for INT4 keys that are less their page's middle
            (the `int4_centred` estimator), see `page_codes`.
    Returns:
        [B, HQ, C * PS] float32, -inf where there is no token.
    """
    batch, heads_q, dim = q.shape
    page_size, heads_kv = key_cache.shape[1:3]
    token_slots, token_positions = candidate_tokens(page_ids, positions, seq_lens, page_size)
    head = torch.arange(heads_kv, device=q.device).view(1, -1, 1)
    page, offset = token_slots // page_size, token_slots % page_size
    if codes is None or scale_zero is None:
        keys = key_cache[page, offset, head].float()  # [B, HK, C * PS, D]
    else:
        keys = dequantize_int4(codes[page, head, offset], scale_zero[page, head, offset])
        if min_max is not None:
            middles = page_middles(min_max[page[..., ::page_size], head])  # [B, HK, C, D]
            keys += middles.repeat_interleave(page_size, 2)
        open_from = (seq_lens.long() - 1).clamp(min=0) // page_size * page_size
        is_open = token_positions >= open_from.view(-1, 1, 1)
        exact = key_cache[page[is_open], offset[is_open], head.expand_as(page)[is_open]]
        keys[is_open] = exact.float()
    grouped = q.float().view(batch, heads_kv, -1, dim)
    logits = soft_cap(torch.einsum("bhgd,bhtd->bhgt", grouped, keys) * sm_scale, logit_cap)
    logits = logits.masked_fill((token_positions < 0).unsqueeze(2), -torch.inf)
    return logits.reshape(batch, heads_q, -1)
