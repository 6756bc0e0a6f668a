"""Candidate pages in plain PyTorch."""

import torch


def budget_pages(
    num_pages: torch.Tensor, budget: float, page_size: int, least_tokens: int = 0
) -> torch.Tensor:
    """Pages that a selector may name for requests of `num_pages` pages.

    Args:
        num_pages: [B] integer, pages of each request.
        budget: at most 1: a fraction of the context; above: tokens.
        page_size: PS, tokens.
        least_tokens: that a fraction comes to, where the context has as many.
    Returns:
        [B] int64, between 1 and num_pages where num_pages is not 0.
    """
    if budget <= 1:
        pages = torch.ceil(num_pages.double() * budget).long()
        pages = pages.clamp(min=-(-least_tokens // page_size))
    else:
        pages = torch.full_like(num_pages, -(-int(budget) // page_size), dtype=torch.long)
    return torch.minimum(pages.clamp(min=1), num_pages.long())


def forced_pages(
    seq_lens: torch.Tensor, num_columns: int, page_size: int, sink_tokens: int, recent_tokens: int
) -> torch.Tensor:
    """Pages kept whatever their score: those of the sink and recent tokens and the open page.

    The open page is the last one, the one the newest token was written to.

    Args:
        seq_lens: [B] tokens of each request, the one being decoded included; 0 for no request.
        num_columns: T, logical pages to describe.
    Returns:
        [B, T] bool.
    """
    position = torch.arange(num_columns, device=seq_lens.device)
    length = seq_lens.long().unsqueeze(1)
    recent_from = (length - max(recent_tokens, 1)).clamp(min=0) // page_size
    sink_below = -(-sink_tokens // page_size)
    exists = position < (length + page_size - 1) // page_size
    return exists & ((position < sink_below) | (position >= recent_from))


def select_pages(
    scores: torch.Tensor,
    seq_lens: torch.Tensor,
    sparse: torch.Tensor,
    *,
    page_size: int,
    budget: float,
    sink_tokens: int,
    recent_tokens: int,
    least_tokens: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick each KV head's best pages.

    Forced pages come first and count towards the budget, which grows to hold them. Equal scores
    go to the earlier page.

    Args:
        scores: [B, HK, T] float32, larger is better; read for full pages only.
        seq_lens: [B] tokens, the one being decoded included; 0 for no request.
        sparse: [B] bool; a row that is not sparse gets all of its pages.
        budget, least_tokens: see `budget_pages`.
    Returns:
        positions: [B, HK, C] int32 logical pages in ascending order, -1 behind the last.
        counts: [B, HK] int32 candidate pages.
    """
    num_columns = scores.shape[-1]
    num_pages = (seq_lens.long() + page_size - 1) // page_size
    forced = forced_pages(seq_lens, num_columns, page_size, sink_tokens, recent_tokens)
    budgets = budget_pages(num_pages, budget, page_size, least_tokens)
    counts = torch.maximum(budgets, forced.sum(1))
    counts = torch.where(sparse, counts, num_pages)  # [B]

    exists = torch.arange(num_columns, device=scores.device) < num_pages.unsqueeze(1)
    ranked = scores.masked_fill(forced.unsqueeze(1), torch.inf)
    ranked = ranked.masked_fill(~exists.unsqueeze(1), -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    width = int(counts.max()) if counts.numel() else 0
    order = order[..., :width]
    chosen = torch.arange(width, device=scores.device) < counts.view(-1, 1, 1)
    positions = order.masked_fill(~chosen, num_columns).sort(-1).values
    positions = positions.masked_fill(positions == num_columns, -1)
    return positions.int(), counts.int().unsqueeze(1).expand(-1, scores.shape[1]).contiguous()
