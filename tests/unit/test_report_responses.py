"""Reports in responses: of `/generate`, and of OpenAI's endpoints."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionResponse,
    CompletionResponse,
    UsageInfo,
)

from twilight_sgl.patches import meta_info, openai_report

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
