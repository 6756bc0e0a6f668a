"""What a run's decode steps kept, from the counts of the server while it was evaluated."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twilight_sgl.evaluation.records import Run


@dataclass(frozen=True)
class Heads:
    """Means of layers that select and KV heads; arrays are float64 [L, HK].

    Attributes:
        layer_ids: model layers of the L rows.
        kept_fraction: tokens attended to, of the context.
        kept_mass: share of the candidates' estimated weight.
    """

    layer_ids: list[int]
    kept_fraction: npt.NDArray[np.float64]
    kept_mass: npt.NDArray[np.float64]


def spent(run: Run, context: int, tasks: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Budgets of a context; those of the named tasks alone if they are named."""
    named = None if tasks is None else set(tasks)
    return [
        each["budget"]
        for each in run.budgets
        if each["context"] == context and (named is None or each["task"] in named)
    ]


def share(budgets: Iterable[dict[str, Any]], name: str) -> float | None:
    """A share of the context, over sparse decode steps; None if no step was sparse."""
    return _weighted(budgets, name, "context_tokens")


def kept_mass(budgets: Iterable[dict[str, Any]]) -> float | None:
    """Share of the candidates' estimated weight, over sparse rows; None if there was none."""
    return _weighted(budgets, "kept_mass", "sparse_rows")


def heads(run: Run) -> Heads | None:
    """Over all that a run's steps kept; None if no step was sparse."""
    told = [each["budget"] for each in run.budgets if each["budget"].get("heads")]
    if not told:
        return None
    fraction, mass = (
        np.average(
            [each["heads"][name] for each in told], axis=0, weights=[each[by] for each in told]
        )
        for name, by in (("kept_fraction", "context_tokens"), ("kept_mass", "sparse_rows"))
    )
    return Heads(told[0]["heads"]["layer_ids"], fraction, mass)


def p_of(run: Run) -> float | None:
    """The mass that top-p was to keep; None where nothing is pruned by it."""
    server = run.settings.get("server")
    if run.settings["dense"] or server is None or server.get("pruner") == "none":
        return None
    return (run.settings.get("request") or {}).get("p", server["p"])


def _weighted(budgets: Iterable[dict[str, Any]], name: str, by: str) -> float | None:
    pairs = [
        (each[name], each[by]) for each in budgets if each.get(by) and each.get(name) is not None
    ]
    weight = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / weight if weight else None
