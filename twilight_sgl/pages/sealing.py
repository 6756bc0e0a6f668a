"""Lazy sealing: before a decode step reads summaries, build those it needs."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PagesNeeded:
    """What a step's sparse rows need of the summary pool.

    Attributes:
        to_seal: [M] distinct physical pages that are full and not sealed.
        reused_by_row: [B] int32, how many full pages each row in its first sparse step found sealed
            already, by an earlier request or by a row before it in this step that is as new; 0
            for other rows.
    """

    to_seal: torch.Tensor
    reused_by_row: torch.Tensor

    @property
    def reused(self) -> int:
        """Pages reused by all rows. Synchronises."""
        return int(self.reused_by_row.sum())


def pages_needed(
    page_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    sparse: torch.Tensor,
    first_step: torch.Tensor,
    sealed: torch.Tensor,
    page_size: int,
) -> PagesNeeded:
    """Find the unsealed full pages of a step's sparse rows.

    A page is full when it holds nothing but tokens of earlier steps, which every layer has
    written: the page that the step's own token goes to is open, even if that token fills it.

    Args:
        page_ids: [B, T] physical page of every logical page.
        seq_lens: [B] tokens, the one being decoded included.
        sparse: [B] bool.
        first_step: [B] bool, rows whose request has not been sparse before.
        sealed: [P] int32.
    """
    position = torch.arange(page_ids.shape[1], device=page_ids.device)
    full = (position < ((seq_lens.long() - 1) // page_size).unsqueeze(1)) & sparse.unsqueeze(1)
    unsealed = full & (sealed[page_ids.long()] == 0)
    reused = torch.zeros(len(seq_lens), dtype=torch.int32, device=sealed.device)
    new_rows = (sparse & first_step).nonzero().flatten().tolist()
    found = sealed.clone() if new_rows else sealed
    for row in new_rows:
        pages = page_ids[row, full[row]].long()
        reused[row] = found[pages].sum()
        found[pages] = 1
    return PagesNeeded(torch.unique(page_ids[unsealed]), reused)
