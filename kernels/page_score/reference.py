"""Page scores by the box of a page's keys, in plain PyTorch."""

from typing import NamedTuple

import torch


class Reach(NamedTuple):
    """How far from its middle a box is taken to reach along a query.

    Attributes:
        slack: share or multiple of the norm that counts.
        norm: of the products |q| * radius by channel. 1, their sum: no key is farther, and one that
            is as far is so in every channel at once. 2, the root of their summed squares: how far
            keys get whose channels vary independently, but for the multiple.
    """

    slack: float = 1.0
    norm: int = 1


QUEST = Reach()


def page_scores(
    q: torch.Tensor,
    min_max: torch.Tensor,
    page_ids: torch.Tensor,
    reach: Reach = QUEST,
) -> torch.Tensor:
    """Products of q with the box around each page's keys, maximised over the heads of a group.

    q . middle + slack * norm of |q| * radius. With all of the sum it is the upper bound of q . k
    over the page (Quest, arXiv 2406.10774, eq. 2).

    Args:
        q: [B, HQ, D] queries, any float dtype.
        min_max: [P, HK, 2, D] page summaries of one layer.
        page_ids: [B, T] physical page of every logical page; any valid id where there is none.
        reach: how far boxes are taken to reach.
    Returns:
        [B, HK, T] float32 unscaled products. Pages that are not sealed get whatever their memory
        holds: `select_pages` never looks at those.
    """
    batch, _, dim = q.shape
    heads_kv = min_max.shape[1]
    grouped = q.float().view(batch, heads_kv, -1, dim)
    low, high = min_max[page_ids.long()].float().unbind(3)  # [B, T, HK, D]
    linear = reach.slack * grouped.abs() if reach.norm == 1 else torch.zeros_like(grouped)
    score = torch.einsum("bhgd,bthd->bhgt", (grouped + linear) / 2, high)
    score += torch.einsum("bhgd,bthd->bhgt", (grouped - linear) / 2, low)
    if reach.norm == 2:
        squares = torch.einsum("bhgd,bthd->bhgt", grouped**2, ((high - low) / 2) ** 2)
        score += reach.slack * squares.sqrt()
    return score.amax(2)
