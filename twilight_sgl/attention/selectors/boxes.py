"""Selectors that score a page by the box around its keys: its channels' minima and maxima."""

import torch

from twilight_sgl.attention.plan import LayerCache
from twilight_sgl.kernels.page_score.reference import head_scores, page_scores
from twilight_sgl.kernels.standardize.reference import standardize_scores

# Share of the box's radius that counts, by selector.
SLACK = {"quest": 1.0, "half_bound": 0.5, "z_bound": 0.5}
STANDARDIZED = frozenset({"z_bound"})  # each query head's scores, before the group's largest


def quest(
    q: torch.Tensor, cache: LayerCache, page_ids: torch.Tensor, seq_lens: torch.Tensor
) -> torch.Tensor:
    """Quest (arXiv 2406.10774): an upper bound on the page's logits; shapes as `page_scores`."""
    return page_scores(q, cache.min_max, page_ids, SLACK["quest"])


def half_bound(
    q: torch.Tensor, cache: LayerCache, page_ids: torch.Tensor, seq_lens: torch.Tensor
) -> torch.Tensor:
    """Halfway between the product with the box's middle and Quest's bound.

    No key is as large as the bound in every channel at once, and the more channels a query uses
    the looser it is. Costs what Quest costs.
    """
    return page_scores(q, cache.min_max, page_ids, SLACK["half_bound"])


def z_bound(
    q: torch.Tensor, cache: LayerCache, page_ids: torch.Tensor, seq_lens: torch.Tensor
) -> torch.Tensor:
    """`half_bound` of each query head as a standard score over the request's pages.

    So heads with large products do not outvote the others of their group. Costs a score a query
    head to write and read, and a launch.
    """
    scores = head_scores(q, cache.min_max, page_ids, SLACK["z_bound"])
    heads_kv, page_size = cache.min_max.shape[1], cache.keys.shape[1]
    return standardize_scores(scores, seq_lens, page_size=page_size, heads_kv=heads_kv)
