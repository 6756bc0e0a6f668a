"""Tell a request what its decode steps kept: `meta_info["twilight"]` of its last response.

SGLang carries values by output token from a request to its response; ours ride along, with no copy
or wait that SGLang does not make anyway.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from twilight_sgl.patches import Patch
from twilight_sgl.request import KEY, RequestOptions
from twilight_sgl.telemetry.guard import harmless
from twilight_sgl.telemetry.report import ReportedOnce, last_report


@harmless
def _follow(slots: list[int] | None, table: Any, reqs: list[Any], *args: Any) -> None:
    """Give requests a report to fill; one that comes back after a retraction has it already."""
    runtime = getattr(table, "twilight", None)
    if runtime is None or not slots:
        return
    for req in reqs:
        values = req.customized_info
        if values and KEY in values:
            continue
        options = RequestOptions.from_custom_params(req.sampling_params.custom_params)
        report = runtime.report_for(req, options)
        if report is not None:
            req.customized_info = ReportedOnce(values or ())
            req.customized_info[KEY] = report


@harmless
def _add_sums(output: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    """Send a step's sums with its output."""
    runtime = getattr(model_runner, "twilight", None)
    if runtime is None:
        return
    sums = runtime.take_row_sums()
    logits_output = output.logits_output
    if sums is not None and hasattr(logits_output, "customized_info"):  # not a pipeline's middle
        logits_output.twilight_sums = sums, runtime.row_sums_kept()


@harmless
def note_sums(scheduler: Any, batch: Any, result: Any) -> None:
    """Note the sums that came with a result, for the reports of its batch's requests."""
    runtime = getattr(scheduler.tp_worker.model_runner, "twilight", None)
    if runtime is None:
        return
    noted = getattr(getattr(result, "logits_output", None), "twilight_sums", None)
    if noted is not None:
        runtime.reports.add(batch.reqs, *noted)
    else:  # those before it may be overwritten before others come
        runtime.reports.settle()


async def _collapse(
    original: Callable[..., Any], manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[Any]:
    """Replace the values by token with the one report among them."""
    async with contextlib.aclosing(original(manager, obj, *args, **kwargs)) as responses:
        async for response in responses:
            _collapse_values(response, obj)
            yield response


@harmless
def _collapse_values(response: Any, obj: Any) -> None:
    by_choice = getattr(obj, "twilight_reports", None)  # set by `openai_report`
    for item in response if isinstance(response, list) else [response]:
        meta_info = item.get("meta_info") or {}
        values = meta_info.pop(KEY, None)
        report = last_report(values) if meta_info.get("finish_reason") else None
        if report is not None:
            meta_info[KEY] = report
        if by_choice is not None:
            index = item.get("index", 0)
            by_choice[index] = report or by_choice.get(index)


PATCHES = [
    Patch(target, "after", _follow, "a report sums over all steps of a request", ("self", "reqs"))
    for target in (
        "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.alloc",
        "sglang.srt.disaggregation.decode.DecodeReqToTokenPool.alloc",
    )
] + [
    Patch(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        "after",
        _add_sums,
        "a step's sums belong to its output",
        ("self", "forward_batch"),
    ),
    Patch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        "around",
        _collapse,
        "a response would list a value for every token",
        ("self", "obj"),
    ),
]
