"""Figures of a soak: what the server counted over time, what became of requests, the verdict."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twilight_sgl.benchmark.decode_figures import percentiles
from twilight_sgl.benchmark.soak_memory import Memory

OUTCOMES = ("completed", "hung up", "aborted", "refused", "failed")
SETTLED = 0.2  # of the run, after which memory should not grow
_SHOWN = 5  # failures
_MIB = 1 << 20


@dataclass(frozen=True)
class Sample:
    """`/server_info` and memory at one moment; counts are since the server started.

    Attributes:
        seconds: since the soak began.
        checks, violations: audits, and summaries found that were not those of their keys.
        capacity, sealed: pages of the KV pool, and those with a summary now.
        built, reused: summaries built, and pages that requests found sealed.
        decode_steps, sparse_rows: decode steps, and rows of them that selected.
        host_bytes, gpu_bytes: as of `Memory`.
    """

    seconds: float
    checks: int
    violations: int
    capacity: int
    sealed: int
    built: int
    reused: int
    decode_steps: int
    sparse_rows: int
    host_bytes: int | None
    gpu_bytes: int | None

    @classmethod
    def of(cls, seconds: float, states: Sequence[Mapping[str, Any]], memory: Memory) -> "Sample":
        """Add up the replicas' parts of `/server_info`."""

        def total(part: str, name: str) -> int:
            return sum(state[part][name] for state in states)

        return cls(
            seconds=seconds,
            checks=total("audit", "checks"),
            violations=total("audit", "violations"),
            capacity=total("pages", "capacity"),
            sealed=total("pages", "sealed"),
            built=total("pages", "built"),
            reused=total("pages", "reused"),
            decode_steps=total("steps", "decode"),
            sparse_rows=total("steps", "sparse_rows"),
            host_bytes=memory.host_bytes,
            gpu_bytes=memory.gpu_bytes,
        )


@dataclass
class Tally:
    """What became of one kind of request.

    Attributes:
        outcomes: requests by outcome.
        prompt_tokens, cached_tokens, output_tokens: as the server told, of those that it did.
        retractions: times that the server took a request off the batch to run it again later.
        latencies_s: of the completed, from sending to the end.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    retractions: int = 0
    latencies_s: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; `latency_ms` is None without a completed request."""
        return {
            "outcomes": {name: self.outcomes[name] for name in OUTCOMES},
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "retractions": self.retractions,
            "latency_ms": percentiles(self.latencies_s) if self.latencies_s else None,
        }


@dataclass
class Record:
    """What a soak has seen so far.

    Attributes:
        seconds: that the load is to last.
        samples: over time, the first before the load.
        tallies: by kind of request.
        failures: what went wrong with requests, in words.
        notes: what the load could not do.
        died: why the soak could not go on, if it could not.
        finished: whether the last batch ran and was audited.
    """

    seconds: float
    samples: list[Sample] = field(default_factory=list)
    tallies: dict[str, Tally] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    died: str | None = None
    finished: bool = False

    def tally(self, kind: str) -> Tally:
        """That of a kind, from its first request on."""
        return self.tallies.setdefault(kind, Tally())

    def growth(self, name: str) -> tuple[int, int] | None:
        """Bytes at one fifth of the run and at its end; None before that or where unknown."""
        later = [
            value
            for sample in self.samples
            if sample.seconds >= SETTLED * self.seconds
            and (value := getattr(sample, name)) is not None
        ]
        return (later[0], later[-1]) if later else None

    def problems(self, max_growth_bytes: int) -> Iterator[str]:
        """What makes the soak fail, in words."""
        if self.died:
            yield self.died
        if not self.samples:
            return
        end = self.samples[-1]
        if end.violations:
            yield (
                f"{end.violations} violations of the seal invariant: `Twilight audit` in the "
                "server's log names pages and layers"
            )
        if self.failures:
            more = len(self.failures) - _SHOWN
            yield f"{len(self.failures)} requests failed:\n  " + "\n  ".join(
                self.failures[:_SHOWN] + ([f"... and {more} more"] if more > 0 else [])
            )
        for name, label in (("host_bytes", "host"), ("gpu_bytes", "GPU")):
            pair = self.growth(name)
            if pair and pair[1] - pair[0] > max_growth_bytes:
                yield (
                    f"{label} memory grew by {(pair[1] - pair[0]) / _MIB:.0f} MB from one fifth of "
                    f"the run on, --max-growth-mb allows {max_growth_bytes / _MIB:.0f}"
                )
        if self.finished and end.built == self.samples[0].built:
            yield (
                "no page was sealed, so the audit had nothing to check: no step selected; pass "
                "longer --prompt-tokens, or start the server with lower "
                "--twilight-min-context-tokens and --twilight-min-step-mb"
            )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "load_seconds": self.seconds,
            "requests": {kind: tally.to_dict() for kind, tally in self.tallies.items()},
            "failures": self.failures,
            "notes": self.notes,
            "died": self.died,
            "finished": self.finished,
            "growth_from_seconds": SETTLED * self.seconds,
            "samples": [asdict(sample) for sample in self.samples],
        }


def format_table(record: Record) -> str:
    """Requests by kind and outcome, and what the server counted meanwhile; Markdown."""
    head = ["requests", *OUTCOMES, "prompt", "cached", "output", "retracted", "p50 s", "p95 s"]
    lines = [head, ["---"] * len(head)]
    for kind, tally in record.tallies.items():
        times = percentiles(tally.latencies_s) if tally.latencies_s else None
        lines.append(
            [
                kind,
                *(str(tally.outcomes[name] or "") for name in OUTCOMES),
                f"{tally.prompt_tokens:,}",
                f"{tally.cached_tokens:,}",
                f"{tally.output_tokens:,}",
                str(tally.retractions or ""),
                *(f"{times[name] / 1000:.2f}" if times else "" for name in ("p50", "p95")),
            ]
        )
    first, end = record.samples[0], record.samples[-1]
    unsealed = (end.built - end.sealed) - (first.built - first.sealed)
    facts = [
        f"{end.seconds:.0f} s, {end.decode_steps - first.decode_steps:,} decode steps, "
        f"{end.sparse_rows - first.sparse_rows:,} rows that selected",
        f"audit: {end.checks - first.checks:,} audits, {end.violations} violations",
        f"pages: {end.built - first.built:,} built, {end.reused - first.reused:,} reused, "
        f"{unsealed:,} unsealed; the pool has {end.capacity:,}",
        *(
            f"{label} memory: {_growth(record, name)}"
            for name, label in (("host_bytes", "host"), ("gpu_bytes", "GPU"))
        ),
        *record.notes,
    ]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n" + "\n".join(facts) + "\n"


def _growth(record: Record, name: str) -> str:
    if getattr(record.samples[-1], name) is None:
        return "not known"
    pair = record.growth(name)
    if pair is None:
        return f"{getattr(record.samples[-1], name) / _MIB:,.0f} MB, before one fifth of the run"
    before, after = pair
    return (
        f"{before / _MIB:,.0f} MB at one fifth of the run, {after / _MIB:,.0f} MB at its end, "
        f"{(after - before) / _MIB:+,.0f} MB"
    )


def plot(record: Record, path: Path) -> None:
    """Draw memory, sealed pages and violations over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    minutes = [sample.seconds / 60 for sample in record.samples]
    figure, (memory, pages, audits) = pyplot.subplots(3, 1, figsize=(8, 7), sharex=True)
    for name, label in (("host_bytes", "host"), ("gpu_bytes", "GPU")):
        values = [getattr(sample, name) for sample in record.samples]
        if any(value is not None for value in values):
            mib = [float("nan") if value is None else value / _MIB for value in values]
            memory.plot(minutes, mib, label=label)
    memory.axvline(SETTLED * record.seconds / 60, color="grey", linewidth=0.8, linestyle="--")
    memory.set_ylabel("MB")
    pages.plot(minutes, [sample.sealed for sample in record.samples], label="sealed now")
    pages.axhline(record.samples[0].capacity, color="grey", linewidth=0.8, label="pool")
    pages.set_ylabel("pages")
    audits.plot(minutes, [sample.violations for sample in record.samples], label="violations")
    audits.set_ylabel("violations")
    audits.set_xlabel("minutes")
    for axes in (memory, pages, audits):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
