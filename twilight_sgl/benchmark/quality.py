"""What page bounds, B0 and p keep of a real model's attention, in plain PyTorch."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from twilight_sgl.attention.plan import DecodePlan, Selection
from twilight_sgl.benchmark.mass import kept_mass, over_layers, row_figures
from twilight_sgl.benchmark.planted import traced_layers

BOUNDS: dict[str, torch.dtype | None] = {"key": None, "fp8": torch.float8_e4m3fn}
BUDGETS = (1 / 8, 1 / 4, 1 / 2)
PS = (0.85, 0.95, 0.99)
HEADER = (
    "bounds    B0 | candidates: mass  worst head |    p | kept: mass  worst head "
    "|     B1  union | worst layer: mass     B1  union"
)


def _a_row_each(plan: DecodePlan, ps: Sequence[float]) -> DecodePlan:
    """The plan's one request once for every p."""
    rows = {
        field.name: getattr(plan, field.name).expand(len(ps), *getattr(plan, field.name).shape[1:])
        for field in dataclasses.fields(plan)
    }
    rows["p"] = torch.tensor(ps, dtype=torch.float32, device=plan.p.device)
    return DecodePlan(**rows)


def quality(
    path: str,
    selection: Selection,
    *,
    skip_layers: Sequence[int] = (),
    device: str = "cpu",
    report: Callable[[dict[str, object]], None] | None = None,
) -> list[dict[str, object]]:
    """Compare the kept attention mass of a trace over page bounds, B0 and p.

    Args:
        path: see `planted.load_trace`.
        selection: its budget is replaced by each of `BUDGETS`.
        skip_layers: layers to leave out, as serving does.
        report: called with each row as it comes.
    Returns:
        A row for each of `BOUNDS` x `BUDGETS` x `PS` with the figures of `mass.over_layers`.
    """
    rows: list[dict[str, object]] = []
    for bounds, bounds_dtype in BOUNDS.items():
        shape, layers = traced_layers(
            path,
            batch=1,
            p=1.0,
            bounds_dtype=bounds_dtype,
            centred=selection.centred,
            device=device,
            skip_layers=skip_layers,
        )
        plan = _a_row_each(layers.plan, PS)
        for budget in BUDGETS:
            used = dataclasses.replace(selection, budget=budget)
            by_layer = []
            for q, cache in zip(layers.queries, layers.caches, strict=True):
                each = q.expand(len(PS), -1, -1)
                mass = kept_mass(each, cache, plan, used, sm_scale=shape.dim**-0.5)
                by_layer.append(row_figures(mass, plan.seq_lens))
            for index, p in enumerate(PS):
                figures = over_layers([layer[index] for layer in by_layer], layers.layer_ids)
                row: dict[str, object] = {
                    "model": shape.model,
                    "context": shape.context,
                    "estimator": selection.estimator,
                    "bounds": bounds,
                    "selector": selection.selector,
                    "budget": budget,
                    "p": p,
                    **figures,
                }
                rows.append(row)
                if report is not None:
                    report(row)
    return rows


def table_line(row: dict[str, object]) -> str:
    """One row of `quality` under `HEADER`."""
    worst = row["worst_layer"]
    assert isinstance(worst, dict)
    return (
        f"{row['bounds']:6s} {row['budget']:5.3f} | {row['candidate_mass']:16.3f} "
        f"{row['least_candidate_mass']:11.3f} | {row['p']:.2f} | {row['mass']:10.3f} "
        f"{row['least_mass']:11.3f} | {row['head_share']:6.2%} {row['union_share']:6.2%} "
        f"| {worst['layer']:11d} {worst['mass']:5.3f} {worst['head_share']:6.2%} "
        f"{worst['union_share']:6.2%}"
    )
