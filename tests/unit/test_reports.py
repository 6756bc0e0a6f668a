"""Reports of requests: what fills them, how SGLang carries them, and where they end up."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionResponse,
    CompletionResponse,
    UsageInfo,
)
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.scheduler_components.batch_result_processor import (
    SchedulerBatchResultProcessor,
)
from sglang.srt.managers.tokenizer_manager import _slice_streaming_output_meta_info

from twilight_sgl.kernels.count.reference import ROW_SUMS
from twilight_sgl.patches import meta_info, openai_report, server_info
from twilight_sgl.request import RequestOptions
from twilight_sgl.telemetry.guard import harmless
from twilight_sgl.telemetry.report import (
    ReportedOnce,
    RequestReport,
    StepSums,
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

    def finished(self) -> bool:
        return self.has_finished


class Runtime:
    """A runtime whose next steps have the given sums."""

    def __init__(self, *sums: list[list[float]] | None) -> None:
        self._sums = list(sums)

    def take_row_sums(self) -> torch.Tensor | None:
        sums = self._sums.pop(0)
        return None if sums is None else torch.tensor(sums, dtype=torch.float64)

    def row_sums_kept(self) -> Callable[[], bool]:
        return lambda: True

    def report_for(self, req: Any, options: RequestOptions) -> RequestReport:
        return RequestReport(req, options.p, PAIRS)


def row(context: float, kept: float, mass: float, reused: float = 0) -> list[float]:
    return [context, 2 * kept, kept, mass, reused]


def test_a_report_averages_over_sparse_steps() -> None:
    req = Req(finished=True)
    report = RequestReport(req, 0.5, PAIRS)
    again = row(606, 66, 4.8, reused=4)  # after a retraction, when its own pages are sealed too
    for sums in (DENSE, row(600, 60, 5.4, reused=3), again, None):
        report.append(sums)
    shown = report.to_dict()
    assert shown == {
        "p": 0.5,
        "steps": 2,
        "average_budget": pytest.approx(126 / 12),
        "kept_fraction": pytest.approx(126 / 1206),
        "kept_mass": pytest.approx(10.2 / 12),
        "prefix_pages_reused": 3,
    }
    assert report[2:5] == [None] * 4 + [shown]
    assert report[0:0] == []


def test_a_report_without_a_sparse_step_has_no_averages() -> None:
    shown = RequestReport(Req(), None, PAIRS).to_dict()
    assert shown == {
        "p": None,
        "steps": 0,
        "average_budget": None,
        "kept_fraction": None,
        "kept_mass": None,
        "prefix_pages_reused": 0,
    }


def test_only_a_finished_request_is_reported() -> None:
    req = Req()
    report = RequestReport(req, 0.5, PAIRS)
    report.append(row(600, 60, 5.4))
    values = ReportedOnce({"theirs": [1], "twilight": report})
    assert report[0:3] == [None] * 3
    assert dict(values.items()) == {"theirs": [1]}
    assert "twilight" in values and values["twilight"] is report  # SGLang appends to it
    req.has_finished = True
    assert dict(values.items()) == {"theirs": [1], "twilight": report}
    del req
    assert report[0:2] == [None] * 2
    assert dict(values.items()) == {"theirs": [1]}


@pytest.mark.parametrize("others_before", [0, 2])
def test_a_stream_of_deltas_ends_with_the_report(others_before: int) -> None:
    """SGLang cuts off the values of tokens that it has sent, whether or not it had them."""
    req = Req(finished=True)
    report = RequestReport(req, 0.5, PAIRS)
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


def test_steps_fill_the_reports_of_their_rows() -> None:
    """Through SGLang's own collection of values by token."""
    runtime = Runtime([row(600, 60, 5.4), DENSE], None, [row(606, 66, 4.8), row(500, 50, 6.0)])
    reqs = [Req({"twilight": {"p": p}}, finished=True) for p in (0.5, 0.75)]
    for _ in range(3):
        # A retracted request is given a slot again, and keeps its report.
        meta_info._follow([4, 7], SimpleNamespace(twilight=runtime), reqs)
        logits_output = LogitsProcessorOutput(None)
        output = SimpleNamespace(logits_output=logits_output)
        meta_info._add_sums(output, SimpleNamespace(twilight=runtime), None)
        for index, req in enumerate(reqs):
            SchedulerBatchResultProcessor._maybe_collect_customized_info(
                None, index, req, logits_output
            )
    shown = [req.customized_info["twilight"][0:3][-1] for req in reqs]
    assert [(s["p"], s["steps"]) for s in shown] == [(0.5, 2), (0.75, 1)]
    assert shown[0]["kept_fraction"] == pytest.approx(126 / 1206)
    assert shown[1]["kept_fraction"] == pytest.approx(0.1)


def test_values_of_others_are_kept() -> None:
    mine, theirs = Runtime([DENSE]), {"theirs": [1]}
    logits_output = LogitsProcessorOutput(None, customized_info=theirs)
    output = SimpleNamespace(logits_output=logits_output)
    meta_info._add_sums(output, SimpleNamespace(twilight=mine), None)
    assert set(logits_output.customized_info) == {"theirs", "twilight"}
    assert theirs == {"theirs": [1]}
    req = Req()
    req.customized_info = {"theirs": [1]}
    meta_info._follow([3], SimpleNamespace(twilight=mine), [req])
    assert set(req.customized_info) == {"theirs", "twilight"}


def test_runners_without_twilight_and_middles_of_pipelines_are_left_alone() -> None:
    output = SimpleNamespace(logits_output=LogitsProcessorOutput(None))
    meta_info._add_sums(output, SimpleNamespace(), None)
    assert output.logits_output.customized_info is None
    middle = SimpleNamespace(logits_output=SimpleNamespace(tensors={}))
    meta_info._add_sums(middle, SimpleNamespace(twilight=Runtime([DENSE])), None)
    assert vars(middle.logits_output) == {"tensors": {}}
    req = Req()
    meta_info._follow([3], SimpleNamespace(), [req])
    assert req.customized_info is None


def test_a_failing_runtime_fails_no_forward() -> None:
    output = SimpleNamespace(logits_output=LogitsProcessorOutput(None))
    meta_info._add_sums(output, SimpleNamespace(twilight=Runtime()), None)
    assert output.logits_output.customized_info is None
    sums = StepSums(torch.zeros((1, 5), dtype=torch.float64), lambda: True)
    req = Req(finished=True)
    report = RequestReport(req, 0.5, PAIRS)
    report.append(sums[3])
    assert report.to_dict()["steps"] == 0
    other = Runtime([[1.0] * 4])
    meta_info._add_sums(output, SimpleNamespace(twilight=other), None)
    assert output.logits_output.customized_info is None
    meta_info._add_sums(output, SimpleNamespace(twilight=Runtime([DENSE])), None)
    assert output.logits_output.customized_info is not None


def test_overwritten_sums_are_left_out_and_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    sums = torch.tensor([row(1000, 100, 0.9)], dtype=torch.float64)
    report = RequestReport(Req(finished=True), 0.5, PAIRS)
    for is_kept in (True, False, True):
        report.append(StepSums(sums, lambda kept=is_kept: kept)[0])
    assert report.to_dict()["steps"] == 2
    assert "reports can follow" in caplog.text


def test_a_failing_runtime_fails_no_server_info() -> None:
    result = SimpleNamespace(internal_state={"a": 1})
    runner = SimpleNamespace(twilight=Runtime())  # has no state to show
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))
    assert server_info.PATCHES[0].hook(result, scheduler) is None
    assert result.internal_state == {"a": 1}


REPORT = {"p": 0.5, "steps": 2}


def collapse(responses: list[Any], obj: Any) -> list[Any]:
    async def generate(manager: Any, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        for response in responses:
            yield response

    async def run() -> list[Any]:
        return [item async for item in meta_info._collapse(generate, None, obj, None)]

    return asyncio.run(run())


def test_a_response_has_one_report_instead_of_values_by_token() -> None:
    values = [None]
    first = {"meta_info": {"id": "a", "twilight": values}}
    end = {"type": "length", "length": 2}
    meta = {"id": "a", "finish_reason": end}
    last = {"meta_info": {**meta, "twilight": [None, REPORT]}, "index": 1}
    wish = SimpleNamespace(twilight_reports={})
    assert collapse([first, last], wish) == [
        {"meta_info": {"id": "a"}},
        {"meta_info": {**meta, "twilight": REPORT}, "index": 1},
    ]
    assert values == [None]
    assert wish.twilight_reports == {0: None, 1: REPORT}  # a place for each choice


def test_lists_of_responses_and_embeddings() -> None:
    ended = {"finish_reason": {"type": "stop"}}
    batch = [{"meta_info": ended | {"twilight": [REPORT]}}, {"meta_info": {}}, {"embedding": [1.0]}]
    (collapsed,) = collapse([batch], SimpleNamespace())
    assert collapsed == [
        {"meta_info": ended | {"twilight": REPORT}},
        {"meta_info": {}},
        {"embedding": [1.0]},
    ]


def test_closing_a_response_closes_what_it_reads() -> None:
    closed = []

    async def generate(manager: Any, obj: Any) -> AsyncIterator[Any]:
        try:
            yield {"meta_info": {}}
            yield {"meta_info": {}}
        finally:
            closed.append(True)

    async def run() -> None:
        responses = meta_info._collapse(generate, None, SimpleNamespace())
        await responses.__anext__()
        await responses.aclose()

    asyncio.run(run())
    assert closed == [True]


def wish(report: bool) -> Any:
    return SimpleNamespace(custom_params={"twilight": {"report": report}})


@pytest.mark.parametrize("kind", [ChatCompletionResponse, CompletionResponse])
def test_an_openai_response_has_a_field_when_asked(kind: type) -> None:
    response = kind(id="a", model="m", choices=[], usage=UsageInfo())
    ret = [{"meta_info": {"twilight": REPORT}}]
    assert openai_report._add_field(response, None, wish(False), ret, 0) is None
    changed = openai_report._add_field(response, None, wish(True), ret, 0)
    assert isinstance(changed, kind)
    expected = json.loads(response.model_dump_json()) | {"twilight": REPORT}
    assert json.loads(changed.model_dump_json()) == expected
    two = openai_report._add_field(response, None, wish(True), [*ret, {"meta_info": {}}], 0)
    assert two.twilight == [REPORT, None]
    assert openai_report._add_field("an error", None, wish(True), ret, 0) is None


CHUNK = 'data: {"id": "a", "object": "chunk", "created": 7, "model": "m", "choices": [1]}\n\n'
LAST = "data: [DONE]\n\n"


def stream(request: Any, reports: dict[int, Any]) -> list[str]:
    adapted = SimpleNamespace()

    async def generate(serving: Any, adapted: Any, request: Any, raw: Any) -> AsyncIterator[str]:
        yield CHUNK
        if hasattr(adapted, "twilight_reports"):
            adapted.twilight_reports.update(reports)
        yield CHUNK
        yield LAST

    async def run() -> list[str]:
        chunks = openai_report._add_chunk(generate, None, adapted, request, None)
        return [chunk async for chunk in chunks]

    return asyncio.run(run())


def test_a_stream_has_a_chunk_of_its_own_when_asked() -> None:
    about = {"id": "a", "object": "chunk", "created": 7, "model": "m", "choices": []}
    *before, chunk, last = stream(wish(True), {0: REPORT})
    assert (before, last) == ([CHUNK, CHUNK], LAST)
    assert json.loads(chunk.removeprefix("data: ")) == about | {"twilight": REPORT}
    assert chunk.endswith("\n\n")
    *_, chunk, _ = stream(wish(True), {1: {"steps": 1}, 0: REPORT})
    assert json.loads(chunk.removeprefix("data: "))["twilight"] == [REPORT, {"steps": 1}]
    *_, chunk, _ = stream(wish(True), {0: None, 1: REPORT})  # the first choice was aborted
    assert json.loads(chunk.removeprefix("data: "))["twilight"] == [None, REPORT]


@pytest.mark.parametrize(
    "request_and_reports",
    [
        (wish(False), {0: REPORT}),
        (wish(True), {}),
        (wish(True), {0: None}),
        (SimpleNamespace(custom_params={"twilight": {"p": 2}}), {0: REPORT}),
        (SimpleNamespace(), {0: REPORT}),
    ],
    ids=["not asked", "no choice", "no report", "bad options", "without custom_params"],
)
def test_other_streams_are_as_they_were(
    request_and_reports: tuple[Any, dict[int, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    assert stream(*request_and_reports) == [CHUNK, CHUNK, LAST]
    if hasattr(request_and_reports[0], "custom_params"):
        assert not caplog.records
