"""Quest (arXiv 2406.10774): pages by an upper bound on their logits."""

import torch

from twilight_sgl.attention.plan import LayerCache
from twilight_sgl.kernels.page_score.reference import page_scores


def score(q: torch.Tensor, cache: LayerCache, page_ids: torch.Tensor) -> torch.Tensor:
    """Score pages by the bound of their min/max summaries; see `page_scores` for shapes."""
    return page_scores(q, cache.min_max, page_ids)
