"""Count page summaries in the bytes that SGLang reserves for each token of the KV pool."""

import math
from typing import Any

import torch

from twilight_sgl.config import TwilightConfig
from twilight_sgl.pages.pool import summary_bytes_per_token
from twilight_sgl.patches import Patch
from twilight_sgl.patches.compat import uses_twilight


def _summary_bytes(configurator: Any, num_layers: int) -> int:
    """Bytes a token of `num_layers` layers, or 0 where no summaries are kept."""
    if configurator.is_draft_worker or not uses_twilight(configurator.server_args):
        return 0
    from sglang.srt.runtime_context import get_parallel

    config = TwilightConfig.from_environment()
    model = configurator.model_config
    selecting = max(num_layers - len(config.skip_layers), 0)
    per_layer = summary_bytes_per_token(
        model.get_num_kv_heads(get_parallel().attn_tp_size),
        model.head_dim,
        torch.empty((), dtype=configurator.kv_cache_dtype).element_size(),
        config.page_size,
    )
    return math.ceil(selecting * per_layer)


def _add_summaries(
    cell_size: int, pool_configurator: Any, kvc: Any, num_layers: int, *args: Any, **kwargs: Any
) -> int:
    return cell_size + _summary_bytes(kvc, num_layers)


PATCHES = [
    Patch(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        "after",
        _add_summaries,
        "summaries live beside the KV pool: without this --mem-fraction-static would not hold",
        ("self", "kvc", "num_layers"),
    )
]
