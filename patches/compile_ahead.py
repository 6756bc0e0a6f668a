"""Compile the kernels of all decode graphs at once, before the first graph is captured."""

import logging
import time
from typing import Any

from twilight_sgl.patches import Patch
from twilight_sgl.patches.graph_variants import RUNNER, captured_backend

logger = logging.getLogger(__name__)


def _compile(runner: Any) -> None:
    backend = captured_backend(runner)
    if backend is None:
        return
    sizes = runner.capture_bs
    logger.info(
        "Twilight: compiling kernels for %d batch sizes, unless Triton's cache has them", len(sizes)
    )
    start = time.perf_counter()
    try:
        backend.compile_ahead(sizes)
    except Exception:
        logger.warning(
            "Twilight: compiling ahead failed; each graph compiles its kernels, which takes longer",
            exc_info=True,
        )
        return
    logger.info("Twilight: kernels are there after %.1f s", time.perf_counter() - start)


PATCHES = [
    Patch(
        f"{RUNNER}.capture",
        "before",
        _compile,
        "graphs would compile their kernels one by one, for a minute on a new machine",
        ("self",),
    )
]
