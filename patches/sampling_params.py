"""Reject bad per-request options with HTTP 400, where SGLang checks its own parameters.

HTTP workers of --tokenizer-worker-num load no plugin, so the scheduler checks once more.
"""

from typing import Any

from twilight_sgl.errors import TwilightError
from twilight_sgl.patches import Patch
from twilight_sgl.request import RequestOptions


def _verify_options(result: Any, params: Any, *args: Any, **kwargs: Any) -> None:
    RequestOptions.from_custom_params(params.custom_params)


def _abort_bad_options(scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """Answer as SGLang does where its scheduler finds a bad request."""
    try:
        RequestOptions.from_custom_params(req.sampling_params.custom_params)
    except TwilightError as error:
        req.sampling_params.custom_params = None
        req.set_finish_with_abort(str(error))


PATCHES = [
    Patch(
        "sglang.srt.sampling.sampling_params.SamplingParams.verify",
        "after",
        _verify_options,
        "a bad custom_params.twilight must be refused before the request runs",
        ("self", "vocab_size"),
    ),
    Patch(
        "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
        "before",
        _abort_bad_options,
        "options that no HTTP worker checked would end the scheduler",
        ("self", "req"),
    ),
]
