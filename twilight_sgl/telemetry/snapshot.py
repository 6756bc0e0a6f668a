"""The totals of one model runner at one moment."""

from dataclasses import dataclass

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
