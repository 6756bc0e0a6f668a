"""Figures of the decode benchmark: from streams to rows, a table and a picture."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from twilight_sgl.benchmark.prompts import Load
from twilight_sgl.benchmark.streaming import MeasurementError, Stream
from twilight_sgl.telemetry.totals import between, twilight_states

PERCENTILES = (5, 20, 50, 80, 95)
Value = TypeVar("Value")
COLOURS = ("#8c8c8c", "#4c72b0", "#c44e52", "#55a868", "#8172b3", "#ccb974")


@dataclass(frozen=True)
class Measured:
    """One backend under one load.

    Attributes:
        cold: answers with an empty radix cache.
        prefix: with only the shared prefix cached, if there is one.
        timed: with the prompts cached.
        before, after: `/server_info` around the timed pass.
        repeats: further answers of one token to what `cold`, `prefix` and `timed` were asked, by
            those names: more samples of the time to first token where requests are few. Those and
            `cold` and `prefix` are the same of all passes of a start.
        start: which start of the servers it is of, from 0.
    """

    backend: str
    load: Load
    cold: list[Stream]
    prefix: list[Stream] | None
    timed: list[Stream]
    before: dict[str, Any]
    after: dict[str, Any]
    repeats: dict[str, list[Stream]] = field(default_factory=dict)
    start: int = 0

    def answers(self, name: str) -> list[Stream]:
        """What was asked as `cold`, `prefix` or `timed`, the repeats included."""
        return [*(getattr(self, name) or ()), *self.repeats.get(name, ())]


def first_token_ms(passes: Sequence[Measured], name: str) -> dict[str, Any]:
    """Milliseconds to first token of `cold`, `prefix` or `timed`, of all passes.

    Returns:
        `percentiles`, and `mean_by_start`: their mean for each start, in order.
    """

    def of(some: Sequence[Measured]) -> dict[str, float]:
        streams = {id(stream): stream for each in some for stream in each.answers(name)}
        return percentiles([stream.first_token_s for stream in streams.values()])

    starts = _by_start(passes, passes).values()
    return of(passes) | {"mean_by_start": [of(some)["mean"] for some in starts]}


def percentiles(values: Sequence[float], weights: Sequence[int] | None = None) -> dict[str, float]:
    """Percentiles and mean of samples in seconds, as milliseconds; one may stand for several."""
    each = 1000 * (np.repeat(values, weights) if weights is not None else np.asarray(values))
    points = np.percentile(each, PERCENTILES)
    return {f"p{p}": float(point) for p, point in zip(PERCENTILES, points, strict=True)} | {
        "mean": float(each.mean()),
        "samples": len(values),
    }


def steady_phase(streams: Sequence[Stream]) -> dict[str, Any]:
    """Speed while all requests decode: from the last one's first token to the first one's last.

    A chunk of several tokens gives that many equal times per token. Throughput is the sum of the
    requests' own rates, each between its first and last chunk of the phase.

    Returns:
        `tpot_ms` percentiles of milliseconds a token, `tokens_per_s`, `steady_s`, `steady_tokens`.
    Raises:
        MeasurementError: there is no such phase.
    """
    start = max(stream.chunks[0][0] for stream in streams)
    end = min(stream.chunks[-1][0] for stream in streams)
    gaps: list[float] = []
    counts: list[int] = []
    rate = 0.0
    for stream in streams:
        within = [chunk for chunk in stream.chunks if start <= chunk[0] <= end]
        if len(within) < 2:
            raise MeasurementError(
                f"at no time did all {len(streams)} requests decode: the first ended before the "
                "last had begun; pass more --output-tokens"
            )
        for (time_before, tokens_before), (time, tokens) in itertools.pairwise(within):
            counts.append(tokens - tokens_before)
            gaps.append((time - time_before) / (tokens - tokens_before))
        (first_s, first), (last_s, last) = within[0], within[-1]
        rate += (last - first) / (last_s - first_s)
    return {
        "tpot_ms": percentiles(gaps, counts),
        "tokens_per_s": rate,
        "steady_s": end - start,
        "steady_tokens": sum(counts),
    }


def agreement(
    answers: Sequence[Stream], others: Sequence[Stream], tokens: int
) -> dict[str, float | int]:
    """How far greedy answers are the same.

    Returns:
        `equal_share`: of each request's first `tokens` output tokens, the share before the first
        difference, averaged; `exact_share`: of requests that do not differ in them.
    """
    shares = []
    for one, two in zip(answers, others, strict=True):
        pairs = zip(one.token_ids[:tokens], two.token_ids[:tokens], strict=False)
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if equal is None:
            equal = min(len(one.token_ids), len(two.token_ids), tokens)
        shares.append(equal / tokens)
    return {
        "equal_share": sum(shares) / len(shares),
        "exact_share": sum(share == 1 for share in shares) / len(shares),
    }


def steps_between(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int] | None:
    """Decode steps between two `/server_info` and those that ran dense; None without Twilight."""
    states = (twilight_states(before), twilight_states(after))
    if not all(states):
        return None
    return {
        name: sum(state["steps"][name] for state in states[1])
        - sum(state["steps"][name] for state in states[0])
        for name in ("decode", "dense")
    }


def gpus(info: dict[str, Any]) -> int:
    """GPUs of a server; with data-parallel attention its replicas share those of one."""
    tensor, pipeline, data = (info.get(f"{kind}_size") or 1 for kind in ("tp", "pp", "dp"))
    return tensor * pipeline * (1 if info.get("enable_dp_attention") else data)


def _by_start(passes: Sequence[Measured], values: Sequence[Value]) -> dict[int, list[Value]]:
    """Values of passes, one of each, by start."""
    starts: dict[int, list[Value]] = {}
    for each, value in zip(passes, values, strict=True):
        starts.setdefault(each.start, []).append(value)
    return starts


def build_rows(results: Sequence[Measured], first: str, output_tokens: int) -> list[dict[str, Any]]:
    """One row a backend and load, by load; ratios and agreement are to the backend `first`.

    A row describes the pass with the median throughput (the lower of two in the middle), ratios are
    of medians over all passes of all starts, and times to first token are of all of them together.
    The first backend's own agreement is that of a timed pass with its cold one: noise. A load that
    `first` was not asked yet has no rows.
    """
    passes: dict[tuple[Load, str], list[Measured]] = {}
    for result in results:
        passes.setdefault((result.load, result.backend), []).append(result)
    speeds = {key: [steady_phase(each.timed) for each in of] for key, of in passes.items()}
    rates = {key: [speed["tokens_per_s"] for speed in of] for key, of in speeds.items()}
    starts = {
        key: {start: statistics.median(each) for start, each in _by_start(of, rates[key]).items()}
        for key, of in passes.items()
    }
    middle = {key: of.index(statistics.median_low(of)) for key, of in rates.items()}
    chosen = {key: of[middle[key]] for key, of in passes.items()}
    rows = []
    for load in (load for load, backend in chosen if backend == first):
        base, dense = statistics.median(rates[load, first]), starts[load, first]
        for key, result in chosen.items():
            if key[0] != load:
                continue
            speed = speeds[key][middle[key]]
            other = chosen[load, first].timed if result.backend != first else result.cold
            states = twilight_states(result.after)
            spent = between(result.before, result.after)
            row: dict[str, Any] = {
                "load": load.name,
                "backend": result.backend,
                "requests": load.requests,
                "prompt_tokens": load.prompt_tokens,
                "output_tokens": output_tokens,
                "ttft_cold_ms": first_token_ms(passes[key], "cold"),
                "ttft_cached_ms": first_token_ms(passes[key], "timed"),
                **speed,
                "tokens_per_s_by_pass": rates[key],
                "throughput_ratio": statistics.median(rates[key]) / base,
                "throughput_ratio_by_start": [
                    rate / dense[start] for start, rate in starts[key].items() if start in dense
                ],
                "ratio_to": first,
                "kv_tokens": result.after.get("max_total_num_tokens"),
                "kv_cache_dtype": result.after.get("kv_cache_dtype"),
                "page_size": result.after.get("page_size"),
                "gpus": gpus(result.after),
                "budget": None if spent is None else spent.shares(),
                "steps": steps_between(result.before, result.after),
                "agreement": agreement(result.timed, other, output_tokens),
                "agreement_with": first if result.backend != first else f"{first}, run twice",
                "twilight": states[0]["config"] if states else None,
            }
            if result.prefix is not None:
                row["ttft_prefix_ms"] = first_token_ms(passes[key], "prefix")
            rows.append(row)
    return rows


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _pair(values: dict[str, float]) -> str:
    return f"{_number(values['p50'])} / {_number(values['p95'])}"


def _first_token(values: dict[str, Any]) -> str:
    """p50 / p95 (mean), with the range of means over starts where there were several."""
    text, each = _number(values["mean"]), values["mean_by_start"]
    spread = f"; {_number(min(each))} to {_number(max(each))}" if len(each) > 1 else ""
    return f"{_pair(values)} ({text}{spread})"


def _ratio(row: dict[str, Any]) -> str:
    """Throughput to the first backend's, and the range over starts where there were several."""
    text, each = f"{row['throughput_ratio']:.2f}x", row["throughput_ratio_by_start"]
    return f"{text} ({min(each):.2f} to {max(each):.2f})" if len(each) > 1 else text


def _rates(row: dict[str, Any]) -> str:
    """Throughput, and where there were several passes its median and range over them."""
    every = row["tokens_per_s_by_pass"]
    text = _number(statistics.median(every))
    return f"{text} ({_number(min(every))} to {_number(max(every))})" if len(every) > 1 else text


def _share(value: float | None) -> str:
    return "all" if value is None else f"{value:.1%}"


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table; times in milliseconds."""
    first = rows[0]["ratio_to"]
    with_prefix = any("ttft_prefix_ms" in row for row in rows)
    with_floor = any(row.get("floor_ms") for row in rows)
    head = ["load", "backend", "TTFT cold"]
    head += ["TTFT prefix cached"] if with_prefix else []
    head += ["TTFT all cached", "ms a token", *(["floor"] if with_floor else [])]
    head += ["tokens/s", f"to {first}", "KV tokens"]
    head += ["candidates", "kept", "dense steps", "equal", "exact"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        spent, steps = row["budget"] or {}, row["steps"]
        lines.append(
            [
                row["load"],
                row["backend"],
                _first_token(row["ttft_cold_ms"]),
                *([_first_token(row["ttft_prefix_ms"])] if with_prefix else []),
                _first_token(row["ttft_cached_ms"]),
                _pair(row["tpot_ms"]),
                *([_number(row["floor_ms"]) if row["floor_ms"] else ""] if with_floor else []),
                _rates(row),
                _ratio(row),
                str(row["kv_tokens"]),
                _share(spent.get("candidate_share")),
                _share(spent.get("kept_share")),
                f"{steps['dense']} of {steps['decode']}" if steps else "",
                f"{row['agreement']['equal_share']:.1%}",
                f"{row['agreement']['exact_share']:.1%}",
            ]
        )
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    floor = ""
    if with_floor:
        floor = (
            "Floor: in which a copy moves what a step must read, that is weights, keys and values "
            "(of a prefix that requests share once), and of layers that select bounds and "
            "estimates too. "
        )
    cut = (
        "" if rows[0].get("complete", True) else "Not all of the run: it goes on or was cut short. "
    )
    return (
        f"{text}\n\n{cut}Times are ms, p50 / p95, and of first tokens (TTFT) the mean: of requests "
        "sent at once some wait for others, and the median may lie on either side of a wait; of "
        "several starts the least to most mean of one, too. "
        f"{floor}Candidates and kept are of the context. Equal: output tokens before the first "
        f"that differs from {first}'s; exact: requests without one; {first}'s own are of two runs "
        "of it. Of several passes tokens/s is the median (least to most), the ratio that of "
        "medians (least to most by start), TTFT is of all of them, and the rest is of the pass in "
        "the middle, of two the slower.\n"
    )


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw throughput to the first backend's, and tokens attended to, by load.

    Of several starts a line goes from the least ratio of one to the most.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loads = list(dict.fromkeys(row["load"] for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    by_place = {(row["load"], row["backend"]): row for row in rows}
    figure, (speeds, budgets) = pyplot.subplots(1, 2, figsize=(4 + 2 * len(loads), 4))
    width = 0.8 / len(backends)
    for index, backend in enumerate(backends):
        colour = COLOURS[index % len(COLOURS)]
        for place, load in enumerate(loads):
            row = by_place[load, backend]
            x = place + (index - (len(backends) - 1) / 2) * width
            ratio, label = row["throughput_ratio"], backend if place == 0 else None
            speeds.bar(x, ratio, width, color=colour, label=label)
            ends = min(row["throughput_ratio_by_start"]), max(row["throughput_ratio_by_start"])
            if ends[0] < ends[1]:
                speeds.plot([x, x], ends, color="black", linewidth=1, marker="_")
            top = max(ratio, ends[1])
            speeds.text(x, top, f"{ratio:.2f}x", ha="center", va="bottom", fontsize=7)
            kept = (row["budget"] or {}).get("kept_share")
            share = 1.0 if kept is None else kept
            budgets.bar(x, share, width, color=colour)
            budgets.text(x, share, f"{share:.1%}", ha="center", va="bottom", fontsize=7)
    for axes, title in (
        (speeds, f"output throughput to {rows[0]['ratio_to']}"),
        (budgets, "tokens attended to, of the context"),
    ):
        axes.set_xticks(range(len(loads)), loads)
        axes.set_title(title, fontsize=10)
    budgets.set_yscale("log")
    speeds.axhline(1.0, color="black", linewidth=0.8)
    speeds.legend(fontsize=8)
    figure.suptitle(f"{rows[0].get('model')}, {rows[0].get('gpu') or rows[0].get('cpu')}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
