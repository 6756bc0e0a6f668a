"""Selectors that score a page by the box around its keys: its channels' minima and maxima."""

from dataclasses import dataclass

import torch

from twilight_sgl.attention.plan import LayerCache
from twilight_sgl.kernels.page_score.reference import page_scores


@dataclass(frozen=True)
class Box:
    """How a selector scores boxes.

    Attributes:
        slack: share of the box's radius that counts.
        summed: whether a group's heads are added up, in place of the largest.
    """

    slack: float
    summed: bool


BOXES = {
    "quest": Box(slack=1.0, summed=False),
    "half_bound": Box(slack=0.5, summed=False),
    "group_bound": Box(slack=1 / 3, summed=True),
}


def quest(q: torch.Tensor, cache: LayerCache, page_ids: torch.Tensor) -> torch.Tensor:
    """Quest (arXiv 2406.10774): an upper bound on the page's logits; shapes as `page_scores`."""
    return _score("quest", q, cache, page_ids)


def half_bound(q: torch.Tensor, cache: LayerCache, page_ids: torch.Tensor) -> torch.Tensor:
    """The product with the box's middle and half of Quest's slack.

    No key is as large as the bound in every channel at once, and the more channels a query uses
    the looser it is. Costs what Quest costs.
    """
    return _score("half_bound", q, cache, page_ids)


def group_bound(q: torch.Tensor, cache: LayerCache, page_ids: torch.Tensor) -> torch.Tensor:
    """The product with the box's middle and a third of Quest's slack, summed over a group.

    The sum asks all heads of a group, the largest only the one with the largest logits. Costs what
    Quest costs.
    """
    return _score("group_bound", q, cache, page_ids)


def _score(name: str, q: torch.Tensor, cache: LayerCache, page_ids: torch.Tensor) -> torch.Tensor:
    box = BOXES[name]
    return page_scores(q, cache.min_max, page_ids, box.slack, box.summed)
