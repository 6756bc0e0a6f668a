"""Speculative decoding beside Twilight: drafting and verification stay dense."""

from typing import Any

from twilight_sgl.patches import Patch
from twilight_sgl.patches.compat import attention_backend_names, declare, resolved, uses_twilight


def _name_draft_backend(server_args: Any) -> None:
    """Draft backends are chosen by name from a list of SGLang's that ours is not on."""
    view = resolved(server_args)
    if (
        view.speculative_algorithm
        and not view.speculative_draft_attention_backend
        and uses_twilight(server_args)
    ):
        prefill, _ = attention_backend_names(server_args)
        declare(server_args, speculative_draft_attention_backend=prefill)


PATCHES = [
    Patch(
        "sglang.srt.arg_groups.speculative_hook.handle_speculative_decoding",
        "before",
        _name_draft_backend,
        "a draft model without a backend of its own would be given Twilight, which it has none of",
        ("server_args",),
    )
]
