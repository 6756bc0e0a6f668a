"""What one request's decode steps kept, from the device's sums to its response."""

import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from twilight_sgl.errors import TwilightError
from twilight_sgl.kernels.count.reference import ROW_SUMS
from twilight_sgl.request import KEY
from twilight_sgl.telemetry.guard import harmless

logger = logging.getLogger(__name__)

MOST_STEPS = 8  # whose sums wait to be added up; a GPU's are kept for longer

RowSums = npt.NDArray[np.float64]


class Reports:
    """Sums of steps, which are added up when several have come or when a request has ended.

    To read and add each step's by itself would take the scheduler longer than planning the step.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[Sequence[Any], RowSums, Callable[[], bool]]] = []
        self._lack_steps = False

    def add(self, reqs: Sequence[Any], sums: RowSums, is_kept: Callable[[], bool]) -> None:
        """Note a step whose result SGLang is about to read.

        Args:
            reqs: SGLang's requests, by row; it drops the step of those that have ended or were
                retracted since it was launched.
            sums: [>= B, 5] float64 on the host, see `ROW_SUMS`, 0 where a row was dense; the GPU
                has written them by the time a report is read.
            is_kept: whether they are still those of this step.
        """
        if sums.shape[1] != len(ROW_SUMS):
            raise TwilightError(f"a step's sums are {sums.shape}, each row wants {ROW_SUMS}")
        if len(self._steps) == MOST_STEPS:  # the GPU may not have written the new ones
            self.settle()
        if any(req.finished() or req.is_retracted for req in reqs):
            reqs = [None if req.finished() or req.is_retracted else req for req in reqs]
            if not any(reqs):
                return
        self._steps.append((reqs, sums, is_kept))

    @harmless
    def settle(self) -> None:
        """Add all sums to the reports of their requests."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        kept = [step for step in steps if step[2]()]
        for reqs, of_reqs in itertools.groupby(kept, key=lambda step: step[0]):
            self._add_up(reqs, np.stack([sums[: len(reqs)] for _, sums, _ in of_reqs]))
        if len(kept) < len(steps) and not self._lack_steps:
            self._lack_steps = True
            logger.error(
                "Twilight: a step's budgets were overwritten before SGLang read its result: it "
                "runs further ahead than reports can follow, and they now lack steps"
            )

    @staticmethod
    def _add_up(reqs: Sequence[Any], sums: RowSums) -> None:
        """Add up steps [S, B, 5] of the same requests."""
        selects = sums[:, :, 0] > 0
        steps = selects.sum(0).tolist()
        totals = sums.sum(0).tolist()
        first = sums[selects.argmax(0), np.arange(len(reqs))].tolist()
        for req, count, total, begun in zip(reqs, steps, totals, first, strict=True):
            report = req.customized_info.get(KEY) if req and req.customized_info else None
            if count and report is not None:
                context, _, of_tokens, mass, _ = total
                report.add(count, context, of_tokens, mass, reused=begun[-1])


class RequestReport:
    """Sums over one request's sparse steps.

    To SGLang it is a list with a value for each output token, of which it sends slices to the
    process that answers. `ReportedOnce` sees to it that only the slice that ends a finished request
    is sent. It holds the report in its last place, and None in as many others as there are tokens,
    since a stream of deltas cuts off those of the tokens before.

    Args:
        req: SGLang's request.
        p: mass in force; None for a request that opted out.
        pairs: L * HK, of the layers that select and this rank's KV heads.
        settle: adds what is still to be added.
    """

    def __init__(self, req: Any, p: float | None, pairs: int, settle: Callable[[], None]) -> None:
        self._req = weakref.ref(req)
        self._p = p
        self._pairs = pairs
        self._settle = settle
        self._steps = 0
        self._context = self._kept = self._mass = self._reused = 0.0

    def add(self, steps: int, context: float, kept: float, mass: float, *, reused: float) -> None:
        """Add steps in which the request was sparse, and the pages that the first found sealed."""
        if not self._steps:  # not again after a retraction
            self._reused = reused
        self._context += context
        self._kept += kept
        self._mass += mass
        self._steps += steps

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
        self._settle()
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
