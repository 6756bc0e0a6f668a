"""Series of SGLang's `/metrics`, which it serves with --enable-metrics."""

from collections.abc import Mapping
from typing import Any

from twilight_sgl.telemetry.snapshot import Snapshot

# Totals, named without the `_total` that they are exposed with: help, and the Snapshot's field.
LAYER_COUNTERS = {
    "twilight_context_tokens": (
        "Context tokens of sparse rows, summed over decode steps and this rank's KV heads",
        "context_tokens",
    ),
    "twilight_candidate_tokens": (
        "Tokens that the selector named (B0), summed likewise",
        "candidate_tokens",
    ),
    "twilight_kept_tokens": ("Tokens attended to (B1), summed likewise", "kept_tokens"),
    "twilight_kept_mass": (
        "Share of the candidates' estimated weight that was kept, a mean over KV heads summed "
        "over sparse rows; divide by twilight_sparse_rows_total",
        "kept_mass",
    ),
}
COUNTERS = {
    "twilight_sparse_rows": ("Rows of decode steps that selected", "sparse_rows"),
    "twilight_decode_steps": ("Decode steps", "decode_steps"),
    "twilight_dense_steps": ("Decode steps that ran dense as a whole", "dense_steps"),
    "twilight_mixed_rows": (
        "Rows decoded densely inside a prefill step that would have selected",
        "mixed_rows",
    ),
    "twilight_pages_built": ("Page summaries built", "pages_built"),
    "twilight_pages_reused": (
        "Pages that a request's first sparse step found sealed",
        "pages_reused",
    ),
    "twilight_sealing_seconds": ("Time that sealing took on the device", "sealing_seconds"),
    "twilight_audit_checks": ("Audits of all sealed pages", "audit_checks"),
    "twilight_audit_violations": (
        "Page summaries that an audit found not to be their keys'",
        "audit_violations",
    ),
}
GAUGES = {
    "twilight_pages_capacity": ("Pages of the KV pool", "pages_capacity"),
    "twilight_pages_sealed": ("Pages with a summary", "pages_sealed"),
}
# Gauges of the newest second in which a row was sparse.
RECENT = {
    "twilight_average_budget_tokens": "Tokens that a KV head of a layer attends to in a step",
    "twilight_kept_fraction": "Tokens attended to, as a share of the context",
    "twilight_kept_mass_mean": "Share of the candidates' estimated weight that was kept",
}


def series() -> frozenset[str]:
    """The names of all series, as PromQL has them."""
    counters = (f"{name}_total" for name in (*LAYER_COUNTERS, *COUNTERS))
    return frozenset((*counters, *GAUGES, *RECENT))


class PrometheusSink:
    """Adds changes to series with a rank's labels; in this process's default registry.

    SGLang merges the values of all processes through files, whose folder PROMETHEUS_MULTIPROC_DIR
    names; prometheus_client looks for it when first imported, which is why that happens here.

    Args:
        labels: those of SGLang's own series, so ours join with them: model_name, tp_rank and, with
            data parallelism, dp_rank among others. The series by layer have `layer` too.
    """

    def __init__(self, labels: Mapping[str, Any]) -> None:
        from prometheus_client import Counter, Gauge

        self._labels = dict(labels)
        names = tuple(self._labels)
        self._by_layer = {
            field: Counter(name, text, (*names, "layer"))
            for name, (text, field) in LAYER_COUNTERS.items()
        }
        self._counters = {
            field: Counter(name, text, names).labels(**self._labels)
            for name, (text, field) in COUNTERS.items()
        }
        self._gauges = {
            field: Gauge(name, text, names, multiprocess_mode="mostrecent").labels(**self._labels)
            for name, (text, field) in GAUGES.items()
        }
        self._recent = [
            Gauge(name, text, names, multiprocess_mode="mostrecent").labels(**self._labels)
            for name, text in RECENT.items()
        ]

    def publish(self, totals: Snapshot, change: Snapshot) -> None:
        """Add what changed; gauges follow the totals."""
        for field, counter in self._counters.items():
            counter.inc(getattr(change, field))
        for field, gauge in self._gauges.items():
            gauge.set(getattr(totals, field))
        for field, by_layer in self._by_layer.items():
            values = getattr(change, field)
            sums = values.mean(1) if field == "kept_mass" else values.sum(1)
            for layer_id, value in zip(change.layer_ids, sums.tolist(), strict=True):
                by_layer.labels(**self._labels, layer=layer_id).inc(value)
        if change.sparse_rows:
            pairs = change.sparse_rows * change.kept_mass.size
            kept = int(change.kept_tokens.sum())
            values = (
                kept / pairs,
                kept / int(change.context_tokens.sum()),
                float(change.kept_mass.sum()) / pairs,
            )
            for gauge, value in zip(self._recent, values, strict=True):
                gauge.set(value)
