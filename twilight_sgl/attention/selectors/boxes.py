"""Selectors that score a page by the box around its keys: its channels' minima and maxima."""

import torch

from twilight_sgl.attention.plan import LayerCache
from twilight_sgl.kernels.page_score.reference import QUEST, Reach, page_scores

# How far a box is taken to reach, by selector.
REACH = {"quest": QUEST, "half_bound": Reach(0.5), "rss_bound": Reach(1.5, norm=2)}


def quest(q: torch.Tensor, cache: LayerCache, page_ids: torch.Tensor) -> torch.Tensor:
    """Quest (arXiv 2406.10774): an upper bound on the page's logits; shapes as `page_scores`."""
    return page_scores(q, cache.min_max, page_ids, REACH["quest"])


def half_bound(q: torch.Tensor, cache: LayerCache, page_ids: torch.Tensor) -> torch.Tensor:
    """Halfway between the product with the box's middle and Quest's bound.

    No key is as large as the bound in every channel at once, and the more channels a query uses
    the looser it is. Costs what Quest costs.
    """
    return page_scores(q, cache.min_max, page_ids, REACH["half_bound"])


def rss_bound(q: torch.Tensor, cache: LayerCache, page_ids: torch.Tensor) -> torch.Tensor:
    """The product with the box's middle and 1.5 times the root of the summed squared reaches.

    Quest's bound adds the channels' reaches as if a key had all of them at once; summed like the
    deviations of independent channels they come to what a page's largest key is likely to have.
    """
    return page_scores(q, cache.min_max, page_ids, REACH["rss_bound"])
