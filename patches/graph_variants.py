"""A second decode graph for every batch size, without selection, for steps that cost less dense."""

import dataclasses
from typing import Any

from twilight_sgl.patches import Patch

RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
DENSE = "dense"


def captured_backend(runner: Any) -> Any:
    """The Twilight backend of a graph runner that captures ordinary decode steps, or None."""
    if not runner.capture_forward_mode.is_decode():
        return None
    backend = getattr(runner.attn_backend, "decode_backend", runner.attn_backend)
    return backend if hasattr(backend, "wants_dense_graphs") else None


def _backend(runner: Any) -> Any:
    """The same where it wants dense graphs beside the others."""
    backend = captured_backend(runner)
    return backend if backend is not None and backend.wants_dense_graphs else None


def _capture_both(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    backend = _backend(runner)
    if backend is not None:
        backend.captures_dense = True
        try:
            original(runner, *args, **kwargs)
        finally:
            backend.captures_dense = False
        backend.has_dense_graphs = True
    return original(runner, *args, **kwargs)


def _name_dense(key: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    backend = _backend(runner)
    if backend is None or not backend.dense_step:
        return key
    label = DENSE if key.variant_label is None else f"{key.variant_label}-{DENSE}"
    return dataclasses.replace(key, variant_label=label)


PATCHES = [
    Patch(
        f"{RUNNER}.capture_one_shape",
        "around",
        _capture_both,
        "short contexts and small batches decode faster without selection",
        ("self", "size", "forward"),
    ),
    Patch(
        f"{RUNNER}._make_graph_key",
        "after",
        _name_dense,
        "both graphs of a batch size need a name of their own",
        ("self", "size", "stream_idx", "variant_label"),
    ),
]
