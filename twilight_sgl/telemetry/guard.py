"""Telemetry that fails is logged, and fails nothing else."""

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

logger = logging.getLogger(__name__)

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def harmless(function: Callable[Parameters, Result]) -> Callable[Parameters, Result | None]:
    """Wrap a function so that it returns None where it would raise; its first failure is logged."""
    logged = False

    @functools.wraps(function)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result | None:
        nonlocal logged
        try:
            return function(*args, **kwargs)
        except Exception:
            if not logged:
                logged = True
                logger.exception(
                    "Twilight telemetry: %s failed; requests go on, and further failures of it "
                    "are not logged",
                    function.__qualname__,
                )
            return None

    return guarded
