"""What a decode step must read at least, and how long reading it takes."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twilight_sgl.benchmark.model_files import attention_shape, weight_bytes
from twilight_sgl.benchmark.prompts import Load, tokens_needed
from twilight_sgl.pages.pool import bounds_dtype

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Model:
    """A model of which every step reads all weights and every layer attends to all tokens.

    Attributes:
        weight_bytes: of what a step reads: not of a table that embeds its tokens alone.
        layers, heads_kv, dim: of attention.
        dtype: of its weights.
    """

    weight_bytes: int
    layers: int
    heads_kv: int
    dim: int
    dtype: torch.dtype

    @classmethod
    def read(cls, folder: Path, config: Any) -> "Model | None":
        """From a folder with safetensors and its transformers configuration.

        Returns:
            None where what a step reads does not follow from these: of experts, sliding windows
            and linear attention, and without weights.
        """
        text = config.get_text_config()
        weights = weight_bytes(folder)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        has_experts = any(getattr(text, name, None) for name in _EXPERTS)
        if not weights or has_experts or kinds != {"full_attention"}:
            return None
        dtype = text.dtype or torch.float32  # as transformers has it
        if not getattr(text, "tie_word_embeddings", True):
            weights -= text.vocab_size * text.hidden_size * dtype.itemsize
        return cls(weights, *attention_shape(config), dtype)


def step_bytes(model: Model, row: Mapping[str, Any]) -> float:
    """Bytes that a step of a row of the decode benchmark must read, on average over its steps.

    The weights, and of each layer the keys and values that it attends to; of one that selects also
    the bounds of all pages and what candidates are weighed by. A prefix that requests share counts
    once, as if they chose the same of it. What requests have added to their prompts, and what is
    written, is left out.
    """
    is_float8 = "fp8" in (row["kv_cache_dtype"] or "")
    key_dtype = torch.float8_e4m3fn if is_float8 else model.dtype
    attended = 2 * model.dim * key_dtype.itemsize  # a token of a KV head
    of_layers = float(model.layers * attended)
    config, spent, steps = row["twilight"], row["budget"], row["steps"]
    if config and steps and spent and spent["candidate_share"] is not None:
        weighed = model.dim / 2 + 4  # INT4 codes, scale and zero point
        if config["pruner"] == "none":
            weighed = 0.0
        elif config["estimator"] == "exact":
            weighed = model.dim * key_dtype.itemsize
        bounds = 2 * model.dim * bounds_dtype(config["bounds"], key_dtype).itemsize
        selecting = (
            bounds / config["page_size"]
            + spent["candidate_share"] * weighed
            + spent["kept_share"] * attended
        )
        skipped = len({layer for layer in config["skip_layers"] if layer < model.layers})
        sparse = skipped * attended + (model.layers - skipped) * selecting
        of_layers += (1 - steps["dense"] / steps["decode"]) * (sparse - of_layers)
    load = Load(row["load"], row["requests"], row["prompt_tokens"])
    tokens = tokens_needed(load, row["shared_prefix_tokens"])
    return model.weight_bytes + tokens * model.heads_kv * of_layers


def add_floors(
    rows: Iterable[dict[str, Any]], model: Model | None, bandwidth: float | None
) -> None:
    """Give rows `floor_bytes`, what a step must read, and `floor_ms`, its time at copy bandwidth.

    Both are None where that is not known: see `Model.read`, without a GPU, and of several.
    """
    for row in rows:
        moved = step_bytes(model, row) if model and row["gpus"] == 1 else None
        row["floor_bytes"] = moved
        row["floor_ms"] = moved / bandwidth * 1e3 if moved and bandwidth else None
        row["copy_bytes_per_s"] = bandwidth


def gpu_bandwidth() -> float | None:
    """Copy bandwidth of the GPU in bytes a second; None without one, or without memory left."""
    if not torch.cuda.is_available():
        return None
    from twilight_sgl.benchmark.timing import copy_bandwidth

    try:
        return copy_bandwidth()
    except torch.OutOfMemoryError:
        print("no floors: the GPU has no 4 GB left to time a copy in", file=sys.stderr)
        return None
    finally:
        torch.cuda.empty_cache()
