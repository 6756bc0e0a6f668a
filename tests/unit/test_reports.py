"""Reports of requests: what fills them, and how SGLang carries them."""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.tokenizer_manager import _slice_streaming_output_meta_info

from twilight_sgl.kernels.count.reference import ROW_SUMS
from twilight_sgl.patches import meta_info, server_info
from twilight_sgl.request import RequestOptions
from twilight_sgl.telemetry.guard import harmless
from twilight_sgl.telemetry.report import (
    MOST_STEPS,
    ReportedOnce,
    Reports,
    RequestReport,
    RowSums,
    last_report,
)

PAIRS = 6  # layers that select times KV heads
DENSE = [0.0] * len(ROW_SUMS)


class Req:
    """As much of SGLang's request as a report sees."""

    def __init__(self, custom_params: Any = None, finished: bool = False) -> None:
        self.customized_info: dict[str, Any] | None = None
        self.sampling_params = SimpleNamespace(custom_params=custom_params)
        self.has_finished = finished
        self.is_retracted = False

    def finished(self) -> bool:
        return self.has_finished


class Runtime:
    """A runtime whose next steps have the given sums."""

    def __init__(self, *sums: list[list[float]] | None) -> None:
        self._sums = list(sums)
        self.reports = Reports()
        self.is_kept = True

    def take_row_sums(self) -> RowSums | None:
        sums = self._sums.pop(0)
        return None if sums is None else np.array(sums)

    def row_sums_kept(self) -> Callable[[], bool]:
        return lambda: self.is_kept

    def report_for(self, req: Any, options: RequestOptions) -> RequestReport:
        return RequestReport(req, options.p, PAIRS, self.reports.settle)

    def run_step(self, reqs: list[Req]) -> None:
        """A forward, and SGLang about to read its result."""
        output = SimpleNamespace(logits_output=LogitsProcessorOutput(None))
        meta_info._add_sums(output, SimpleNamespace(twilight=self), None)
        model_runner = SimpleNamespace(twilight=self)
        scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=model_runner))
        meta_info.note_sums(scheduler, SimpleNamespace(reqs=reqs), output)


def nothing_waits() -> None:
    """In place of `Reports.settle`."""


def row(context: float, kept: float, mass: float, reused: float = 0) -> list[float]:
    return [context, 2 * kept, kept, mass, reused]


def served(*sums: list[list[float]] | None, requests: int = 1) -> tuple[Runtime, list[Req]]:
    """A runtime with such steps to come, and requests that it has given reports."""
    runtime = Runtime(*sums)
    reqs = [Req({"twilight": {"p": (index + 1) / 4}}) for index in range(requests)]
    meta_info._follow(list(range(requests)), SimpleNamespace(twilight=runtime), reqs)
    return runtime, reqs


def report_of(req: Req) -> dict[str, Any]:
    """A request's report when it ends."""
    req.has_finished = True
    assert req.customized_info is not None
    shown: dict[str, Any] = req.customized_info["twilight"][0:3][-1]
    return shown


def test_a_report_averages_over_sparse_steps() -> None:
    sums = (DENSE, row(600, 60, 5.4, reused=3), row(606, 66, 4.8))
    runtime, (req,) = served(*([each] for each in sums))
    for _ in sums:
        runtime.run_step([req])
    shown = report_of(req)
    assert shown == {
        "p": 0.25,
        "steps": 2,
        "average_budget": pytest.approx(126 / 12),
        "kept_fraction": pytest.approx(126 / 1206),
        "kept_mass": pytest.approx(10.2 / 12),
        "prefix_pages_reused": 3,
    }
    assert req.customized_info is not None
    report = req.customized_info["twilight"]
    assert report[2:5] == [None] * 4 + [shown]
    assert report[0:0] == []


def test_a_report_without_a_sparse_step_has_no_averages() -> None:
    shown = RequestReport(Req(), None, PAIRS, nothing_waits).to_dict()
    assert shown == {
        "p": None,
        "steps": 0,
        "average_budget": None,
        "kept_fraction": None,
        "kept_mass": None,
        "prefix_pages_reused": 0,
    }


@pytest.mark.parametrize("steps", [1, MOST_STEPS - 1, MOST_STEPS, MOST_STEPS + 1, 50])
def test_all_steps_of_a_batch_that_changes_are_added_up(steps: int) -> None:
    generator = np.random.default_rng(3)
    sums = generator.integers(1, 1000, (steps, 5, len(ROW_SUMS))).astype(float)
    sums[:, :, 4] = 0
    sums[0, :, 4] = 7
    sums[generator.random((steps, 5)) < 0.2] = 0.0  # steps in which a request was dense
    sums[::3] = sums[::3].round()
    runtime, reqs = served(*sums.tolist(), requests=4)
    expected = np.zeros((4, len(ROW_SUMS)))
    counts = np.zeros(4)
    began: dict[int, float] = {}
    for step in range(steps):  # rows that a graph pads the batch with have no request
        batch = [0, 1, 2, 3] if step % 11 < 6 else [3, 1]
        runtime.run_step([reqs[index] for index in batch])
        for place, index in enumerate(batch):
            expected[index] += sums[step, place]
            counts[index] += sums[step, place, 0] > 0
            if sums[step, place, 0] > 0:
                began.setdefault(index, sums[step, place, 4])
    for index, req in enumerate(reqs):
        shown = report_of(req)
        context, _, kept, mass, _ = expected[index]
        assert shown["steps"] == counts[index]
        if counts[index]:
            assert shown["kept_fraction"] == pytest.approx(kept / context)
            assert shown["kept_mass"] == pytest.approx(mass / counts[index] / PAIRS)
            assert shown["average_budget"] == pytest.approx(kept / counts[index] / PAIRS)
            assert shown["prefix_pages_reused"] == began[index]


def test_sums_are_read_late_and_all_at_once() -> None:
    """A step's are noted before the GPU has ended it."""
    runtime = Runtime()
    req = Req()
    meta_info._follow([1], SimpleNamespace(twilight=runtime), [req])
    memory = np.zeros((MOST_STEPS + 1, 1, len(ROW_SUMS)))
    for step in range(MOST_STEPS + 1):
        runtime.reports.add([req], memory[step], lambda: True)
        memory[step] = row(100, 10, 1.0)
    assert report_of(req)["steps"] == MOST_STEPS + 1


def test_a_step_too_many_and_a_retracted_one_do_not_count() -> None:
    step = [row(600, 60, 5.4, reused=2), row(500, 50, 6.0)]
    runtime, (first, second) = served(step, step, step, step, requests=2)
    runtime.run_step([first, second])
    second.is_retracted = True
    runtime.run_step([first, second])
    second.is_retracted = False
    assert report_of(first)["steps"] == 2
    runtime.run_step([first, second])  # launched before the first was known to have ended
    assert report_of(first)["steps"] == 2
    assert report_of(second)["steps"] == 2
    runtime.run_step([first, second])  # and both
    assert report_of(second)["steps"] == 2
    assert not runtime.reports._steps


def test_a_request_that_was_retracted_keeps_its_report() -> None:
    runtime, (req,) = served([row(600, 60, 5.4, reused=3)], [row(606, 66, 4.8, reused=4)])
    for _ in range(2):
        runtime.run_step([req])
        meta_info._follow([5], SimpleNamespace(twilight=runtime), [req])
    runtime.reports.settle()
    shown = report_of(req)
    assert (shown["p"], shown["steps"], shown["prefix_pages_reused"]) == (0.25, 2, 3)


def test_only_a_finished_request_is_reported() -> None:
    req = Req()
    report = RequestReport(req, 0.5, PAIRS, nothing_waits)
    report.add(1, 600, 60, 5.4, reused=0)
    values = ReportedOnce({"theirs": [1], "twilight": report})
    assert report[0:3] == [None] * 3
    assert dict(values.items()) == {"theirs": [1]}
    assert "twilight" in values and values["twilight"] is report  # SGLang appends to others
    req.has_finished = True
    assert dict(values.items()) == {"theirs": [1], "twilight": report}
    del req
    assert report[0:2] == [None] * 2
    assert dict(values.items()) == {"theirs": [1]}


@pytest.mark.parametrize("others_before", [0, 2])
def test_a_stream_of_deltas_ends_with_the_report(others_before: int) -> None:
    """SGLang cuts off the values of tokens that it has sent, whether or not it had them."""
    req = Req(finished=True)
    report = RequestReport(req, 0.5, PAIRS, nothing_waits)
    accumulated = [None] * others_before  # sent beside another request's report
    accumulated += report[6:8]
    info = {"twilight": accumulated, "finish_reason": {"type": "stop"}}
    _slice_streaming_output_meta_info(info, 6, ["twilight"])
    assert last_report(info["twilight"]) == report.to_dict()


def test_the_last_report_counts() -> None:
    assert last_report([None, {"steps": 1}, None, {"steps": 2}, None]) == {"steps": 2}
    assert last_report([None, [1.0]]) is None
    assert last_report([]) is last_report(None) is None


def test_a_failure_is_logged_once_and_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    @harmless
    def fail(divisor: int) -> float:
        return 1 / divisor

    assert fail(2) == 0.5
    with caplog.at_level(logging.ERROR):
        assert fail(0) is fail(0) is None
    (record,) = caplog.records
    assert "fail failed; requests go on" in record.message and record.exc_info


def test_values_of_others_are_kept() -> None:
    runtime, theirs = Runtime([DENSE]), {"theirs": [1]}
    logits_output = LogitsProcessorOutput(None, customized_info=theirs)
    output = SimpleNamespace(logits_output=logits_output)
    meta_info._add_sums(output, SimpleNamespace(twilight=runtime), None)
    assert logits_output.customized_info is theirs and theirs == {"theirs": [1]}
    req = Req()
    req.customized_info = {"theirs": [1]}
    meta_info._follow([3], SimpleNamespace(twilight=runtime), [req])
    assert set(req.customized_info) == {"theirs", "twilight"}


def test_runners_without_twilight_and_middles_of_pipelines_are_left_alone() -> None:
    output = SimpleNamespace(logits_output=LogitsProcessorOutput(None))
    before = dict(vars(output.logits_output))
    meta_info._add_sums(output, SimpleNamespace(), None)
    assert vars(output.logits_output) == before
    middle = SimpleNamespace(logits_output=SimpleNamespace(tensors={}))
    meta_info._add_sums(middle, SimpleNamespace(twilight=Runtime([DENSE])), None)
    assert vars(middle.logits_output) == {"tensors": {}}
    req = Req()
    meta_info._follow([3], SimpleNamespace(), [req])
    assert req.customized_info is None
    plain = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=SimpleNamespace()))
    meta_info.note_sums(plain, SimpleNamespace(reqs=[req]), output)


def test_requests_without_a_report_and_rows_without_a_request() -> None:
    runtime = Runtime([row(600, 60, 5.4)] * 3)
    theirs, none = Req(), Req()
    theirs.customized_info = {"theirs": [1]}
    runtime.run_step([theirs, none])
    runtime.reports.settle()
    assert (theirs.customized_info, none.customized_info) == ({"theirs": [1]}, None)


def test_a_failing_runtime_fails_no_forward(caplog: pytest.LogCaptureFixture) -> None:
    runtime, (req,) = served()  # of a runtime that has no step to come
    runtime.run_step([req])
    runtime.reports.add([req], np.array([row(600, 60, 5.4)]), lambda: 1 / 0 > 0)
    assert report_of(req)["steps"] == 0
    runtime, (req,) = served([[1.0] * 4], [row(600, 60, 5.4)])
    runtime.run_step([req])
    assert "each row wants" in caplog.text
    runtime.run_step([req])
    assert report_of(req)["steps"] == 1


def test_overwritten_sums_are_left_out_and_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    reports = Reports()
    req = Req()
    req.customized_info = {"twilight": RequestReport(req, 0.5, PAIRS, reports.settle)}
    for is_kept in (True, False, True):
        sums = np.array([row(1000, 100, 0.9)])
        reports.add([req], sums, lambda kept=is_kept: kept)
    assert report_of(req)["steps"] == 2
    assert "reports can follow" in caplog.text


def test_results_without_sums_settle_those_before(caplog: pytest.LogCaptureFixture) -> None:
    """Steps that do not select may come for as long as they like, and theirs are overwritten."""
    runtime, (req,) = served([row(600, 60, 5.4)], None)
    runtime.run_step([req])
    runtime.run_step([req])
    runtime.is_kept = False
    assert report_of(req)["steps"] == 1
    assert not caplog.records


def test_a_failing_runtime_fails_no_server_info() -> None:
    result = SimpleNamespace(internal_state={"a": 1})
    runner = SimpleNamespace(twilight=Runtime())  # has no state to show
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))
    assert server_info.PATCHES[0].hook(result, scheduler) is None
    assert result.internal_state == {"a": 1}
