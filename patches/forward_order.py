"""Apply what was noted before a forward of the target model that may seal, on its stream."""

from typing import Any

from twilight_sgl.patches import Patch


def _before_forward(model_runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> None:
    runtime = getattr(model_runner, "twilight", None)
    if runtime is None:
        return
    mode = forward_batch.forward_mode
    if not mode.is_decode_or_idle() and forward_batch.out_cache_loc is not None:
        runtime.ledger.tokens_written(forward_batch.out_cache_loc)
    # An extend leaves it to the next decode step, which may seal. Speculation may write to its
    # tensor of slots again.
    if not mode.is_extend_without_speculative() or runtime.ledger.is_long:
        runtime.ledger.apply()


PATCHES = [
    Patch(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        "before",
        _before_forward,
        "frees and p values must be ordered against the sealing of the steps around them",
        ("self", "forward_batch"),
    )
]
