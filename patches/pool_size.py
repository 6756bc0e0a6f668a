"""Count page summaries in the bytes that SGLang reserves for each token of the KV pool."""

import math
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from twilight_sgl.config import TwilightConfig
from twilight_sgl.pages.pool import bounds_dtype, summary_bytes_per_token
from twilight_sgl.patches import Patch, PatchError
from twilight_sgl.patches.compat import uses_twilight

CONFIGURATORS = "sglang.srt.model_executor.pool_configurator"
HYBRID = f"{CONFIGURATORS}.HybridSWAPoolConfigurator"


@dataclass(frozen=True)
class AttributesPatch(Patch):
    """A hook on a method that also relies on attributes of the method's class.

    Attributes:
        attributes: names that the code of the class must use.
    """

    attributes: tuple[str, ...] = ()

    def check(self) -> None:
        """Check the contract against the SGLang that is installed.

        Raises:
            PatchError: the target is gone, or its parameters or an attribute changed.
        """
        super().check()
        owner = self.target.rpartition(".")[0]
        methods = [
            getattr(item, "__wrapped__", item) for item in vars(resolve_name(owner)).values()
        ]
        used = {n for m in methods if hasattr(m, "__code__") for n in m.__code__.co_names}
        missing = [name for name in self.attributes if name not in used]
        if missing:
            raise PatchError(f"{owner} has no {', '.join(missing)} in this SGLang")


def _summary_bytes(kvc: Any) -> int:
    """Bytes of summary for each token of the model that a KVCacheConfigurator serves."""
    if kvc.is_draft_worker or not uses_twilight(kvc.server_args):
        return 0
    from sglang.srt.runtime_context import get_parallel

    from twilight_sgl.attention.backend import selecting_layers

    config = TwilightConfig.from_environment()
    model = kvc.model_config
    per_layer = summary_bytes_per_token(
        model.get_num_kv_heads(get_parallel().attn_tp_size),
        model.head_dim,
        bounds_dtype(config.bounds, kvc.kv_cache_dtype).itemsize,
        config.page_size,
        config.keeps_int4_keys,
    )
    return math.ceil(len(selecting_layers(kvc.model, config)) * per_layer)


def _add_summaries(
    cell_size: int, pool_configurator: Any, kvc: Any, num_layers: int, *args: Any, **kwargs: Any
) -> int:
    return cell_size + _summary_bytes(kvc)


def _add_summaries_to_full_pool(
    result: None, pool_configurator: Any, kvc: Any, *args: Any, **kwargs: Any
) -> None:
    """Summaries follow the full-attention pool's tokens, not those of the sliding windows.

    Its bytes are counted once in the total, and again by layer, where the sliding-window pool
    has a fixed size; a draft model's layers are counted among them.
    """
    layers = pool_configurator._full_layers_num + pool_configurator._draft_full_layers_num
    if pool_configurator._full_layers_num:
        summary_bytes = _summary_bytes(kvc)
        pool_configurator._full_per_token += summary_bytes / layers
        pool_configurator._cell_size += summary_bytes


PATCHES = [
    Patch(
        f"{CONFIGURATORS}.DefaultPoolConfigurator._compute_cell_size",
        "after",
        _add_summaries,
        "summaries live beside the KV pool: without this --mem-fraction-static would not hold",
        ("self", "kvc", "num_layers"),
    ),
    AttributesPatch(
        f"{HYBRID}.__init__",
        "after",
        _add_summaries_to_full_pool,
        "the same for models with sliding windows, whose pools are sized elsewhere",
        ("self", "kvc"),
        ("_full_per_token", "_cell_size", "_full_layers_num", "_draft_full_layers_num"),
    ),
]
