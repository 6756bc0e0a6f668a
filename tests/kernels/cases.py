"""Random KV caches, plans and shapes for kernel tests."""

from dataclasses import dataclass

import torch

from twilight_sgl.attention.plan import DecodePlan, LayerCache, Selection
from twilight_sgl.kernels.seal.reference import summarize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """A decode step to draw.

    Attributes:
        lengths: tokens of each request, 0 for a padded row.
        dense: rows that are not sparse.
        p: mass to keep, one for all rows or one each.
    """

    name: str
    lengths: tuple[int, ...]
    heads_q: int = 4
    heads_kv: int = 2
    dim: int = 64
    dim_v: int | None = None
    page_size: int = 16
    budget: float = 0.5
    sink_tokens: int = 4
    recent_tokens: int = 8
    estimator: str = "int4"
    p: float | tuple[float, ...] = 0.9
    dense: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    logit_cap: float = 0.0
    q_scale: float = 1.0
    prune: bool = True

    @property
    def selection(self) -> Selection:
        return Selection(
            self.page_size, self.budget, self.sink_tokens, self.recent_tokens, self.estimator
        )


@dataclass(frozen=True)
class Drawn:
    q: torch.Tensor
    cache: LayerCache
    plan: DecodePlan


def draw(case: Case, *, seed: int = 0, poison: bool = True, device: str = DEVICE) -> Drawn:
    """Draw a step: pages in random physical order, NaN and sentinels in memory nothing wrote.

    Slots past a request's length, pages of nobody and summaries of pages that are not full hold
    NaN (255 for integers) with `poison`.
    """
    rng = torch.Generator().manual_seed(seed)
    size = case.page_size
    dim_v = case.dim_v or case.dim
    batch = len(case.lengths)
    pages = [-(-length // size) for length in case.lengths]
    columns = max(1, max(pages))
    pool = sum(pages) + 3
    order = torch.randperm(pool - 1, generator=rng) + 1  # page 0 is nobody's
    cache_dtype = case.cache_dtype or case.dtype
    nan = float("nan") if poison else 0.0
    keys = torch.full((pool, size, case.heads_kv, case.dim), nan)
    values = torch.full((pool, size, case.heads_kv, dim_v), nan)
    page_ids = torch.zeros(batch, columns, dtype=torch.int32)
    full, taken = [], 0
    for row, length in enumerate(case.lengths):
        mine = order[taken : taken + pages[row]]
        taken += pages[row]
        page_ids[row, : pages[row]] = mine.int()
        full += mine[: max(length - 1, 0) // size].tolist()
        for logical, page in enumerate(mine.tolist()):
            tokens = min(size, length - logical * size)
            shape = (tokens, case.heads_kv)
            keys[page, :tokens] = torch.randn(*shape, case.dim, generator=rng)
            values[page, :tokens] = torch.randn(*shape, dim_v, generator=rng)
    keys, values = keys.to(cache_dtype), values.to(cache_dtype)
    min_max = torch.full((pool, case.heads_kv, 2, case.dim), nan).to(cache_dtype)
    codes = torch.full((pool, case.heads_kv, size, case.dim // 2), 255, dtype=torch.uint8)
    scale_zero = torch.full((pool, case.heads_kv, size, 2), nan, dtype=torch.float16)
    if full:
        min_max[full], codes[full], scale_zero[full] = summarize(keys[full])
    q = torch.randn(batch, case.heads_q, case.dim, generator=rng) * case.q_scale
    p = case.p if isinstance(case.p, tuple) else (case.p,) * batch
    sparse = [row not in case.dense for row in range(batch)]
    plan = DecodePlan(
        page_ids.to(device),
        torch.tensor(case.lengths, dtype=torch.int32, device=device),
        torch.tensor(p, dtype=torch.float32, device=device),
        torch.tensor(sparse, device=device),
    )
    tensors = (keys, values, min_max, codes, scale_zero)
    cache = LayerCache(*(tensor.to(device) for tensor in tensors))
    return Drawn(q.to(case.dtype).to(device), cache, plan)
