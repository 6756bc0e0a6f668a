"""Totals that `/server_info` shows, read back: of all replicas, and between two moments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Totals:
    """Counts over sparse rows of decode steps, summed over the data-parallel replicas.

    Of tensor-parallel servers, KV heads are those of rank 0.

    Attributes:
        sparse_rows: rows that selected.
        context_tokens, candidate_tokens, kept_tokens: over rows, layers that select and KV heads.
        layer_ids: model layers of the L rows of the arrays.
        head_kept_tokens: float64 [L, HK], over rows; of no shape before the first sparse row.
        head_kept_mass: likewise, of each row's share of the candidates' estimated weight.
    """

    sparse_rows: int
    context_tokens: int
    candidate_tokens: int
    kept_tokens: int
    layer_ids: tuple[int, ...]
    head_kept_tokens: npt.NDArray[np.float64]
    head_kept_mass: npt.NDArray[np.float64]

    def since(self, earlier: "Totals") -> "Totals":
        """What was counted after `earlier`."""
        return Totals(
            sparse_rows=self.sparse_rows - earlier.sparse_rows,
            context_tokens=self.context_tokens - earlier.context_tokens,
            candidate_tokens=self.candidate_tokens - earlier.candidate_tokens,
            kept_tokens=self.kept_tokens - earlier.kept_tokens,
            layer_ids=self.layer_ids,
            head_kept_tokens=self.head_kept_tokens - earlier.head_kept_tokens,
            head_kept_mass=self.head_kept_mass - earlier.head_kept_mass,
        )

    def kept_mass(self) -> float | None:
        """Mean share of the candidates' estimated weight; None without a sparse row."""
        return float(self.head_kept_mass.mean()) / self.sparse_rows if self.sparse_rows else None

    def shares(self) -> dict[str, Any]:
        """Counts and means as plain JSON types; means of nothing are None.

        Returns:
            `context_tokens`, `sparse_rows`; `candidate_share` and `kept_share` of the context;
            `kept_mass`.
        """
        context = self.context_tokens
        return {
            "context_tokens": context,
            "sparse_rows": self.sparse_rows,
            "candidate_share": self.candidate_tokens / context if context else None,
            "kept_share": self.kept_tokens / context if context else None,
            "kept_mass": self.kept_mass(),
        }

    def heads(self) -> dict[str, Any] | None:
        """Means of each layer and KV head as plain JSON types; None without a sparse row.

        Returns:
            `layer_ids` [L]; `kept_fraction` of the context and `kept_mass`, [L][HK].
        """
        if not self.sparse_rows:
            return None
        # Every layer and head has the same rows, so the same context.
        context = self.context_tokens / self.head_kept_tokens.size
        return {
            "layer_ids": list(self.layer_ids),
            "kept_fraction": (self.head_kept_tokens / context).round(6).tolist(),
            "kept_mass": (self.head_kept_mass / self.sparse_rows).round(6).tolist(),
        }


def twilight_states(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Twilight's part of `/server_info`, one a replica; none for servers that decode otherwise."""
    states = [state.get("twilight") for state in info.get("internal_states") or []]
    return [state for state in states if state] if all(states) else []


def add_up(states: Sequence[Mapping[str, Any]]) -> Totals:
    """The totals of replicas, of which there is at least one."""
    budgets = [state["budget"] for state in states]
    rows = [state["steps"]["sparse_rows"] for state in states]
    tokens, mass = np.zeros(()), np.zeros(())
    for state, budget, count in zip(states, budgets, rows, strict=True):
        if count:  # they are shown as means
            fraction = np.asarray(state["heads"]["kept_fraction"], np.float64)
            tokens = tokens + fraction * (budget["context_tokens"] / fraction.size)
            mass = mass + np.asarray(state["heads"]["kept_mass"], np.float64) * count
    return Totals(
        sparse_rows=sum(rows),
        context_tokens=sum(budget["context_tokens"] for budget in budgets),
        candidate_tokens=sum(budget["candidate_tokens"] for budget in budgets),
        kept_tokens=sum(budget["kept_tokens"] for budget in budgets),
        layer_ids=tuple(states[0]["heads"]["layer_ids"]),
        head_kept_tokens=tokens,
        head_kept_mass=mass,
    )


def between(before: Mapping[str, Any], after: Mapping[str, Any]) -> Totals | None:
    """What was counted between two `/server_info`; None without Twilight."""
    states = (twilight_states(before), twilight_states(after))
    if not states[0] or not states[1]:
        return None
    return add_up(states[1]).since(add_up(states[0]))
