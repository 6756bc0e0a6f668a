"""Page scores by the box of a page's keys, in plain PyTorch."""

import torch


def page_scores(
    q: torch.Tensor,
    min_max: torch.Tensor,
    page_ids: torch.Tensor,
    slack: float = 1.0,
) -> torch.Tensor:
    """Products of q with the box around each page's keys, maximised over the heads of a group.

    q . middle + slack * |q| . radius. With all the slack it is the upper bound of q . k over the
    page (Quest, arXiv 2406.10774, eq. 2), which no key reaches in every channel at once.

    Args:
        q: [B, HQ, D] queries, any float dtype.
        min_max: [P, HK, 2, D] page summaries of one layer.
        page_ids: [B, T] physical page of every logical page; any valid id where there is none.
        slack: share of the box's radius that counts, in [0, 1].
    Returns:
        [B, HK, T] float32 unscaled products. Pages that are not sealed get whatever their memory
        holds: `select_pages` never looks at those.
    """
    batch, _, dim = q.shape
    heads_kv = min_max.shape[1]
    grouped = q.float().view(batch, heads_kv, -1, dim)
    low, high = min_max[page_ids.long()].float().unbind(3)  # [B, T, HK, D]
    reach = slack * grouped.abs()
    score = torch.einsum("bhgd,bthd->bhgt", (grouped + reach) / 2, high)
    score += torch.einsum("bhgd,bthd->bhgt", (grouped - reach) / 2, low)
    return score.amax(2)
