"""Selectors that score a page by the box around its keys: its channels' minima and maxima."""

import torch

from twilight_sgl.attention.plan import LayerCache
from twilight_sgl.kernels.page_score.reference import page_scores

# Share of the box's radius that counts, by selector.
SLACK = {"quest": 1.0, "half_bound": 0.5}


def quest(q: torch.Tensor, cache: LayerCache, page_ids: torch.Tensor) -> torch.Tensor:
    """Quest (arXiv 2406.10774): an upper bound on the page's logits; shapes as `page_scores`."""
    return page_scores(q, cache.min_max, page_ids, SLACK["quest"])


def half_bound(q: torch.Tensor, cache: LayerCache, page_ids: torch.Tensor) -> torch.Tensor:
    """Halfway between the product with the box's middle and Quest's bound.

    No key is as large as the bound in every channel at once, and the more channels a query uses
    the looser it is. Costs what Quest costs.
    """
    return page_scores(q, cache.min_max, page_ids, SLACK["half_bound"])
