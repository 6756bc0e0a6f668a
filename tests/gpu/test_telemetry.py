"""Counters on a GPU: replayed from a graph, polled without waiting, timed by its clock."""

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from served import PS, Served

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SLOTS, LENGTHS = [2, 3, 0, 1], [12 * PS - 3, 4 * PS - 2, 1, 6 * PS + 5]
SPARSE = [0, 3]


def captured(served: Served) -> torch.cuda.CUDAGraph:
    """The graph of a step of `SLOTS`, captured over padding as SGLang does."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        served.plan([0] * len(SLOTS), [1] * len(SLOTS))
        served.decode(len(SLOTS))  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        served.decode(len(SLOTS))
    return graph


def test_replays_count_and_capture_does_not() -> None:
    served = Served()
    graph = captured(served)
    assert served.runtime.snapshot().sparse_rows == 0
    tokens = torch.zeros(2, dtype=torch.int64)
    mass = 0.0
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for step in range(3):
            served.runtime.begin_step(dense=False)
            served.plan(SLOTS, [length + step for length in LENGTHS])
            graph.replay()
            sums = served.runtime.take_row_sums()
            stream.synchronize()
            candidates, kept, masses = served.counted(len(SLOTS))
            assert sums[SPARSE, 1].tolist() == candidates.sum((0, 2))[SPARSE].tolist()
            assert sums[SPARSE, 2].tolist() == kept.sum((0, 2))[SPARSE].tolist()
            expected = masses.sum((0, 2))[SPARSE].tolist()
            assert sums[SPARSE, 3].tolist() == pytest.approx(expected, rel=1e-12)
            assert sums[:, 4].sum() == (2 if step == 0 else 0)
            assert not sums[[1, 2]].any()
            tokens += torch.stack([candidates[:, SPARSE].sum(), kept[:, SPARSE].sum()])
            mass += float(masses[:, SPARSE].sum())
    now = served.runtime.snapshot()
    assert now.sparse_rows == 3 * len(SPARSE)
    assert [now.candidate_tokens.sum(), now.kept_tokens.sum()] == tokens.tolist()
    assert now.kept_mass.sum() == pytest.approx(mass, rel=1e-12)
    assert 0 < now.sealing_seconds < 1


def test_sealing_is_timed_only_when_pages_are_sealed() -> None:
    served = Served()
    served.step(SLOTS, LENGTHS)
    first = served.runtime.snapshot().sealing_seconds
    served.step(SLOTS, LENGTHS)
    second = served.runtime.snapshot().sealing_seconds
    served.runtime.pool.unseal_all()
    served.step(SLOTS, LENGTHS)
    assert 0 < first == second < served.runtime.snapshot().sealing_seconds


def test_polling_does_not_wait_for_the_stream() -> None:
    served = Served()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        served.step(SLOTS, LENGTHS)
        expected = served.runtime.snapshot()
        torch.cuda._sleep(2 * 10**9)  # about a second
    assert served.runtime.poll_snapshot() is None
    assert served.runtime.poll_snapshot() is None
    assert not stream.query()
    stream.synchronize()
    polled = served.runtime.poll_snapshot()
    assert polled is not None
    assert polled.to_dict() == expected.to_dict()


def test_polling_sees_whole_steps() -> None:
    """Every head of every layer has counted the same rows."""
    served = Served()
    polled = []
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        served.step(SLOTS, LENGTHS)
        context = int(served.runtime.snapshot().context_tokens[0, 0])
        for _ in range(200):
            served.runtime.begin_step(dense=False)
            served.plan(SLOTS, LENGTHS)
            served.decode(len(SLOTS))
            polled.append(served.runtime.poll_snapshot())
    stream.synchronize()
    time.sleep(0.01)
    polled.append(served.runtime.poll_snapshot())
    seen = [snapshot for snapshot in polled if snapshot is not None]
    assert len({snapshot.sparse_rows for snapshot in seen}) > 2
    for snapshot in seen:
        steps = snapshot.sparse_rows // len(SPARSE)
        assert (snapshot.context_tokens == steps * context).all()
