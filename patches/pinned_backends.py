"""Let models whose decode backends SGLang pins to a list of names decode with Twilight."""

from collections.abc import Callable
from typing import Any

from twilight_sgl.patches import Patch
from twilight_sgl.patches.compat import declare, model_adjustments, model_config, resolved
from twilight_sgl.plugin import BACKEND

PINNED = ("GptOssForCausalLM",)


def _adjust_without_twilight(original: Callable[..., Any], server_args: Any) -> None:
    """SGLang checks the dense backend, which also serves the layers that do not select."""
    if (
        resolved(server_args).decode_attention_backend != BACKEND
        or model_config(server_args).hf_config.architectures[0] not in PINNED
    ):
        original(server_args)
        return
    declare(server_args, decode_attention_backend=None)
    original(server_args)
    declare(server_args, decode_attention_backend=BACKEND)


PATCHES = [
    Patch(
        model_adjustments()[0],
        "around",
        _adjust_without_twilight,
        "gpt-oss is refused with a decode backend that is not on SGLang's own list",
        (model_adjustments()[1],),
    )
]
