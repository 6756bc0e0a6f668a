"""Learn which request holds which slot, and what it asked for."""

from typing import Any

from twilight_sgl.patches import Patch
from twilight_sgl.request import RequestOptions


def _admitted(slots: list[int] | None, table: Any, reqs: list[Any], *args: Any) -> None:
    runtime = getattr(table, "twilight", None)
    if runtime is not None and slots:
        options = (RequestOptions.from_custom_params(r.sampling_params.custom_params) for r in reqs)
        runtime.on_requests_admitted(slots, options)


PATCHES = [
    Patch(
        target,
        "after",
        _admitted,
        "p per request lives in a device table by request slot",
        ("self", "reqs"),
    )
    for target in (
        "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.alloc",
        "sglang.srt.disaggregation.decode.DecodeReqToTokenPool.alloc",
    )
]
