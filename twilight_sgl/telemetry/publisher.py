"""Hands the newest totals to whoever shows them, from the scheduler's thread."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Protocol

from twilight_sgl.telemetry.guard import harmless
from twilight_sgl.telemetry.snapshot import Snapshot

INTERVAL_SECONDS = 1.0
OF_A_MOMENT = ("time", "layer_ids", "pages_capacity", "pages_sealed")  # these are no sums


def difference(newer: Snapshot, older: Snapshot | None) -> Snapshot:
    """What was added to the totals from one moment to a later one.

    Times, layers, `pages_capacity` and `pages_sealed` are those of the later moment. Without an
    older one it is all since the server started.
    """
    if older is None:
        return newer
    added = {
        field.name: getattr(newer, field.name) - getattr(older, field.name)
        for field in fields(Snapshot)
        if field.name not in OF_A_MOMENT
    }
    return replace(newer, **added)


class Sink(Protocol):
    """What shows totals: Prometheus series, or events."""

    def publish(self, totals: Snapshot, change: Snapshot) -> None:
        """Show new totals, and what was added since the last ones; must not block."""


class Publisher:
    """Polls totals at most once a second and gives every sink what is new.

    `tick` is called between steps, from the thread that launches them: the host's counts are
    read where nothing writes them, and no other thread needs the interpreter during a step.

    Args:
        poll: the newest totals, or None; must not block.
        sinks: one that raises is logged once, and stops neither the others nor a request.
        clock: seconds.
    """

    def __init__(
        self,
        poll: Callable[[], Snapshot | None],
        sinks: Sequence[Sink],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._poll = harmless(poll)
        self._publish = [harmless(sink.publish) for sink in sinks]
        self._clock = clock
        self._due = -math.inf if sinks else math.inf
        self._newest: Snapshot | None = None

    def tick(self) -> None:
        """Publish if a second has passed; costs a look at the clock otherwise."""
        now = self._clock()
        if now < self._due:
            return
        self._due = now + INTERVAL_SECONDS
        totals = self._poll()
        if totals is None or totals is self._newest:
            return
        change = difference(totals, self._newest)
        self._newest = totals
        for publish in self._publish:
            publish(totals, change)
