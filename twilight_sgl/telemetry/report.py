"""What one request's decode steps kept, from the device's sums to its response."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from twilight_sgl.errors import TwilightError
from twilight_sgl.kernels.count.reference import ROW_SUMS
from twilight_sgl.telemetry.guard import harmless


class StepSums:
    """A step's sums by row of its batch, which the GPU may still have to write.

    Args:
        sums: [B, 5] float64 on the host, see `ROW_SUMS`; complete when first asked for a row.
        is_kept: whether they are still those of this step; asked at the same time.
    Raises:
        TwilightError: the sums are others.
    """

    def __init__(self, sums: torch.Tensor, is_kept: Callable[[], bool]) -> None:
        if sums.shape[1] != len(ROW_SUMS):
            raise TwilightError(f"a step's sums are {tuple(sums.shape)}, each row wants {ROW_SUMS}")
        self._sums = sums
        self._is_kept = is_kept
        self._rows: list[tuple[float, ...]] | None = None

    def __getitem__(self, row: int) -> tuple[float, ...] | None:
        if self._rows is None:
            self._rows = self._read() or []
        return self._rows[row] if row < len(self._rows) else None

    @harmless
    def _read(self) -> list[tuple[float, ...]]:
        if not self._is_kept():
            raise TwilightError(
                "a step's budgets were overwritten before SGLang read its result: it runs further "
                "ahead than reports can follow, and they now lack steps"
            )
        return list(map(tuple, self._sums.tolist()))  # of a list SGLang would make a copy


class RequestReport:
    """Sums over one request's sparse steps.

    To SGLang it is a list with a value for each output token: it appends a step's sums, and sends
    slices to the process that answers. `ReportedOnce` sees to it that only the slice that ends a
    finished request is sent. It holds the report in its last place, and None in as many others as
    there are tokens, since a stream of deltas cuts off those of the tokens before.

    Args:
        req: SGLang's request.
        p: mass in force; None for a request that opted out.
        pairs: L * HK, of the layers that select and this rank's KV heads.
    """

    def __init__(self, req: Any, p: float | None, pairs: int) -> None:
        self._req = weakref.ref(req)
        self._p = p
        self._pairs = pairs
        self._steps = 0
        self._context = self._kept = self._mass = self._reused = 0.0

    def append(self, sums: Sequence[float] | None) -> None:
        """Add a row of `StepSums`; a step in which the request was dense has none."""
        if not sums or sums[0] <= 0:
            return
        context, _, kept, mass, reused = sums
        self._context += context
        self._kept += kept
        self._mass += mass
        if not self._steps:  # not again after a retraction
            self._reused = reused
        self._steps += 1

    @property
    def is_due(self) -> bool:
        """Whether the request has ended."""
        req = self._req()
        return req is not None and req.finished()

    def __getitem__(self, tokens: slice) -> list[dict[str, Any] | None]:
        values: list[dict[str, Any] | None] = [None] * tokens.stop
        if values and self.is_due:
            values[-1] = self.to_dict()
        return values

    @harmless
    def to_dict(self) -> dict[str, Any]:
        """The report as responses show it.

        Returns:
            p: mass in force, None if the request opted out; steps: sparse decode steps;
            average_budget: mean tokens attended to by a KV head of a layer in a step;
            kept_fraction: of the context's tokens; kept_mass: of the candidates' estimated weight
            (all three None without a sparse step); prefix_pages_reused: pages found sealed in
            the first of these steps.
        """
        counted = self._steps * self._pairs
        return {
            "p": self._p,
            "steps": self._steps,
            "average_budget": self._kept / counted if counted else None,
            "kept_fraction": self._kept / self._context if self._context else None,
            "kept_mass": self._mass / counted if counted else None,
            "prefix_pages_reused": int(self._reused),
        }


class ReportedOnce(dict[str, Any]):
    """A request's values by name, as SGLang keeps them; a report is shown once it is due.

    Sent with every token, it would cost the scheduler and the process that answers a list, and its
    pickling, a request and step.
    """

    def items(self) -> Any:
        """The values to send now."""
        return [
            (name, values)
            for name, values in super().items()
            if not isinstance(values, RequestReport) or values.is_due
        ]


def last_report(values: Any) -> dict[str, Any] | None:
    """The report among a response's values by token, or None."""
    if isinstance(values, list):
        return next((value for value in reversed(values) if isinstance(value, dict)), None)
    return None
