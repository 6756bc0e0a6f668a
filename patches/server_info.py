"""Show Twilight's configuration and totals in `/server_info`."""

from typing import Any

from twilight_sgl.patches import Patch
from twilight_sgl.telemetry.guard import harmless


@harmless
def _add_state(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    runtime = getattr(scheduler.tp_worker.model_runner, "twilight", None)
    if runtime is not None:
        result.internal_state["twilight"] = runtime.state()


PATCHES = [
    Patch(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        "after",
        _add_state,
        "users read budgets, page reuse and audit totals from /server_info",
        ("self", "recv_req"),
    )
]
