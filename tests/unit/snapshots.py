"""Totals as a server would count them, for the tests of what shows them."""

from typing import Any

import numpy as np

from twilight_sgl.telemetry.snapshot import Snapshot

LAYER_IDS = (2, 5, 7)
HEADS_KV = 2


def totals(steps: int, **others: Any) -> Snapshot:
    """The totals after so many sparse steps of one row, each of 1000 tokens of context.

    Layer l, head h keeps 10 (1 + l) + h tokens and a mass of 0.9 in every step; each step seals
    two pages, of which one stays.
    """
    shape = (len(LAYER_IDS), HEADS_KV)
    kept = 10 * (1 + np.arange(len(LAYER_IDS)))[:, None] + np.arange(HEADS_KV)
    values: dict[str, Any] = {
        "time": 100.0 + steps,
        "layer_ids": LAYER_IDS,
        "context_tokens": np.full(shape, 1000 * steps),
        "candidate_tokens": np.full(shape, 250 * steps),
        "kept_tokens": kept * steps,
        "kept_mass": np.full(shape, 0.9 * steps),
        "sparse_rows": steps,
        "decode_steps": steps + 1,
        "dense_steps": 1,
        "mixed_rows": 0,
        "pages_capacity": 512,
        "pages_sealed": steps,
        "pages_built": 2 * steps,
        "pages_reused": 3 * steps,
        "sealing_seconds": 0.25 * steps,
        "audit_checks": 0,
        "audit_violations": 0,
    }
    return Snapshot(**(values | others))
