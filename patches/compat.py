"""Accessors that hide how SGLang releases in the supported range differ."""

from typing import Any


def resolved(server_args: Any) -> Any:
    """A view of server arguments after SGLang's own defaults were applied."""
    from sglang.srt.arg_groups.overrides import resolved_view

    return resolved_view(server_args)


def attention_backend_names(server_args: Any) -> tuple[str, str]:
    """The names of the prefill and the decode attention backend."""
    view = resolved(server_args)
    return (
        view.prefill_attention_backend or view.attention_backend,
        view.decode_attention_backend or view.attention_backend,
    )


def parallel_layout(server_args: Any) -> tuple[int, int]:
    """Replicas of the server, and data-parallel groups of the attention in each."""
    view = resolved(server_args)
    if hasattr(view, "attn_dp_size"):  # not up to 0.5.17
        return view.dp_size, view.attn_dp_size
    return (1, view.dp_size) if view.enable_dp_attention else (view.dp_size, 1)


def uses_twilight(server_args: Any) -> bool:
    """Whether this server decodes with Twilight."""
    from twilight_sgl.plugin import BACKEND

    return attention_backend_names(server_args)[1] == BACKEND


def model_config(server_args: Any) -> Any:
    """SGLang's ModelConfig of the served model."""
    if hasattr(server_args, "get_model_config"):  # up to 0.5.17
        return server_args.get_model_config()
    from sglang.srt.arg_groups.overrides import model_config_of

    return model_config_of(server_args)


def resolution_method() -> str:
    """The method of ServerArgs that applies SGLang's defaults to what the user gave."""
    from sglang.srt.server_args import ServerArgs

    return "resolve_once" if hasattr(ServerArgs, "resolve_once") else "__post_init__"


def declare(server_args: Any, **fields: Any) -> None:
    """Set fields while SGLang resolves its arguments."""
    try:
        from sglang.srt.arg_groups.overrides import declare_resolution
    except ImportError:  # up to 0.5.17
        for name, value in fields.items():
            setattr(server_args, name, value)
    else:
        declare_resolution(server_args, "twilight", **fields)


def model_adjustments() -> tuple[str, str]:
    """The function that adjusts arguments to the model's architecture, and its parameter."""
    if resolution_method() == "resolve_once":
        return "sglang.srt.arg_groups.model_hook.handle_model_specific_adjustments", "server_args"
    return "sglang.srt.server_args.ServerArgs._handle_model_specific_adjustments", "self"


def decodes_as_extend() -> bool:
    """Whether this SGLang's scheduler may turn a decode batch into a prefill (not up to 0.5.17)."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    return hasattr(ScheduleBatch, "convert_decode_to_extend")


def parallel_state(scheduler: Any) -> Any:
    """What a scheduler's `tp_rank`, `pp_rank`, `dp_rank`, `tp_size` and `pp_size` are."""
    if hasattr(scheduler, "ps"):  # up to 0.5.17
        return scheduler.ps
    from sglang.srt.runtime_context import get_parallel

    return get_parallel()
