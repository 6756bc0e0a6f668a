"""Totals read back from `/server_info`: of all replicas, and between two moments."""

from typing import Any

import numpy as np
import pytest
from snapshots import HEADS_KV, LAYER_IDS, totals

from twilight_sgl.telemetry.snapshot import Snapshot
from twilight_sgl.telemetry.totals import add_up, between, twilight_states

SHAPE = (len(LAYER_IDS), HEADS_KV)


def info(*snapshots: Snapshot) -> dict[str, Any]:
    return {"internal_states": [{"twilight": snapshot.to_dict()} for snapshot in snapshots]}


def test_only_what_came_between_counts_by_layer_and_head_too() -> None:
    later = totals(5)
    # Two more rows of 4000 tokens that keep 300 in the last layer's last head alone, half the mass.
    kept, context = later.kept_tokens.copy(), later.context_tokens + 8000
    kept[-1, -1] += 600
    after = totals(
        7, context_tokens=context, kept_tokens=kept, kept_mass=later.kept_mass + np.full(SHAPE, 1)
    )
    spent = between(info(later), info(after))
    assert spent is not None
    assert spent.shares() == {
        "context_tokens": 8000 * 6,
        "sparse_rows": 2,
        "candidate_share": pytest.approx(500 / 8000),
        "kept_share": pytest.approx(600 / (8000 * 6)),
        "kept_mass": pytest.approx(0.5, abs=1e-5),
    }
    heads = spent.heads()
    assert heads is not None
    assert heads["layer_ids"] == list(LAYER_IDS)
    expected = np.zeros(SHAPE)
    expected[-1, -1] = 300 / 4000
    assert np.allclose(heads["kept_fraction"], expected, atol=1e-5)
    assert np.allclose(heads["kept_mass"], 0.5, atol=1e-5)


def test_a_server_s_first_sparse_rows_count() -> None:
    spent = between(info(totals(0)), info(totals(3)))
    assert spent is not None
    assert spent.sparse_rows == 3
    assert spent.kept_mass() == pytest.approx(0.9)
    assert np.allclose(spent.heads()["kept_fraction"], totals(1).kept_tokens / 1000)


def test_replicas_weigh_by_their_context_and_their_rows() -> None:
    idle, short = totals(0), totals(1)
    long = totals(3, context_tokens=totals(9).context_tokens, kept_mass=np.full(SHAPE, 3 * 0.5))
    both = add_up(twilight_states(info(idle, short, long)))
    assert (both.sparse_rows, both.context_tokens) == (4, 10_000 * 6)
    assert both.kept_mass() == pytest.approx((0.9 + 3 * 0.5) / 4)
    heads = both.heads()
    assert heads is not None
    assert np.allclose(heads["kept_fraction"], 4 * totals(1).kept_tokens / 10_000, atol=1e-6)


def test_without_a_sparse_row_there_are_no_means() -> None:
    spent = between(info(totals(5)), info(totals(5)))
    assert spent is not None
    assert spent.heads() is None
    assert spent.shares() == {
        "context_tokens": 0,
        "sparse_rows": 0,
        "candidate_share": None,
        "kept_share": None,
        "kept_mass": None,
    }


@pytest.mark.parametrize("dense", [{}, {"internal_states": [{}]}, {"internal_states": None}])
def test_servers_that_decode_otherwise_have_none(dense: dict[str, Any]) -> None:
    assert twilight_states(dense) == []
    assert between(dense, info(totals(1))) is None
    assert between(info(totals(1)), dense) is None
