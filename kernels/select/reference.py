"""Candidate pages in plain PyTorch."""

import torch

STRATUM_PAGES = 64
LEAST_OF_STRATUM = 8  # candidates, so that no stratum is too small to hold its best pages


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


def forced_bound(page_size: int, sink_tokens: int, recent_tokens: int) -> int:
    """At least as many pages as `forced_pages` can name."""
    return -(-sink_tokens // page_size) + -(-max(recent_tokens, 1) // page_size) + 1


def num_strata(
    num_pages: torch.Tensor,
    counts: torch.Tensor,
    *,
    page_size: int,
    sink_tokens: int,
    recent_tokens: int,
) -> torch.Tensor:
    """In how many strata the candidates of a request are chosen, each apart.

    Strata are what programs on a GPU choose without waiting for each other: of STRATUM_PAGES pages,
    or larger ones where candidates are few.

    Args:
        num_pages: [B] integer, pages of each request.
        counts: [B] integer, its candidate pages.
    Returns:
        [B] int64, at least 1.
    """
    room = counts.long() - forced_bound(page_size, sink_tokens, recent_tokens)
    by_size = (num_pages.long() + STRATUM_PAGES - 1) // STRATUM_PAGES
    return torch.minimum(by_size, room.clamp(min=0) // LEAST_OF_STRATUM).clamp(min=1)


def _of_stratum(stratum: torch.Tensor, total: torch.Tensor, strata: torch.Tensor) -> torch.Tensor:
    """How many of `total` things a stratum gets; the last strata get one more."""
    return total // strata + (stratum >= strata - total % strata)


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
    """Pick each KV head's best pages, stratum by stratum.

    A request's pages are dealt out to its strata (`num_strata`) one by one, from the last page in
    the last stratum backwards, and the budget in equal parts; each stratum takes its best. As
    important pages are far fewer than candidates and neighbours come to different strata, this
    differs from the best of all pages only near the worst that is chosen.

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

    column = torch.arange(num_columns, device=scores.device)
    exists = column < num_pages.unsqueeze(1)
    strata = num_strata(
        num_pages,
        counts,
        page_size=page_size,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
    ).unsqueeze(1)
    stratum = (column - num_pages.unsqueeze(1)) % strata  # [B, T]
    room = _of_stratum(stratum, counts.unsqueeze(1), strata).masked_fill(~exists, 0)
    stratum = stratum.masked_fill(~exists, num_columns)  # those behind the last page come last
    ranked = scores.masked_fill(forced.unsqueeze(1), torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    stratum, room = (x.unsqueeze(1).expand_as(order) for x in (stratum, room))
    order = order.gather(2, stratum.gather(2, order).sort(dim=-1, stable=True).indices)
    of_order = stratum.gather(2, order)  # ascending, and best first within each
    rank = column - torch.searchsorted(of_order, of_order)
    chosen = rank < room.gather(2, order)
    width = int(counts.max()) if counts.numel() else 0
    positions = order.masked_fill(~chosen, num_columns).sort(-1).values[..., :width]
    positions = positions.masked_fill(positions == num_columns, -1)
    return positions.int(), counts.int().unsqueeze(1).expand(-1, scores.shape[1]).contiguous()
