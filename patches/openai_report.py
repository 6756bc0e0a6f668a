"""A `twilight` field in OpenAI responses whose request asks for it.

With `custom_params: {"twilight": {"report": true}}` a chat or text completion carries what
`/generate` calls `meta_info["twilight"]`: an object, or a list by choice where there are several. A
stream sends it in a chunk of its own, without choices, before `[DONE]`.
"""

import contextlib
import functools
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, create_model

from twilight_sgl.errors import TwilightError
from twilight_sgl.patches import Patch
from twilight_sgl.request import KEY, RequestOptions
from twilight_sgl.telemetry.guard import harmless

SERVING = "sglang.srt.entrypoints.openai"
DONE = "data: [DONE]"
PREFIX = "data: "


@harmless
def _is_wanted(request: Any) -> bool:
    try:
        return RequestOptions.from_custom_params(request.custom_params).report
    except TwilightError:  # which SGLang is about to answer with
        return False


@functools.cache
def _with_field(kind: type[BaseModel]) -> type[BaseModel]:
    return create_model(kind.__name__, __base__=kind, twilight=(Any, None))


@harmless
def _add_field(
    response: Any, serving: Any, request: Any, ret: Sequence[Mapping[str, Any]], *args: Any
) -> Any:
    if not isinstance(response, BaseModel) or not _is_wanted(request):
        return None
    reports = [item["meta_info"].get(KEY) for item in ret]
    values = {name: getattr(response, name) for name in type(response).model_fields}
    return _with_field(type(response)).model_construct(**values, twilight=_field(reports))


async def _add_chunk(
    original: Callable[..., Any], serving: Any, adapted_request: Any, request: Any, *args: Any
) -> AsyncIterator[str]:
    reports: dict[int, Any] | None = None
    if _is_wanted(request):
        reports = adapted_request.twilight_reports = {}
    last = ""
    async with contextlib.aclosing(original(serving, adapted_request, request, *args)) as chunks:
        async for chunk in chunks:
            if reports and any(reports.values()) and chunk.startswith(DONE):
                more = _chunk(last, [reports[index] for index in sorted(reports)])
                if more is not None:
                    yield more
            last = chunk
            yield chunk


@harmless
def _chunk(last: str, reports: Sequence[Any]) -> str:
    """A chunk with the reports, of the completion that another chunk is of."""
    before = json.loads(last.removeprefix(PREFIX))
    about = {name: before[name] for name in ("id", "object", "created", "model")}
    return f"{PREFIX}{json.dumps({**about, 'choices': [], KEY: _field(reports)})}\n\n"


def _field(reports: Sequence[Any]) -> Any:
    return reports[0] if len(reports) == 1 else list(reports)


WHY = "SGLang builds OpenAI responses without meta_info"

PATCHES = [
    Patch(
        f"{SERVING}.serving_chat.OpenAIServingChat._build_chat_response",
        "after",
        _add_field,
        WHY,
        ("self", "request", "ret"),
    ),
    Patch(
        f"{SERVING}.serving_completions.OpenAIServingCompletion._build_completion_response",
        "after",
        _add_field,
        WHY,
        ("self", "request", "ret"),
    ),
    Patch(
        f"{SERVING}.serving_chat.OpenAIServingChat._generate_chat_stream",
        "around",
        _add_chunk,
        WHY,
        ("self", "adapted_request", "request", "raw_request"),
    ),
    Patch(
        f"{SERVING}.serving_completions.OpenAIServingCompletion._generate_completion_stream",
        "around",
        _add_chunk,
        WHY,
        ("self", "adapted_request", "request", "raw_request"),
    ),
]
