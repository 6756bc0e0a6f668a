"""What one request may ask of Twilight: `custom_params: {"twilight": {...}}`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twilight_sgl.errors import TwilightError

KEY = "twilight"


@dataclass(frozen=True)
class RequestOptions:
    """One request's options.

    Attributes:
        p: the mass to keep, in (0, 1]; None for the server's.
        enabled: False to attend to everything.
        report: whether an OpenAI response says what its decode steps kept.
    """

    p: float | None = None
    enabled: bool = True
    report: bool = False

    @classmethod
    def from_custom_params(cls, custom_params: Mapping[str, Any] | None) -> "RequestOptions":
        """Read a request's `custom_params`; other top-level keys are not ours.

        Raises:
            TwilightError: an unknown key, a wrong type or a p out of range.
        """
        if not custom_params or not isinstance(custom_params, Mapping) or KEY not in custom_params:
            return _DEFAULTS
        values = custom_params[KEY]
        if not isinstance(values, Mapping):
            raise TwilightError(f"custom_params.{KEY} must be an object, got {values!r}")
        unknown = sorted(set(values) - {"p", "enabled", "report"}, key=str)
        if unknown:
            raise TwilightError(
                f"custom_params.{KEY} has unknown field {', '.join(map(repr, unknown))}; "
                "known: 'p', 'enabled', 'report'"
            )
        switches = {"enabled": values.get("enabled", True), "report": values.get("report", False)}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise TwilightError(
                    f"custom_params.{KEY}.{name} must be true or false, got {value!r}"
                )
        p = values.get("p")
        if p is not None and (
            isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 < p <= 1
        ):
            raise TwilightError(f"custom_params.{KEY}.p must be a number in (0, 1], got {p!r}")
        return cls(None if p is None else float(p), **switches)


_DEFAULTS = RequestOptions()  # frozen, so all requests without options may share it
