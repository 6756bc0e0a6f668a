"""What the monitor shows, from two of a server's answers."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twilight_sgl.errors import TwilightError

TIMEOUT_SECONDS = 10
NO_ANSWER = (OSError, ValueError, http.client.HTTPException)

# The server is asked directly: proxies of the environment are for other hosts.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Budget:
    """Means over sparse rows, layers and KV heads; of the counts between two moments.

    Attributes:
        rows: sparse rows.
        context_tokens, candidate_tokens, kept_tokens: of a row.
        kept_fraction: kept tokens as a share of the context.
        kept_mass: share of the candidates' estimated weight.
    """

    rows: int
    context_tokens: float
    candidate_tokens: float
    kept_tokens: float
    kept_fraction: float
    kept_mass: float


@dataclass(frozen=True)
class Figures:
    """One refresh of the monitor, summed over the data-parallel replicas.

    Attributes:
        model: its name, without folders.
        p: mass in force; selector: its name.
        tokens_per_second: SGLang's own figure; None if it names none.
        running, waiting: requests; None if the server does not tell.
        now: the budget since the last refresh, None if no row was sparse.
        total: the budget since the server started, None likewise.
        pages: capacity, sealed, built, reused, and sealing_seconds.
        steps: decode, dense, sparse_rows.
        audit: checks and violations.
        audit_interval: decode steps between audits, 0 for none.
        layer_ids: L layers that select.
        kept_fraction, kept_mass: [L][HK] since the server started, None before a sparse row. Of
            tensor-parallel servers these are the KV heads of rank 0.
    """

    model: str
    p: float
    selector: str
    tokens_per_second: float | None
    running: int | None
    waiting: int | None
    now: Budget | None
    total: Budget | None
    pages: dict[str, float]
    steps: dict[str, int]
    audit: dict[str, int]
    audit_interval: int
    layer_ids: list[int]
    kept_fraction: list[list[float]] | None
    kept_mass: list[list[float]] | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


class Source:
    """A server that is asked again and again, and may be restarted in between.

    Args:
        url: without a path.
        api_key: SGLang's --api-key, if it has one.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._last: dict[str, Any] | None = None

    def read(self) -> Figures:
        """Ask the server.

        Raises:
            TwilightError: it does not answer, or it is not a Twilight server.
        """
        try:
            info = self._get("/server_info")
            states = [state["twilight"] for state in info["internal_states"]]
        except NO_ANSWER as error:
            self._last = None
            raise TwilightError(f"no answer from {self.url}: {_reason(error)}") from error
        except (KeyError, TypeError) as error:
            raise TwilightError(
                f"{self.url} does not decode with Twilight: start it with "
                "python -m twilight_sgl.launch_server"
            ) from error
        totals = _added(states)
        last = self._last
        if last is not None and last["steps"]["decode"] > totals["steps"]["decode"]:
            last = None  # restarted
        self._last = totals
        try:
            loads = self._get("/v1/loads?include=core")["loads"]
            running = sum(load["num_running_reqs"] for load in loads)
            waiting = sum(load["num_waiting_reqs"] for load in loads)
        except (*NO_ANSWER, KeyError, TypeError):
            running = waiting = None
        return _figures(info, states, totals, last, running, waiting)

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers=self._headers)
        with _opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            return json.load(response)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError) and error.code == 401:
        return "it wants its API key (--api-key)"
    return str(getattr(error, "reason", "") or error)


def _added(states: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of all replicas; `kept_mass` becomes a sum over rows, layers and heads."""
    totals: dict[str, Any] = {
        part: {key: sum(state[part][key] for state in states) for key in states[0][part]}
        for part in ("pages", "steps", "audit")
    }
    counted = ("context_tokens", "candidate_tokens", "kept_tokens")
    totals["budget"] = {key: sum(state["budget"][key] for state in states) for key in counted}
    totals["budget"]["kept_mass"] = sum(
        (state["budget"]["kept_mass"] or 0) * state["steps"]["sparse_rows"] for state in states
    )
    return totals


def _budget(totals: dict[str, Any], last: dict[str, Any] | None, pairs: int) -> Budget | None:
    def added(part: str, key: str) -> Any:
        return totals[part][key] - (last[part][key] if last else 0)

    rows = added("steps", "sparse_rows")
    if rows <= 0 or pairs == 0:
        return None
    context, candidate, kept = (
        added("budget", key) / (rows * pairs)
        for key in ("context_tokens", "candidate_tokens", "kept_tokens")
    )
    return Budget(
        rows=rows,
        context_tokens=context,
        candidate_tokens=candidate,
        kept_tokens=kept,
        kept_fraction=kept / context if context else 0.0,
        kept_mass=added("budget", "kept_mass") / rows,
    )


def _figures(
    info: Mapping[str, Any],
    states: list[Mapping[str, Any]],
    totals: dict[str, Any],
    last: dict[str, Any] | None,
    running: int | None,
    waiting: int | None,
) -> Figures:
    config, heads = states[0]["config"], states[0]["heads"]
    fraction = _mean_heads(states, "kept_fraction")
    pairs = 0 if fraction is None else fraction.size
    mass = _mean_heads(states, "kept_mass")
    speeds = [state.get("last_gen_throughput") for state in info["internal_states"]]
    known = [speed for speed in speeds if speed is not None]
    stood = running == 0 if last is None else last["steps"] == totals["steps"]
    return Figures(
        model=Path(str(info.get("served_model_name") or info.get("model_path"))).name,
        p=config["p"],
        selector=config["selector"],
        # SGLang keeps the figure of the last batches while it is idle.
        tokens_per_second=(0.0 if stood else sum(known)) if known else None,
        running=running,
        waiting=waiting,
        now=_budget(totals, last, pairs) if last is not None else None,
        total=_budget(totals, None, pairs),
        pages=totals["pages"],
        steps=totals["steps"],
        audit=totals["audit"],
        audit_interval=config["audit_interval"],
        layer_ids=heads["layer_ids"],
        kept_fraction=None if fraction is None else fraction.round(6).tolist(),
        kept_mass=None if mass is None else mass.round(6).tolist(),
    )


def _mean_heads(states: list[Mapping[str, Any]], name: str) -> np.ndarray | None:
    """[L, HK] over the replicas that have had sparse rows, each weighted by its context."""
    spoken = [state for state in states if state["heads"][name]]
    if not spoken:
        return None
    weights = [state["budget"]["context_tokens"] for state in spoken]
    return np.average([state["heads"][name] for state in spoken], axis=0, weights=weights)
