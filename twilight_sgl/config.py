"""Every knob of Twilight: typed, validated, from flags, files or the environment."""

import argparse
import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twilight_sgl.attention.selectors import names as selector_names
from twilight_sgl.errors import TwilightError

ENVIRONMENT_VARIABLE = "TWILIGHT_CONFIG"
FLAG_PREFIX = "--twilight-"
ESTIMATORS = ("int4", "int4_centred", "exact")
PRUNERS = ("top_p", "none")
BOUNDS = ("auto", "float8", "keys")
PAGE_SIZES = (16, 32, 64)
_ADDRESS = re.compile(r"tcp://(?P<host>[\w.-]+|\*|\[[\da-fA-F:.]+\]):(?P<port>\d{1,5})")
_TRUTH = {"true": True, "on": True, "false": False, "off": False}


def _knob(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TwilightConfig:
    """The configuration of one server.

    Raises:
        TwilightError: a value is out of range or of the wrong type; the message names the flag.
    """

    p: float = _knob(
        0.95, "attention mass that each query head keeps of its candidates, in (0, 1]; 1 keeps all"
    )
    selector: str = _knob("half_bound", "algorithm that names candidate pages")
    selector_budget: float = _knob(
        0.2, "candidates (B0): a fraction of the context if at most 1, else tokens"
    )
    min_candidate_tokens: int = _knob(
        2048, "a fraction of the context comes to at least so many candidates; 0: to itself"
    )
    estimator: str = _knob(
        "int4",
        "keys that candidates are weighed with: INT4 summaries, INT4 of keys less their page's "
        "middle, or the exact KV cache",
    )
    pruner: str = _knob(
        "top_p", "what cuts the candidates: top-p, or none to attend to all of them, whatever p is"
    )
    bounds: str = _knob(
        "auto",
        "type of the page bounds that selection reads: float8, that of the KV cache, or float8 "
        "where the GPU has it",
    )
    skip_layers: tuple[int, ...] = _knob(
        (0, 1), "layers that stay dense: comma-separated ids, or 'none'"
    )
    sink_tokens: int = _knob(4, "first tokens of a request that are always attended to")
    recent_tokens: int = _knob(64, "last tokens of a request that are always attended to")
    min_context_tokens: int = _knob(
        2048, "a request shorter than this attends to everything (it costs less than selecting)"
    )
    min_step_mb: int = _knob(
        96,
        "on a GPU, a step whose requests of that length hold fewer MB of KV cache a layer than "
        "this attends to everything (selecting gains little or nothing there); 0: none does; "
        "without effect under --enable-dp-attention, whose ranks replay the same graph",
    )
    page_size: int = _knob(
        16, "tokens a page; follows --page-size when only that is given (16, 32 or 64)"
    )
    audit_interval: int = _knob(
        0, "recompute every sealed page's summary every N decode steps and count mismatches; 0: off"
    )
    telemetry: bool = _knob(
        True,
        "count budgets by layer, KV head and request (true or false); without it the budgets of "
        "/server_info stay 0, /metrics has no series of ours and responses have no report",
    )
    events: str | None = _knob(
        None, "address to publish events on, as tcp://127.0.0.1:5599, or 'none'; see the README"
    )

    def __post_init__(self) -> None:
        for knob in dataclasses.fields(self):
            value = getattr(self, knob.name)
            object.__setattr__(self, knob.name, _coerce(knob.name, knob.type, value))
        _require(0 < self.p <= 1, "p", self.p, "a number in (0, 1]")
        _require_one_of("selector", self.selector, selector_names())
        _require_one_of("estimator", self.estimator, ESTIMATORS)
        _require_one_of("pruner", self.pruner, PRUNERS)
        _require_one_of("bounds", self.bounds, BOUNDS)
        budget = self.selector_budget
        _require(
            0 < budget <= 1 or (budget > 1 and budget == int(budget)),
            "selector_budget",
            budget,
            "a fraction in (0, 1] or a whole number of tokens",
        )
        for layer in self.skip_layers:
            _require(layer >= 0, "skip_layers", self.skip_layers, "layer ids from 0")
        for name in (
            "sink_tokens",
            "recent_tokens",
            "min_candidate_tokens",
            "min_context_tokens",
            "min_step_mb",
            "audit_interval",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(
            self.page_size in PAGE_SIZES, "page_size", self.page_size, _listed(map(str, PAGE_SIZES))
        )
        address = None if self.events is None else _ADDRESS.fullmatch(self.events)
        _require(
            self.events is None or (address is not None and 0 < int(address["port"]) < 65536),
            "events",
            self.events,
            "tcp://HOST:PORT with a port from 1 to 65535, or 'none'",
        )

    @property
    def keeps_int4_keys(self) -> bool:
        """Whether page summaries hold INT4 keys: the `exact` estimator does not read them."""
        return self.pruner == "top_p" and self.estimator != "exact"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> "TwilightConfig":
        """Build a configuration from keys as in this class; `source` names them in errors."""
        return cls(**_checked_keys(values, source))

    @classmethod
    def from_environment(cls) -> "TwilightConfig":
        """Read `TWILIGHT_CONFIG`: a JSON object, or the path of a JSON or YAML file."""
        return cls(**_environment_values())

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        values = dataclasses.asdict(self)
        return values | {"skip_layers": list(self.skip_layers)}

    def to_environment(self) -> None:
        """Write `TWILIGHT_CONFIG`, which the server's worker processes inherit."""
        os.environ[ENVIRONMENT_VARIABLE] = json.dumps(self.to_dict())


def flag_of(name: str) -> str:
    """The command-line flag of a field: `selector_budget` is `--twilight-selector-budget`."""
    return FLAG_PREFIX + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--twilight-config` and a flag for every field, under a heading of their own."""
    group = parser.add_argument_group(
        "Twilight",
        "adaptive top-p attention sparsity for decoding (with --decode-attention-backend twilight)",
    )
    group.add_argument(
        f"{FLAG_PREFIX}config",
        metavar="FILE",
        help="JSON or YAML file with any of the settings below; flags win over it, and it wins "
        f"over the environment variable {ENVIRONMENT_VARIABLE}",
    )
    for knob in dataclasses.fields(TwilightConfig):
        text = knob.metadata["help"]
        default = _shown(knob.default)
        if knob.name == "selector":
            text += f" ({_listed(selector_names())})"
        if knob.name == "estimator":
            text += f" ({_listed(ESTIMATORS)})"
        if knob.name == "pruner":
            text += f" ({_listed(PRUNERS)})"
        if knob.name == "bounds":
            text += f" ({_listed(BOUNDS)})"
        group.add_argument(
            flag_of(knob.name),
            metavar=knob.name.split("_")[-1].upper(),
            help=f"{text} (default: {default})",
        )


def from_flags(arguments: argparse.Namespace) -> TwilightConfig:
    """Resolve flags over the file over the environment.

    Raises:
        TwilightError: a setting is unknown, of the wrong type or out of range.
    """
    values = _environment_values()
    path = getattr(arguments, "twilight_config", None)
    if path:
        values |= _checked_keys(read_file(Path(path), f"{FLAG_PREFIX}config"), str(path))
    for knob in dataclasses.fields(TwilightConfig):
        given = getattr(arguments, f"twilight_{knob.name}", None)
        if given is not None:
            values[knob.name] = given
    return TwilightConfig(**values)


def _environment_values() -> dict[str, Any]:
    text = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    if not text:
        return {}
    if text.startswith("{"):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise TwilightError(f"{ENVIRONMENT_VARIABLE} is not valid JSON: {error}") from error
    else:
        values = read_file(Path(text), ENVIRONMENT_VARIABLE)
    return _checked_keys(values, ENVIRONMENT_VARIABLE)


def read_file(path: Path, source: str) -> Mapping[str, Any]:
    """Read a JSON or YAML file of settings; `source` names what asked for it in errors.

    Raises:
        TwilightError: it cannot be read or holds no mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TwilightError(f"{source}: cannot read {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise TwilightError(f"{source}: {path} must hold a mapping of settings")
    return values


def _checked_keys(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    known = [knob.name for knob in dataclasses.fields(TwilightConfig)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise TwilightError(
            f"{source}: unknown setting {_listed(map(repr, unknown))}; known: {_listed(known)}"
        )
    return dict(values)


def _coerce(name: str, kind: Any, value: Any) -> Any:
    """Turn the text of a flag, or a JSON value, into the field's type."""
    try:
        if kind is float:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
            if not math.isfinite(number):
                raise ValueError
            return number
        if kind is int:
            if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
                raise ValueError
            return int(value)
        if kind is bool:
            return value if isinstance(value, bool) else _TRUTH[value.strip().lower()]
        if kind is str:
            if not isinstance(value, str):
                raise ValueError
            return value
        if kind == str | None:
            return _text_or_none(value)
        return _layer_ids(value)
    except (TypeError, ValueError, OverflowError, KeyError, AttributeError):
        expected = {
            float: "a number",
            int: "a whole number",
            bool: "true or false",
            str: "a name",
            str | None: "text, or 'none'",
        }.get(kind, "comma-separated layer ids, or 'none'")
        raise TwilightError(_complaint(name, value, expected)) from None


def _text_or_none(value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise ValueError
    return None if value is None or value.strip().lower() in ("", "none") else value.strip()


def _layer_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        text = value.strip()
        return () if text in ("", "none") else tuple(int(part) for part in text.split(","))
    if not isinstance(value, Sequence) or any(type(item) is not int for item in value):
        raise ValueError
    return tuple(value)


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise TwilightError(_complaint(name, value, expected))


def _require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    _require(value in known, name, value, _listed(known))


def _complaint(name: str, value: Any, expected: str) -> str:
    return f"{flag_of(name)} ({name}) is {value!r}; expected {expected}"


def _listed(items: Any) -> str:
    return ", ".join(items)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
