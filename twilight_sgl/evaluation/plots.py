"""Pictures of a report: accuracy against the budget, budgets by head, kept mass against p."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from twilight_sgl.benchmark.decode_figures import COLOURS
from twilight_sgl.evaluation import budgets
from twilight_sgl.evaluation.records import Run
from twilight_sgl.evaluation.scoring import mean
from twilight_sgl.evaluation.tables import contexts_of, scored_keys, scores_of
from twilight_sgl.evaluation.tasks import TASKS

ACCURACY, HEADS, MASS = "accuracy.png", "heads.png", "mass.png"
_MARKERS = "osD^vP*X"
_TICKS = 16  # layers that are named, at most


def draw(runs: Mapping[str, Run], folder: Path) -> list[str]:
    """Draw what there is data for; returns the names of the files.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for name, make in ((ACCURACY, _accuracy), (HEADS, _heads), (MASS, _mass)):
        figure = make(runs, pyplot)
        if figure is not None:
            figure.savefig(folder / name, dpi=130)
            pyplot.close(figure)
            drawn.append(name)
    return drawn


def _accuracy(runs: Mapping[str, Run], pyplot: Any) -> Any | None:
    """Mean score against the average budget, a mark for each method and context."""
    contexts = contexts_of({key for run in runs.values() for key in scored_keys(run)})
    if not contexts:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for colour, (method, run) in enumerate(runs.items()):
        for marker, context in enumerate(contexts):
            scores = scores_of(run, [key for key in scored_keys(run) if key[1] == context])
            if not scores:
                continue
            got = mean(scores)
            share = budgets.share(budgets.spent(run, context, TASKS), "kept_share")
            axes.errorbar(
                1.0 if share is None else share,
                100 * got.value,
                yerr=[[100 * (got.value - got.low)], [100 * (got.high - got.value)]],
                color=COLOURS[colour % len(COLOURS)],
                marker=_MARKERS[marker % len(_MARKERS)],
                capsize=2,
                linestyle="none",
            )
        axes.plot([], [], color=COLOURS[colour % len(COLOURS)], linewidth=4, label=method)
    for marker, context in enumerate(contexts):
        axes.plot(
            [], [], _MARKERS[marker % len(_MARKERS)], color="black", label=f"{context} tokens"
        )
    axes.set_xscale("log")
    axes.set_xlabel("tokens attended to in sparse decode steps, of the context")
    axes.set_ylabel("average score, % (95 % interval)")
    axes.legend(fontsize=8)
    return figure


def _heads(runs: Mapping[str, Run], pyplot: Any) -> Any | None:
    """Kept fraction by layer and KV head, a strip for each method, all in one scale of colours."""
    strips = {method: budgets.heads(run) for method, run in runs.items()}
    told = {method: heads for method, heads in strips.items() if heads is not None}
    if not told:
        return None
    from matplotlib.colors import LogNorm

    values = [100 * heads.kept_fraction for heads in told.values()]
    positive = [float(each[each > 0].min()) for each in values if (each > 0).any()]
    low, high = min(positive, default=0.01), max(max(float(each.max()) for each in values), 0.01)
    layers, kv_heads = values[0].shape
    figure, grid = pyplot.subplots(
        len(told),
        1,
        figsize=(2.2 + 0.22 * max(layers, 16), 0.9 + len(told) * (0.5 + 0.22 * kv_heads)),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    shown = None
    for axes, (method, heads) in zip(grid[:, 0], told.items(), strict=True):
        share = 100 * heads.kept_fraction.T
        norm = LogNorm(min(low, high * 0.999), high)
        shown = axes.imshow(share.clip(low), aspect="auto", norm=norm, cmap="viridis")
        axes.set_title(method, fontsize=9, loc="left")
        axes.set_yticks(range(len(share)))
        axes.tick_params(labelsize=7)
        axes.set_ylabel("KV head", fontsize=8)
    step = -(-layers // _TICKS)
    ids = next(iter(told.values())).layer_ids
    grid[-1, 0].set_xticks(range(0, layers, step), ids[::step])
    grid[-1, 0].set_xlabel("layer", fontsize=8)
    bar = figure.colorbar(shown, ax=list(grid[:, 0]), pad=0.01)
    bar.set_label("tokens kept, % of the context", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    ticks = [float(f"{tick:.2g}") for tick in np.geomspace(low, high, 8)[1:-1]]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    return figure


def _mass(runs: Mapping[str, Run], pyplot: Any) -> Any | None:
    """Mass that steps kept of their candidates, against the p that was asked for."""
    series: dict[str, list[tuple[float, float]]] = {}
    selectors = {run.settings["server"]["selector"] for run in runs.values() if _has_p(run)}
    for run in filter(_has_p, runs.values()):
        for context in contexts_of(run.samples):
            mass, p = budgets.kept_mass(budgets.spent(run, context)), budgets.p_of(run)
            if mass is None or p is None:
                continue
            name = f"{context} tokens"
            if len(selectors) > 1:
                name = f"{run.settings['server']['selector']}, {name}"
            series.setdefault(name, []).append((p, mass))
    if not series:
        return None
    figure, axes = pyplot.subplots(figsize=(5.5, 4.5), layout="constrained")
    ends = [value for points in series.values() for point in points for value in point]
    low = max(min(ends) - 0.05, 0.0)
    axes.plot([low, 1], [low, 1], color=COLOURS[0], linestyle="--", linewidth=1, label="mass = p")
    for place, (name, points) in enumerate(series.items()):
        axes.plot(
            *zip(*sorted(points), strict=True),
            color=COLOURS[1:][place % (len(COLOURS) - 1)],
            marker=_MARKERS[place % len(_MARKERS)],
            linewidth=1,
            label=name,
        )
    axes.set_xlim(low, 1.01)
    axes.set_ylim(low, 1.01)
    axes.set_xlabel("p")
    axes.set_ylabel("mass kept, of the candidates' estimated weight")
    axes.legend(fontsize=8)
    return figure


def _has_p(run: Run) -> bool:
    return budgets.p_of(run) is not None
