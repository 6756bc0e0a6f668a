"""Random KV caches, plans and shapes for kernel tests."""

from dataclasses import dataclass, replace

import torch

from twilight_sgl.attention import selectors
from twilight_sgl.attention.pipeline import LayerOutput
from twilight_sgl.attention.plan import DecodePlan, LayerCache, Selection
from twilight_sgl.attention.triton_pipeline import TritonDecode
from twilight_sgl.kernels.attend.reference import attend
from twilight_sgl.kernels.estimate.reference import candidate_tokens, estimate_logits
from twilight_sgl.kernels.row import Token
from twilight_sgl.kernels.seal.reference import summarize
from twilight_sgl.kernels.select.reference import forced_pages, num_strata, select_pages
from twilight_sgl.kernels.top_p.reference import forced_tokens, keep_union, kept_mass, top_p_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """A decode step to draw.

    Attributes:
        lengths: tokens of each request, 0 for a padded row.
        dense: rows that are not sparse.
        p: mass to keep, one for all rows or one each.
        key_offset: what is added to the keys of two channels, as biases do.
        sink_logits: standard deviation of learned attention sinks; None for none.
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
    bounds_dtype: torch.dtype | None = None
    logit_cap: float = 0.0
    sink_logits: float | None = None
    q_scale: float = 1.0
    key_offset: float = 0.0
    prune: bool = True
    min_candidate_tokens: int = 0
    selector: str = "quest"

    @property
    def selection(self) -> Selection:
        return Selection(
            self.page_size,
            self.budget,
            self.sink_tokens,
            self.recent_tokens,
            self.estimator,
            selector=self.selector,
            min_candidate_tokens=self.min_candidate_tokens,
        )


@dataclass(frozen=True)
class Drawn:
    q: torch.Tensor
    cache: LayerCache
    plan: DecodePlan
    sinks: torch.Tensor | None = None


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
    keys[..., [1, case.dim - 2]] += case.key_offset
    keys, values = keys.to(cache_dtype), values.to(cache_dtype)
    min_max = torch.full((pool, case.heads_kv, 2, case.dim), nan)
    min_max = min_max.to(case.bounds_dtype or cache_dtype)
    codes = torch.full((pool, case.heads_kv, size, case.dim // 2), 255, dtype=torch.uint8)
    scale_zero = torch.full((pool, case.heads_kv, size, 2), nan, dtype=torch.float16)
    if full:
        summaries = summarize(keys[full], case.bounds_dtype, case.selection.centred)
        min_max[full], codes[full], scale_zero[full] = summaries
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
    sinks = None
    if case.sink_logits is not None:
        sinks = torch.randn(case.heads_q, generator=rng) * case.sink_logits
        sinks = sinks.to(case.dtype).to(device)
    return Drawn(q.to(case.dtype).to(device), cache, plan, sinks)


def take_token(drawn: Drawn) -> tuple[Drawn, Token]:
    """The same with NaN in the cache where each row's newest token is, and that token."""
    cache, plan = drawn.cache, drawn.plan
    newest = plan.seq_lens.long() - 1
    page = plan.page_ids.gather(1, (newest.clamp(min=0) // cache.keys.shape[1]).unsqueeze(1))
    at = (page[:, 0].long(), newest.clamp(min=0) % cache.keys.shape[1])
    keys, values = cache.keys.clone(), cache.values.clone()
    token = (keys[at], values[at])
    live = newest >= 0
    for cached in (keys, values):
        cached[at[0][live], at[1][live]] = float("nan")
    return replace(drawn, cache=replace(cache, keys=keys, values=values)), token


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they are equal, NaN too."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def chosen_positions(decode: TritonDecode, drawn: Drawn) -> torch.Tensor:
    """[B, HK, C] candidate pages that the last run used, -1 behind the last; all of dense rows."""
    plan = drawn.plan
    batch, columns = plan.page_ids.shape
    size = decode.selection.page_size
    pages = (plan.seq_lens + size - 1) // size
    candidates = decode.candidate_page_ids[:batch]
    heads_kv, width = candidates.shape[1:]
    column = torch.arange(max(columns, width), device=plan.seq_lens.device)
    # Where each physical page is in its row's table; -7 for one that the row does not have.
    places = torch.full((batch, drawn.cache.keys.shape[0]), -7, device=plan.seq_lens.device)
    row, place = (column[:columns] < pages.unsqueeze(1)).nonzero(as_tuple=True)
    places[row, plan.page_ids[row, place].long()] = place
    count = torch.where(plan.sparse.unsqueeze(1), decode.counts[:batch], pages.unsqueeze(1))
    behind = column >= count.unsqueeze(-1)
    sparse = plan.sparse.view(-1, 1, 1)
    listed = candidates.long().masked_fill(behind[..., :width] | ~sparse, 0).flatten(1)
    found = column.expand(batch, heads_kv, -1).clone()
    found[..., :width] = torch.where(
        sparse, places.gather(1, listed).view_as(candidates), column[:width]
    )
    return found.int().masked_fill(behind, -1)


def expected_output(case: Case, drawn: Drawn, positions: torch.Tensor) -> LayerOutput:
    """What the references make of given candidates.

    Rounding may swap pages whose scores are nearly equal, so the stages after the selection are
    checked on the pages that the kernels chose.
    """
    cache, plan, selection = drawn.cache, drawn.plan, case.selection
    scales = {"sm_scale": case.dim**-0.5, "logit_cap": case.logit_cap}
    exact = selection.estimator == "exact"
    codes, scale_zero = (None, None) if exact else (cache.codes, cache.scale_zero)
    logits = estimate_logits(
        drawn.q,
        cache.keys,
        codes,
        scale_zero,
        plan.page_ids,
        positions,
        plan.seq_lens,
        **scales,
        min_max=cache.min_max if selection.centred else None,
    )
    slots, token_positions = candidate_tokens(
        plan.page_ids, positions, plan.seq_lens, selection.page_size
    )
    forced = forced_tokens(
        token_positions,
        plan.seq_lens,
        page_size=selection.page_size,
        sink_tokens=selection.sink_tokens,
        recent_tokens=selection.recent_tokens,
    )
    p = plan.p if case.prune else torch.ones_like(plan.p)
    mask = top_p_mask(logits, p)
    kept_slots, kept = keep_union(mask, slots, token_positions, forced, plan.sparse)
    output = attend(
        drawn.q, cache.keys, cache.values, kept_slots, kept, **scales, sinks=drawn.sinks
    )
    mass = kept_mass(logits, mask)
    return LayerOutput(output, (token_positions >= 0).sum(-1).int(), kept, mass)


def check_selection(case: Case, drawn: Drawn, decode: TritonDecode) -> None:
    """The last run's candidates are exactly the reference's for the scores it computed."""
    plan, size = drawn.plan, case.page_size
    columns = plan.page_ids.shape[1]
    scores, rounding = scores_by_page(decode, drawn)
    full = torch.arange(columns, device=scores.device) < ((plan.seq_lens - 1) // size).unsqueeze(1)
    forced = forced_pages(plan.seq_lens, columns, size, case.sink_tokens, case.recent_tokens)
    scored = (full & ~forced & plan.sparse.unsqueeze(1)).unsqueeze(1)
    reference = selectors.get(case.selector)(drawn.q, drawn.cache, plan.page_ids)
    if scored.any():
        wanted = torch.where(scored, reference, 0.0)
        error = (torch.where(scored, scores, 0.0) - wanted).abs().max()
        tolerance = (1e-3 if case.bounds_dtype else 1e-4) + rounding
        assert error <= tolerance * wanted.abs().max() + 1e-6
    expected, _ = select_pages(
        torch.where(scored, scores, 0.0),
        plan.seq_lens,
        plan.sparse,
        page_size=size,
        budget=case.budget,
        sink_tokens=case.sink_tokens,
        recent_tokens=case.recent_tokens,
        least_tokens=case.min_candidate_tokens,
    )
    got = chosen_positions(decode, drawn)[..., : expected.shape[-1]]
    assert torch.equal(ascending(got), expected)


def ascending(positions: torch.Tensor) -> torch.Tensor:
    """Positions in ascending order, the -1 of none behind them."""
    none = 1 << 30
    ordered = positions.masked_fill(positions < 0, none).sort(-1).values
    return ordered.masked_fill(ordered == none, -1)


def scores_by_page(decode: TritonDecode, drawn: Drawn) -> tuple[torch.Tensor, float]:
    """[B, HK, T] by logical page what the last run ranked pages by, and how far it was rounded.

    The kernels keep integers in the order of the scores, by stratum, with a page's index in place
    of the lowest bits: as many as the largest stratum needs. What is left of 24 bits is exact.
    """
    plan, selection = drawn.plan, decode.selection
    batch, columns = plan.page_ids.shape
    pages = (plan.seq_lens + selection.page_size - 1) // selection.page_size
    strata = num_strata(
        pages,
        decode.counts[:batch, 0],
        page_size=selection.page_size,
        sink_tokens=selection.sink_tokens,
        recent_tokens=selection.recent_tokens,
    )
    by_page = torch.zeros_like(decode.rank_keys[:batch, :, :columns])
    most_bits = 0
    for row in range(batch):
        count, parts = int(pages[row]), int(strata[row])
        page = torch.arange(count, device=by_page.device)
        order = ((page - count) % parts * columns + page).argsort()
        low_bits = max(6, (-(-count // parts) - 1).bit_length())
        most_bits = max(most_bits, low_bits)
        keys = decode.rank_keys[row, :, :count] >> low_bits << low_bits
        by_page[row][:, order] = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys)
    return by_page.view(torch.float32), 2.0 ** (most_bits - 23)
