"""Twilight's flags on SGLang's command line, its defaults, and refusals before weights load."""

import argparse
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twilight_sgl import config as twilight_config
from twilight_sgl.config import PAGE_SIZES, TwilightConfig
from twilight_sgl.errors import TwilightError
from twilight_sgl.patches import Patch
from twilight_sgl.patches.compat import (
    attention_backend_names,
    model_config,
    parallel_layout,
    resolution_method,
    resolved,
    uses_twilight,
)
from twilight_sgl.plugin import BACKEND

logger = logging.getLogger(__name__)

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16", "float16", "float32", "fp8_e4m3")

# Modes under which a page id means something else, or in which no decode step of ours exists.
REFUSED_MODES = {
    "enable_unified_memory": "--enable-unified-memory gives pages virtual ids",
    "enable_hisparse": "--enable-hisparse gives pages virtual ids",
    "enable_kv_cache_sharding": "--enable-kv-cache-sharding interleaves pages over ranks",
    "enable_two_batch_overlap": "--enable-two-batch-overlap splits decode batches",
    "enable_pdmux": "--enable-pdmux runs several decode backends on one pool",
    "prefill_only_disable_kv_cache": "--prefill-only-disable-kv-cache keeps no KV cache",
    "dllm_algorithm": "--dllm-algorithm decodes blocks, not tokens",
}

REMEDY = "drop the flag, or use another --decode-attention-backend"


def _add_flags(result: Any, parser: argparse.ArgumentParser) -> None:
    twilight_config.add_flags(parser)


def _read_flags(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """SGLang drops attributes it does not know, so they go where its workers can read them."""
    twilight_config.from_flags(args).to_environment()
    return original(cls, args)


def _apply_defaults(server_args: Any) -> None:
    if getattr(server_args, "_resolution_finished", False):
        return
    for name in ("attention_backend", "prefill_attention_backend"):
        if getattr(server_args, name) == BACKEND:
            raise TwilightError(
                f"--{name.replace('_', '-')} {BACKEND}: Twilight only decodes; "
                f"use --decode-attention-backend {BACKEND}"
            )
    if server_args.speculative_draft_attention_backend == BACKEND:
        raise TwilightError(
            f"--speculative-draft-attention-backend {BACKEND}: Twilight has no backend for draft "
            "models; leave it out, and they use the prefill backend"
        )
    if server_args.decode_attention_backend != BACKEND:
        return
    _refuse_modes(server_args)  # before SGLang, which complains of backends it does not know
    config = TwilightConfig.from_environment()
    if server_args.page_size is None:
        server_args.page_size = config.page_size
    elif server_args.page_size != config.page_size:
        if config.page_size != TwilightConfig.page_size:
            raise TwilightError(
                f"--page-size {server_args.page_size} and --twilight-page-size "
                f"{config.page_size} differ; give one of them"
            )
        if server_args.page_size not in PAGE_SIZES:
            raise TwilightError(
                f"--page-size {server_args.page_size} is not one that Twilight can summarise; "
                f"use one of {', '.join(map(str, PAGE_SIZES))}"
            )
        config = replace(config, page_size=server_args.page_size)
    config.to_environment()


def _refuse_unsupported(server_args: Any) -> None:
    if not uses_twilight(server_args):
        return
    view = resolved(server_args)
    config = TwilightConfig.from_environment()
    if view.page_size != config.page_size:
        raise TwilightError(
            f"--page-size is {view.page_size} after SGLang's own adjustments, Twilight's "
            f"{config.page_size}: another flag forces it; {REMEDY}"
        )
    _refuse_modes(view)
    if getattr(view, "dcp_size", 1) > 1:
        raise TwilightError(
            f"--dcp-size {view.dcp_size} widens pages over ranks, which Twilight cannot follow; "
            f"{REMEDY}"
        )
    _, groups = parallel_layout(server_args)
    if view.device == "cpu" and groups > 1:
        raise TwilightError(
            "--enable-dp-attention: SGLang's attention on CPUs is not data-parallel; drop the flag "
            "(--dp-size alone starts replicas), or serve on GPUs"
        )
    if view.kv_cache_dtype not in KV_CACHE_DTYPES:
        raise TwilightError(
            f"--kv-cache-dtype {view.kv_cache_dtype}: Twilight reads {', '.join(KV_CACHE_DTYPES)}"
        )
    if view.speculative_algorithm:
        if view.speculative_attention_mode == "decode":
            raise TwilightError(
                "--speculative-attention-mode decode sends verification to Twilight, which "
                "decodes one token a request; use --speculative-attention-mode prefill"
            )
        logger.warning(
            "Twilight is idle under speculative decoding (--speculative-algorithm %s): drafting "
            "and verification attend densely, through %s",
            view.speculative_algorithm,
            attention_backend_names(server_args)[0],
        )
    from sglang.srt.environ import envs

    if envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get():
        raise TwilightError(
            "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING sizes the KV pool twice, which Twilight's "
            "summaries cannot follow; unset it"
        )
    if os.environ.get("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "0") not in ("0", "false", ""):
        raise TwilightError(
            "SGLANG_ENABLE_METADATA_GLUE_GRAPH plans steps without asking the backend; unset it"
        )
    model = model_config(server_args)
    refuse_model(model)
    if view.device == "cuda":
        _refuse_shape(model, view.kv_cache_dtype, view.tp_size // groups)


def _refuse_modes(view: Any) -> None:
    for name, reason in REFUSED_MODES.items():
        if getattr(view, name, None):
            raise TwilightError(f"{reason}, which Twilight cannot follow; {REMEDY}")


def refuse_model(model: Any) -> None:
    """Refuse a model that Twilight cannot decode, from its SGLang ModelConfig.

    Raises:
        TwilightError: with what the model has and what to use instead.
    """
    from sglang.srt.configs.model_config import AttentionArch

    remedy = "use another --decode-attention-backend for it"
    if model.attention_arch == AttentionArch.MLA:
        raise TwilightError(
            f"{model.model_path} uses multi-head latent attention (MLA), which has no keys per "
            f"head to summarise; {remedy}"
        )
    if model.is_encoder_decoder:
        raise TwilightError(f"{model.model_path} is an encoder-decoder model; {remedy}")


def _refuse_shape(model: Any, kv_cache_dtype: str, ranks: int) -> None:
    """Refuse a model whose heads, shared out to ranks, or types the GPU kernels do not cover."""
    import torch

    from twilight_sgl.attention.selectors.boxes import SLACK
    from twilight_sgl.attention.triton_pipeline import supports

    config = TwilightConfig.from_environment()
    if config.bounds == "float8" and torch.cuda.get_device_capability() < (8, 9):
        raise TwilightError(
            "--twilight-bounds float8 needs a GPU of compute capability 8.9; use keys or auto"
        )
    if config.selector not in SLACK:
        raise TwilightError(
            f"--twilight-selector {config.selector} has no GPU kernel; use one of "
            f"{', '.join(sorted(SLACK))}"
        )
    fp8 = kv_cache_dtype == "fp8_e4m3"
    heads_kv = model.get_num_kv_heads(ranks)
    ok, reason = supports(
        heads_q=max(model.num_attention_heads // ranks, heads_kv),
        heads_kv=heads_kv,
        dim=model.head_dim,
        dim_v=model.v_head_dim,
        page_size=config.page_size,
        q_dtype=model.dtype,
        cache_dtype=torch.float8_e4m3fn if fp8 else model.dtype,
        max_context=model.context_len,
        device=torch.device("cuda"),
    )
    if not ok:
        raise TwilightError(
            f"{model.model_path}: Twilight's GPU kernels: {reason}; "
            "use another --decode-attention-backend for it"
        )


PATCHES = [
    Patch(
        f"{SERVER_ARGS}.add_cli_args",
        "after",
        _add_flags,
        "--twilight-* flags appear in --help and in --config files",
        ("parser",),
    ),
    Patch(
        f"{SERVER_ARGS}.from_cli_args",
        "around",
        _read_flags,
        "SGLang drops flags it does not know",
        ("args",),
    ),
    Patch(
        f"{SERVER_ARGS}.{resolution_method()}",
        "before",
        _apply_defaults,
        "the KV pool's pages must be those that are summarised",
        ("self",),
    ),
    Patch(
        f"{SERVER_ARGS}.check_server_args",
        "before",
        _refuse_unsupported,
        "what cannot work is refused before weights load",
        ("self",),
    ),
]
