"""Quest page bounds in plain PyTorch."""

import torch


def page_scores(q: torch.Tensor, min_max: torch.Tensor, page_ids: torch.Tensor) -> torch.Tensor:
    """Upper bound of q . k over each page, maximised over the heads of a group (Quest, eq. 2).

    Args:
        q: [B, HQ, D] queries, any float dtype.
        min_max: [P, HK, 2, D] page summaries of one layer.
        page_ids: [B, T] physical page of every logical page; any valid id where there is none.
    Returns:
        [B, HK, T] float32 unscaled bounds. Pages that are not sealed get whatever their memory
        holds: `select_pages` never looks at those.
    """
    batch, _, dim = q.shape
    heads_kv = min_max.shape[1]
    grouped = q.float().view(batch, heads_kv, -1, dim)
    low, high = min_max[page_ids.long()].float().unbind(3)  # [B, T, HK, D]
    bound = torch.einsum("bhgd,bthd->bhgt", grouped.clamp(min=0), high)
    bound += torch.einsum("bhgd,bthd->bhgt", grouped.clamp(max=0), low)
    return bound.amax(2)
