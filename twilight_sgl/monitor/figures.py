"""What the monitor shows, from two of a server's answers."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twilight_sgl.errors import TwilightError
from twilight_sgl.telemetry.totals import Totals, add_up, twilight_states

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
        self._last: tuple[Totals, dict[str, int]] | None = None

    def read(self) -> Figures:
        """Ask the server.

        Raises:
            TwilightError: it does not answer, or it is not a Twilight server.
        """
        try:
            info = self._get("/server_info")
            states = twilight_states(info)
        except NO_ANSWER as error:
            self._last = None
            raise TwilightError(f"no answer from {self.url}: {_reason(error)}") from error
        except (AttributeError, TypeError):
            states = []
        if not states:
            raise TwilightError(
                f"{self.url} does not decode with Twilight: start it with "
                "python -m twilight_sgl.launch_server"
            )
        totals, steps = add_up(states), _sums(states, "steps")
        last = self._last
        if last is not None and last[1]["decode"] > steps["decode"]:
            last = None  # restarted
        self._last = totals, steps
        try:
            loads = self._get("/v1/loads?include=core")["loads"]
            running = sum(load["num_running_reqs"] for load in loads)
            waiting = sum(load["num_waiting_reqs"] for load in loads)
        except (*NO_ANSWER, KeyError, TypeError):
            running = waiting = None
        return _figures(info, states, totals, steps, last, running, waiting)

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers=self._headers)
        with _opener.open(request, timeout=TIMEOUT_SECONDS) as response:
            return json.load(response)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError) and error.code == 401:
        return "it wants its API key (--api-key)"
    return str(getattr(error, "reason", "") or error)


def _sums(states: list[dict[str, Any]], part: str) -> dict[str, Any]:
    return {key: sum(state[part][key] for state in states) for key in states[0][part]}


def _budget(totals: Totals) -> Budget | None:
    rows = totals.sparse_rows
    mass = totals.kept_mass() if rows > 0 else None
    if mass is None:
        return None
    each = rows * totals.head_kept_tokens.size
    return Budget(
        rows=rows,
        context_tokens=totals.context_tokens / each,
        candidate_tokens=totals.candidate_tokens / each,
        kept_tokens=totals.kept_tokens / each,
        kept_fraction=totals.kept_tokens / totals.context_tokens,
        kept_mass=mass,
    )


def _figures(
    info: Mapping[str, Any],
    states: list[dict[str, Any]],
    totals: Totals,
    steps: dict[str, int],
    last: tuple[Totals, dict[str, int]] | None,
    running: int | None,
    waiting: int | None,
) -> Figures:
    config, heads = states[0]["config"], totals.heads() or {}
    speeds = [state.get("last_gen_throughput") for state in info["internal_states"]]
    known = [speed for speed in speeds if speed is not None]
    stood = running == 0 if last is None else last[1] == steps
    return Figures(
        model=Path(str(info.get("served_model_name") or info.get("model_path"))).name,
        p=config["p"],
        selector=config["selector"],
        # SGLang keeps the figure of the last batches while it is idle.
        tokens_per_second=(0.0 if stood else sum(known)) if known else None,
        running=running,
        waiting=waiting,
        now=_budget(totals.since(last[0])) if last is not None else None,
        total=_budget(totals),
        pages=_sums(states, "pages"),
        steps=steps,
        audit=_sums(states, "audit"),
        audit_interval=config["audit_interval"],
        layer_ids=list(totals.layer_ids),
        kept_fraction=heads.get("kept_fraction"),
        kept_mass=heads.get("kept_mass"),
    )
