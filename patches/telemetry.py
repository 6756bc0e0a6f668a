"""Follow the scheduler's loop: publish Twilight's totals, and note what a step's requests kept.

Addresses that totals cannot be published at are refused.
"""

from typing import Any

from twilight_sgl.config import TwilightConfig, flag_of
from twilight_sgl.errors import TwilightError
from twilight_sgl.patches import Patch
from twilight_sgl.patches.compat import (
    parallel_layout,
    parallel_state,
    resolved,
    uses_twilight,
)
from twilight_sgl.patches.meta_info import note_sums
from twilight_sgl.telemetry.guard import harmless
from twilight_sgl.telemetry.publisher import Publisher, Sink

SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def _check_events(server_args: Any) -> None:
    if not uses_twilight(server_args):
        return
    config = TwilightConfig.from_environment()
    if config.events is None:
        return
    if not config.telemetry:
        raise TwilightError(
            f"{flag_of('events')} {config.events} has nothing to publish with "
            f"{flag_of('telemetry')} false; drop one of them"
        )
    from twilight_sgl.telemetry.events import check_addresses

    view = resolved(server_args)
    if view.nnodes > 1:  # the address need not be each node's
        return
    replicas, _ = parallel_layout(server_args)
    check_addresses(config.events, view.tp_size * view.pp_size * replicas)


def _tick(scheduler: Any) -> None:
    publisher = getattr(scheduler, "twilight_publisher", None)
    if publisher is None:
        publisher = _publisher(scheduler) or Publisher(lambda: None, ())
        scheduler.twilight_publisher = publisher
    publisher.tick()


@harmless
def _publisher(scheduler: Any) -> Publisher | None:
    runtime = getattr(scheduler.tp_worker.model_runner, "twilight", None)
    if runtime is None or not runtime.config.telemetry:
        return None
    sinks = (_metrics(scheduler), _events(scheduler, runtime.config.events))
    return Publisher(runtime.poll_snapshot, [sink for sink in sinks if sink is not None])


@harmless
def _metrics(scheduler: Any) -> Sink | None:
    if scheduler.metrics_collector is None:
        return None
    from twilight_sgl.telemetry.prometheus import PrometheusSink

    return PrometheusSink(scheduler.metrics_collector.labels)


@harmless
def _events(scheduler: Any, address: str | None) -> Sink | None:
    if address is None:
        return None
    from twilight_sgl.telemetry.events import EventSink, Rank

    parallel = parallel_state(scheduler)
    dp_rank = parallel.dp_rank or 0
    # With data-parallel attention, groups of one replica are told apart by their TP ranks.
    _, groups = parallel_layout(scheduler.tp_worker.model_runner.server_args)
    replica = dp_rank // groups
    index = (replica * parallel.pp_size + parallel.pp_rank) * parallel.tp_size + parallel.tp_rank
    return EventSink(address, Rank(parallel.tp_rank, parallel.pp_rank, dp_rank, index))


def _before_result(scheduler: Any, batch: Any, result: Any, *args: Any, **kwargs: Any) -> None:
    note_sums(scheduler, batch, result)
    _tick(scheduler)


WHY = "metrics and events need the scheduler's thread between steps"

PATCHES = [
    Patch(
        "sglang.srt.server_args.ServerArgs.check_server_args",
        "before",
        _check_events,
        "an address that is taken is refused before weights load",
        ("self",),
    ),
    Patch(
        f"{SCHEDULER}.process_batch_result",
        "before",
        _before_result,
        f"{WHY}: with each batch while it is busy; a report is sent while a result is read",
        ("self", "batch", "result"),
    ),
    Patch(
        f"{SCHEDULER}.on_idle",
        "before",
        _tick,
        f"{WHY}: the last totals must get out once it is idle, before it sleeps",
        ("self",),
    ),
]
