"""A layer of the benchmark against its references: what comes before any timing."""

import dataclasses

import torch

from twilight_sgl.attention.pipeline import decode_reference
from twilight_sgl.attention.plan import DecodePlan, LayerCache, Selection
from twilight_sgl.attention.triton_pipeline import TritonDecode
from twilight_sgl.benchmark.mass import kept_mass, over_layers, row_figures
from twilight_sgl.benchmark.planted import Layers, Shape

MAX_ERROR = 0.02  # relative, bfloat16 against float32
MAX_KEPT_ERROR = 0.05  # kept tokens, relative to the reference's


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm expected."""
    return ((out.float() - expected.float()).norm() / expected.float().norm()).item()


def first_row(plan: DecodePlan, *, sparse: bool | None = None) -> DecodePlan:
    """The plan's first request alone, made sparse or dense where `sparse` says."""
    row = {f.name: getattr(plan, f.name)[:1] for f in dataclasses.fields(plan)}
    if sparse is not None:
        row["sparse"] = torch.full_like(row["sparse"], sparse)
    return DecodePlan(**row)


def _bytes_by_stage(
    shape: Shape, decode: TritonDecode, cache: LayerCache, plan: DecodePlan
) -> dict[str, int]:
    """Bytes that each stage of the last run must move, read or written once.

    Of rows that are not sparse these are attend's alone.
    """
    batch, sparse = shape.batch, plan.sparse
    key_bytes = cache.keys.element_size()
    full_pages = int(((plan.seq_lens[sparse] - 1).clamp(min=0) // shape.page_size).sum())
    candidates = int(decode.candidate_tokens[:batch][sparse].sum())
    kept = int(decode.kept_tokens[:batch][sparse].sum())
    group = shape.heads_q // shape.heads_kv
    pairs = full_pages * shape.heads_kv
    middle_bytes = 0
    if decode.middles is not None:
        middle_bytes = decode.middles.shape[-1] * decode.middles.element_size()
    logit_bytes = 0 if decode.logits is None else decode.logits.element_size()
    moved = {
        "select": pairs * (2 * shape.dim * cache.min_max.element_size() + 4 + middle_bytes)
        + candidates // shape.page_size * 12,
        "attend": int(decode.kept_tokens[:batch].sum()) * 2 * shape.dim * key_bytes,
    }
    if logit_bytes:
        weighed = shape.dim // 2 + 4  # INT4 codes, scale and zero point
        if decode.selection.estimator == "exact":
            weighed = shape.dim * key_bytes
        moved["estimate"] = candidates * (weighed + group * logit_bytes)
        moved["estimate"] += candidates // shape.page_size * middle_bytes
        moved["top_p"] = candidates * group * logit_bytes
        moved["union"] = candidates * group * logit_bytes + kept * 4
    return moved


def check(
    shape: Shape, layers: Layers, selection: Selection, decode: TritonDecode
) -> tuple[dict[str, object], dict[str, int]]:
    """Run every layer; hold the first, middle and last against the float32 reference.

    Returns:
        A result row, with "wrong" in it where a layer is; else with the budgets and the mass kept
        of every layer's first request.
        Bytes that the stages move for one layer, on average.
    """
    sm_scale = shape.dim**-0.5
    plan, count = layers.plan, len(layers.caches)
    row_plan = first_row(plan)
    result: dict[str, object] = {
        "shape": shape.name,
        **dataclasses.asdict(shape),
        "p": plan.p[0].item(),
        "sparse": bool(plan.sparse[0]),
        "selector": selection.selector,
        "budget": selection.budget,
        "estimator": selection.estimator,
        "bounds": str(layers.caches[0].min_max.dtype).removeprefix("torch."),
        "layers": count,
    }
    worst_error, kept_ratios, figures = 0.0, [], []
    candidate_share = kept_share = 0.0
    moved: dict[str, int] = {}
    for index, (q, cache) in enumerate(zip(layers.queries, layers.caches, strict=True)):
        got = decode.run(q, cache, plan, sm_scale=sm_scale)
        for name, size_bytes in _bytes_by_stage(shape, decode, cache, plan).items():
            moved[name] = moved.get(name, 0) + size_bytes
        candidate_share += got.candidate_tokens.float().mean().item() / shape.context / count
        kept_share += got.kept_tokens.float().mean().item() / shape.context / count
        if index in (0, count // 2, count - 1):
            expected = decode_reference(q[:1], cache, row_plan, selection, sm_scale=sm_scale)
            error = relative_error(got.output[:1], expected.output)
            ratio = (got.kept_tokens[:1].sum() / expected.kept_tokens.sum()).item()
            same_candidates = torch.equal(got.candidate_tokens[:1], expected.candidate_tokens)
            if not (error < MAX_ERROR and abs(ratio - 1) < MAX_KEPT_ERROR and same_candidates):
                result["wrong"] = (
                    f"layer {layers.layer_ids[index]}: error {error:.4f}, kept / reference "
                    f"{ratio:.3f}, candidates {'as' if same_candidates else 'not as'} the reference"
                )
                return result, moved
            worst_error = max(worst_error, error)
            kept_ratios.append(ratio)
        if bool(plan.sparse[0]):
            mass = kept_mass(q[:1], cache, row_plan, selection, sm_scale=sm_scale)
            figures += row_figures(mass, row_plan.seq_lens)
    result["error"] = worst_error
    result["kept_to_reference"] = max(kept_ratios, key=lambda ratio: abs(ratio - 1))
    if figures:
        result.update(over_layers(figures, layers.layer_ids))
    result["candidate_share"], result["kept_share"] = candidate_share, kept_share
    return result, {name: size_bytes // count for name, size_bytes in moved.items()}
