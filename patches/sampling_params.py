"""Reject bad per-request options with HTTP 400, where SGLang checks its own parameters."""

from typing import Any

from twilight_sgl.patches import Patch
from twilight_sgl.request import RequestOptions


def _verify_options(result: Any, params: Any, *args: Any, **kwargs: Any) -> None:
    RequestOptions.from_custom_params(params.custom_params)


PATCHES = [
    Patch(
        "sglang.srt.sampling.sampling_params.SamplingParams.verify",
        "after",
        _verify_options,
        "a bad custom_params.twilight must be refused before the request runs",
        ("self", "vocab_size"),
    )
]
