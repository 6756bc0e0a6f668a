"""The totals of one model runner at one moment."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Snapshot:
    """Totals since the server started; the difference of two is what happened in between.

    Arrays are [L, HK], by layer that selects and KV head of this rank. They sum over the sparse
    rows of decode steps.

    Attributes:
        time: seconds since the epoch.
        layer_ids: model layers of the L rows.
        context_tokens: tokens there were.
        candidate_tokens: B0, tokens that the selector named.
        kept_tokens: B1, tokens attended to (the union over the group).
        kept_mass: float64, share of the candidates' estimated weight that top-p kept, averaged
            over the query heads of a group; divide by `sparse_rows` for the mean of a row.
        sparse_rows: rows of decode steps that selected.
        decode_steps, dense_steps: decode steps, and those that ran dense as a whole.
        mixed_rows: rows decoded densely inside a prefill step that would have selected.
        pages_capacity, pages_sealed: pages of the KV pool, and those with a summary now.
        pages_built, pages_reused: summaries built, and pages found sealed by a request's first
            sparse step.
        sealing_seconds: time that sealing took on the device.
        audit_checks, audit_violations: audits run, and summaries that were not their keys'.
    """

    time: float
    layer_ids: tuple[int, ...]
    context_tokens: Counts
    candidate_tokens: Counts
    kept_tokens: Counts
    kept_mass: npt.NDArray[np.float64]
    sparse_rows: int
    decode_steps: int
    dense_steps: int
    mixed_rows: int
    pages_capacity: int
    pages_sealed: int
    pages_built: int
    pages_reused: int
    sealing_seconds: float
    audit_checks: int
    audit_violations: int

    def to_dict(self) -> dict[str, Any]:
        """The totals as plain JSON types, as `/server_info` shows them.

        Means of which there is nothing are None.
        """
        context = int(self.context_tokens.sum())
        pairs = self.sparse_rows * self.kept_mass.size
        return {
            "pages": {
                "capacity": self.pages_capacity,
                "sealed": self.pages_sealed,
                "built": self.pages_built,
                "reused": self.pages_reused,
                "sealing_seconds": self.sealing_seconds,
            },
            "budget": {
                "context_tokens": context,
                "candidate_tokens": int(self.candidate_tokens.sum()),
                "kept_tokens": int(self.kept_tokens.sum()),
                "kept_mass": float(self.kept_mass.sum() / pairs) if pairs else None,
                "mixed_rows": self.mixed_rows,
            },
            "heads": {
                "layer_ids": list(self.layer_ids),
                "kept_fraction": (self.kept_tokens / self.context_tokens).round(6).tolist()
                if context
                else None,
                "kept_mass": (self.kept_mass / self.sparse_rows).round(6).tolist()
                if self.sparse_rows
                else None,
            },
            "steps": {
                "decode": self.decode_steps,
                "dense": self.dense_steps,
                "sparse_rows": self.sparse_rows,
            },
            "audit": {"checks": self.audit_checks, "violations": self.audit_violations},
        }
