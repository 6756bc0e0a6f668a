"""Apply what the scheduler queued before each forward of the target model, on its stream."""

from typing import Any

from twilight_sgl.patches import Patch


def _before_forward(model_runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    runtime = getattr(model_runner, "twilight", None)
    if runtime is None:
        return
    runtime.ledger.apply()
    mode = forward_batch.forward_mode
    if not mode.is_decode_or_idle() and forward_batch.out_cache_loc is not None:
        runtime.begin_extend(forward_batch.out_cache_loc)


PATCHES = [
    Patch(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        "before",
        _before_forward,
        "frees and p values must be ordered against the sealing of the steps around them",
        ("self", "forward_batch"),
    )
]
