"""What the scheduler noted, applied in plain PyTorch."""

from collections.abc import Mapping, Sequence

import torch


def apply_notes(
    released_pages: Sequence[torch.Tensor],
    written_slots: Sequence[torch.Tensor],
    p_of_slot: Mapping[int, float],
    sealed: torch.Tensor,
    p: torch.Tensor,
    first_step: torch.Tensor,
    *,
    page_size: int,
) -> None:
    """End seals, and begin requests anew.

    Args:
        released_pages: [M] integer each, physical pages that the allocator took back.
        written_slots: [M] integer each, KV slots that were written; their pages' seals end. What
            names the padding page, 0, or no page at all is left out.
        p_of_slot: mass to keep by request slot, above 1 for a request that stays dense.
        sealed: [P] int32, 0 is written for all of these pages; repeats are allowed.
        p: [S] float32 by request slot, written; first_step: [S] bool, set for the same slots.
        page_size: tokens.
    """
    pages = [page_ids.to(sealed.device, torch.int64) for page_ids in released_pages]
    pages += [slots.to(sealed.device, torch.int64) // page_size for slots in written_slots]
    if pages:
        ended = torch.cat(pages)
        sealed.index_fill_(0, ended[(ended > 0) & (ended < len(sealed))], 0)
    if p_of_slot:
        slots = torch.tensor(list(p_of_slot), device=p.device)
        p[slots] = torch.tensor(list(p_of_slot.values()), dtype=p.dtype, device=p.device)
        first_step[slots] = True
