"""KV caches with planted attention, in which a known small share of tokens holds the mass.

Random keys give flat attention that top-p cannot prune. Here every query head has its own hot
tokens whose logits stand about `HOT_LOGIT` above the rest, some more, some less. They come in runs
of `RUN_TOKENS`, as retrieved passages do. The heads of a group draw their runs from a common pool,
each a share `DRAW_FROM_POOL` of it, and a hot token is as hot to every head that drew it. The share
differs from KV head to KV head by a factor of `SPREAD`.

What top-p keeps of it, in float32 for one request of 32k tokens at p = 0.95, B0 a quarter of the
context, 16 sink and 64 recent tokens (tests/kernels/test_planted.py checks it at 8k):

| HQ / HK / D | B1 a head | least to greatest head | union | mass kept | in the candidates |
|---|---|---|---|---|---|
| 32 / 8 / 128 | 1.17 % | 0.2 to 3.2 % | 3.1 % | 0.967 | 0.994 |
| 32 / 32 / 128 | 1.19 % | 0.2 to 3.3 % | 1.4 % | 0.944 | 0.995 |
| 14 / 2 / 64 | 1.18 % | 0.14 to 2.3 % | 3.8 % | 0.970 | 0.988 |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch

from twilight_sgl.attention.plan import DecodePlan, LayerCache
from twilight_sgl.errors import TwilightError
from twilight_sgl.kernels.seal.reference import summarize

PAGE_SIZE = 16  # tokens
HOT_LOGIT = 9.0
RUN_TOKENS = 8
SPREAD = 16.0
MEAN_SHARE = 0.02
DRAW_FROM_POOL = 0.45


@dataclass(frozen=True)
class Shape:
    """A model's attention and a decode step: names as in the package's symbols."""

    model: str
    heads_q: int
    heads_kv: int
    dim: int
    batch: int
    context: int
    page_size: int = PAGE_SIZE

    @property
    def name(self) -> str:
        return f"{self.model} {self.batch} x {self.context // 1024}k"

    @property
    def columns(self) -> int:
        return -(-self.context // self.page_size)


@dataclass(frozen=True)
class Layers:
    """Caches of some layers alike in shape, one plan, and each layer's queries [B, HQ, D].

    `layer_ids` says which layers of the model they are; planted ones are numbered from 0.
    """

    queries: list[torch.Tensor]
    caches: list[LayerCache]
    plan: DecodePlan
    layer_ids: tuple[int, ...]


def empty_layers(
    shape: Shape, layers: int, dtype: torch.dtype, p: float, generator: torch.Generator
) -> tuple[list[torch.Tensor], list[torch.Tensor], DecodePlan]:
    """Unwritten key and value pools [P, PS, HK, D] of some layers, and a plan with random pages."""
    device = generator.device
    pool = shape.batch * shape.columns + 1
    page_ids = torch.randperm(pool - 1, generator=generator, device=device).int() + 1
    plan = DecodePlan(
        page_ids.view(shape.batch, shape.columns).contiguous(),
        torch.full((shape.batch,), shape.context, dtype=torch.int32, device=device),
        torch.full((shape.batch,), p, dtype=torch.float32, device=device),
        torch.ones(shape.batch, dtype=torch.bool, device=device),
    )
    size = (pool, shape.page_size, shape.heads_kv, shape.dim)
    keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(layers)]
    values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(layers)]
    return keys, values, plan


def with_summaries(
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    plan: DecodePlan,
    bounds_dtype: torch.dtype,
    centred: bool = False,
) -> list[LayerCache]:
    """Seal every full page of the plan in all layers, with min/max in bounds_dtype.

    The kernel seals on a GPU, the reference it is bit-equal to on the CPU.
    """
    device = keys[0].device
    pool, page_size, heads_kv, dim = keys[0].shape
    layers = len(keys)
    min_max = torch.empty(layers, pool, heads_kv, 2, dim, dtype=bounds_dtype, device=device)
    codes = torch.empty(
        layers, pool, heads_kv, page_size, dim // 2, dtype=torch.uint8, device=device
    )
    scale_zero = torch.empty(
        layers, pool, heads_kv, page_size, 2, dtype=torch.float16, device=device
    )
    column = torch.arange(plan.page_ids.shape[1], device=device)
    full = column < ((plan.seq_lens - 1).clamp(min=0) // page_size).unsqueeze(1)
    listed = plan.page_ids[full].contiguous()
    if keys[0].is_cuda:
        from twilight_sgl.kernels.seal.triton import layer_pointers, seal_pages

        count = torch.tensor([listed.numel()], dtype=torch.int32, device=device)
        summaries = (min_max, codes, scale_zero)
        seal_pages(keys, layer_pointers(keys), *summaries, listed, count, centred=centred)
    else:
        for layer in range(layers):
            rows = summarize(keys[layer][listed], bounds_dtype, centred)
            min_max[layer][listed], codes[layer][listed], scale_zero[layer][listed] = rows
    return [
        LayerCache(keys[i], values[i], min_max[i], codes[i], scale_zero[i]) for i in range(layers)
    ]


def _plant_row(
    shape: Shape, q: torch.Tensor, share: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """[N, HK, D] float32 keys of one request for its queries q [HK, G, D], each planted share."""
    device = q.device
    heads_kv, group, dim = q.shape
    runs = -(-shape.context // RUN_TOKENS)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    def first(count: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """True for the `count`, at least one, lowest along the first dimension."""
        return order.argsort(0).argsort(0) < count.round().clamp(min=1)

    drawn_share = share.unsqueeze(-1) * runs  # [HK, 1]
    pool = first(drawn_share / (1.0 if group == 1 else DRAW_FROM_POOL), normal(runs, heads_kv, 1))
    drawn = first(drawn_share, normal(runs, heads_kv, group).masked_fill(~pool, torch.inf))
    hot = drawn.repeat_interleave(RUN_TOKENS, 0)[: shape.context]  # [N, HK, G]
    heat = HOT_LOGIT + normal(shape.context, heads_kv, 1)
    # A key along row g of the pseudo-inverse has a logit with query g and none with the others.
    direction = torch.linalg.pinv(q).mT * math.sqrt(dim)
    keys = normal(shape.context, heads_kv, dim)
    return keys + torch.einsum("nhg,hgd->nhd", hot * heat, direction)


def planted_layers(
    shape: Shape,
    *,
    layers: int,
    p: float,
    dtype: torch.dtype = torch.bfloat16,
    bounds_dtype: torch.dtype | None = None,
    centred: bool = False,
    device: str = "cuda",
    seed: int = 0,
) -> Layers:
    """Draw layers with planted attention; every request has `shape.context` tokens.

    Args:
        centred: whether INT4 keys are less their page's middle, as for `summarize`.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    keys, values, plan = empty_layers(shape, layers, dtype, p, generator)
    queries = []
    group = shape.heads_q // shape.heads_kv
    exponent = torch.linspace(-0.5, 0.5, max(shape.heads_kv, 2), device=device)[: shape.heads_kv]
    share = SPREAD**exponent
    share *= MEAN_SHARE / share.mean()
    for layer in range(layers):
        q = torch.randn(
            shape.batch, shape.heads_kv, group, shape.dim, generator=generator, device=device
        )
        for row in range(shape.batch):
            planted = _plant_row(shape, q[row], share.roll(row + layer), generator).to(dtype)
            padded = planted.new_zeros(shape.columns * shape.page_size, shape.heads_kv, shape.dim)
            padded[: shape.context] = planted
            pages = plan.page_ids[row].long()
            keys[layer][pages] = padded.view(-1, *keys[layer].shape[1:])
            values[layer][pages] = torch.randn(
                padded.shape, generator=generator, device=device, dtype=dtype
            ).view(-1, *values[layer].shape[1:])
        queries.append(q.flatten(1, 2).to(dtype))
    caches = with_summaries(keys, values, plan, bounds_dtype or dtype, centred)
    return Layers(queries, caches, plan, tuple(range(layers)))


def load_trace(path: str, *, skip_layers: Sequence[int] = ()) -> dict[str, Any]:
    """Read a trace and check it.

    Args:
        path: a `torch.save` file of {"model": str, "layers": [{"q": [HQ, D], "keys": [N, HK, D]},
            ...]}: one decode step's queries and rotated keys, scaled so that q . k / sqrt(D) is
            the logit; "values" [N, HK, D] and "layer", the layer's number, if there.
        skip_layers: numbers of layers to leave out.
    Raises:
        TwilightError: the file is none, or nothing is left of it.
    """
    try:
        trace = torch.load(path, map_location="cpu", weights_only=True)
        layers = [
            {"layer": index, "values": torch.randn(layer["keys"].shape), **layer}
            for index, layer in enumerate(trace["layers"])
        ]
        alike = {(layer["q"].shape, layer["keys"].shape, layer["values"].shape) for layer in layers}
        whole = all(keys == values and q[1] == keys[2] for q, keys, values in alike)
    except (OSError, KeyError, TypeError, IndexError, AttributeError, UnpicklingError) as error:
        raise TwilightError(
            f"--trace {path} is not a trace ({type(error).__name__}): make one with "
            "`python -m twilight_sgl.benchmark record`"
        ) from error
    if len(alike) > 1 or not whole:
        raise TwilightError(
            f"--trace {path} has layers of other shapes: record layers alike with "
            "`python -m twilight_sgl.benchmark record --layers`"
        )
    layers = [layer for layer in layers if layer["layer"] not in skip_layers]
    if not layers:
        raise TwilightError(f"--trace {path} has no layer left: name fewer in --skip-layers")
    return {"model": trace.get("model", "trace"), "layers": layers}


def traced_layers(
    path: str,
    *,
    batch: int,
    p: float,
    dtype: torch.dtype = torch.bfloat16,
    bounds_dtype: torch.dtype | None = None,
    centred: bool = False,
    device: str = "cuda",
    skip_layers: Sequence[int] = (),
) -> tuple[Shape, Layers]:
    """Layers from a trace of a real model, see `load_trace`.

    Args:
        batch: how often to repeat the request, in pages of its own.
        centred: whether INT4 keys are less their page's middle, as for `summarize`.
    """
    trace = load_trace(path, skip_layers=skip_layers)
    first = trace["layers"][0]
    context, heads_kv, dim = first["keys"].shape
    shape = Shape(trace["model"], first["q"].shape[0], heads_kv, dim, batch, context)
    generator = torch.Generator(device=device).manual_seed(0)
    keys, values, plan = empty_layers(shape, len(trace["layers"]), dtype, p, generator)
    queries = []
    for index, layer in enumerate(trace["layers"]):
        for name, pool in (("keys", keys[index]), ("values", values[index])):
            padded = torch.zeros(shape.columns * shape.page_size, heads_kv, dim, dtype=dtype)
            padded[:context] = layer[name].to(dtype)
            by_page = padded.view(-1, *pool.shape[1:]).to(device)
            for request in range(batch):
                pool[plan.page_ids[request].long()] = by_page
        queries.append(layer["q"].to(dtype).to(device).expand(batch, -1, -1).contiguous())
    caches = with_summaries(keys, values, plan, bounds_dtype or dtype, centred)
    return shape, Layers(queries, caches, plan, tuple(layer["layer"] for layer in trace["layers"]))
