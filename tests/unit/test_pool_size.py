"""The bytes of summaries that SGLang's own configurators reserve for each token."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.layers.cp import utils as cp_utils
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor import pool_configurator
from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

from twilight_sgl.config import TwilightConfig
from twilight_sgl.pages.pool import SummaryPool, bounds_dtype
from twilight_sgl.patches import PatchError, pool_size

PS = 16
HEADS_KV, DIM = 2, 64
WINDOW = 64
KV_BYTES = HEADS_KV * 2 * DIM * 2  # one layer, bfloat16
AVAILABLE_BYTES = 300_000_000

SETTINGS = {
    "default": {},
    "bounds like the keys": {"bounds": "keys"},
    "float8": {"bounds": "float8"},
    "centred": {"estimator": "int4_centred", "bounds": "keys"},
    "exact": {"estimator": "exact", "bounds": "keys"},
    "exact float8": {"estimator": "exact", "bounds": "float8"},
    "none skipped": {"skip_layers": ()},
    "layers of other models skipped": {"skip_layers": (0, 1, 90, 91)},
}


class Model(torch.nn.Module):
    """Attention layers by id; those of `sliding` have a window."""

    def __init__(self, layers: int, sliding: Iterable[int]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            RadixAttention(
                4,
                DIM,
                scaling=1.0,
                num_kv_heads=HEADS_KV,
                layer_id=layer,
                sliding_window_size=WINDOW if layer in sliding else -1,
            )
            for layer in range(layers)
        )


def configurator(
    layers: int,
    sliding: Iterable[int] = (),
    *,
    draft_layers: int = 0,
    is_draft_worker: bool = False,
) -> SimpleNamespace:
    """What SGLang's pool configurators read of a KVCacheConfigurator, in both releases."""
    full = [layer for layer in range(layers) if layer not in set(sliding)]
    model_config = SimpleNamespace(
        get_num_kv_heads=lambda tp_size, *dcp_size: HEADS_KV // tp_size,
        get_swa_num_kv_heads=lambda tp_size: HEADS_KV // tp_size,
        head_dim=DIM,
        v_head_dim=DIM,
        swa_head_dim=DIM,
        swa_v_head_dim=DIM,
        full_attention_layer_ids=full,
        swa_attention_layer_ids=sorted(sliding),
        attention_arch=None,
        hf_config=SimpleNamespace(architectures=["Model"]),
        hf_text_config=SimpleNamespace(),
        context_len=4096,
    )
    server_args = SimpleNamespace(
        decode_attention_backend="twilight",
        swa_full_tokens_ratio=0.5,
        max_total_tokens=None,
        max_running_requests=8,
        disable_radix_cache=True,
        disable_overlap_schedule=False,
        chunked_prefill_size=512,
        speculative_num_draft_tokens=None,
        speculative_algorithm=None,
        disaggregation_mode="null",
        dcp_size=1,
        enable_dsa_cache_layer_split=False,
        enable_hisparse=False,
        enable_unified_memory=False,
        _swa_full_tokens_ratio_explicitly_set=False,
    )
    return SimpleNamespace(
        kv_cache_dtype_str="auto",
        kv_cache_dtype=torch.bfloat16,
        model_dtype=torch.bfloat16,
        model=Model(layers, set(sliding)),
        model_config=model_config,
        server_args=server_args,
        sliding_window_size=WINDOW,
        page_size=PS,
        is_draft_worker=is_draft_worker,
        use_mla_backend=False,
        spec_algorithm=SimpleNamespace(
            is_eagle=lambda: draft_layers > 0,
            is_standalone=lambda: False,
            is_dflash_family=lambda: False,
        ),
        spec_aux_config=SimpleNamespace(
            eagle_draft_num_layers=draft_layers, eagle_draft_swa_num_layers=None
        ),
        layer_info=SimpleNamespace(
            start_layer=0,
            end_layer=layers,
            num_effective_layers=layers,
            full_attention_layer_ids=full,
            swa_attention_layer_ids=sorted(sliding),
        ),
        ps=SimpleNamespace(pp_size=1, attn_dp_size=1),
        attn_dp_size=1,
        pp_size=1,
        fused_entry_bytes=lambda name: None,
    )


@pytest.fixture(autouse=True)
def _hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's configurators with our hooks, and the server state they ask for."""
    for patch in pool_size.PATCHES:
        owner, name = patch.target.rsplit(".", 2)[1:]
        cls = getattr(pool_configurator, owner)
        wrapped = _wrap_fn(getattr(cls, name), patch.hook, HookType(patch.when))
        monkeypatch.setattr(cls, name, wrapped)
    monkeypatch.setattr(
        pool_size, "uses_twilight", lambda args: args.decode_attention_backend == "twilight"
    )
    parallel = SimpleNamespace(attn_tp_size=1, attn_dcp_size=1, enable_dsa_cache_layer_split=False)
    for module in (runtime_context, pool_configurator, cp_utils):
        monkeypatch.setattr(module, "get_parallel", lambda: parallel)
    monkeypatch.setattr(pool_configurator, "mambaish_config", lambda model_config: None)
    if hasattr(pool_configurator, "get_schedule"):  # 0.5.23 keeps its arguments in parts
        server_args = configurator(1).server_args
        for name in ("get_schedule", "get_memory", "get_spec", "get_disagg"):
            monkeypatch.setattr(pool_configurator, name, lambda: server_args)
        monkeypatch.setattr(
            pool_configurator, "compute_page_shard_scratch_bytes", lambda kvc, include_mtp: 0
        )


def summary_bytes(layer_ids: list[int], tokens: int, settings: dict[str, Any]) -> int:
    """What a summary pool for `tokens` takes, without its seals and the padding page."""
    config = TwilightConfig(**settings)
    pages = tokens // PS
    pool = SummaryPool(
        layer_ids=[layer for layer in layer_ids if layer not in config.skip_layers],
        num_pages=pages,
        page_size=PS,
        heads_kv=HEADS_KV,
        dim=DIM,
        dtype=bounds_dtype(config.bounds, torch.bfloat16),
        device="meta",
        has_codes=config.keeps_int4_keys,
    )
    return pool.nbytes - pool.sealed.nbytes


def check_fills(bytes_for: Callable[[int], float], tokens: int) -> None:
    """`tokens` fit into the memory and a thousandth more do not."""
    assert bytes_for(tokens) <= AVAILABLE_BYTES < bytes_for((tokens + tokens // 1000) // PS * PS)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("sliding", [(), (0, 2, 4)], ids=["all full", "windows in one pool"])
def test_models_with_one_pool(settings: dict[str, Any], sliding: tuple[int, ...]) -> None:
    """Gemma-2 and Gemma-3 keep the keys of their windows in the same pool as all others."""
    TwilightConfig(**settings).to_environment()
    kvc = configurator(6, sliding)
    sizes = pool_configurator.DefaultPoolConfigurator(kvc).calculate_pool_sizes(AVAILABLE_BYTES, PS)
    full = [layer for layer in range(6) if layer not in sliding]
    check_fills(
        lambda tokens: tokens * 6 * KV_BYTES + summary_bytes(full, tokens, settings),
        sizes.max_total_num_tokens,
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("draft_layers", [0, 1], ids=["", "with a draft model"])
def test_models_with_a_pool_for_windows(settings: dict[str, Any], draft_layers: int) -> None:
    TwilightConfig(**settings).to_environment()
    sliding = (0, 1, 3, 4)
    kvc = configurator(6, sliding, draft_layers=draft_layers)
    made = pool_configurator.HybridSWAPoolConfigurator(kvc)
    sizes = made.calculate_pool_sizes(AVAILABLE_BYTES, PS)
    assert sizes.max_total_num_tokens == sizes.full_max_total_num_tokens

    def bytes_for(tokens: int) -> float:
        window_tokens = tokens // 2 // PS * PS
        kv = (2 + draft_layers) * KV_BYTES * tokens + 4 * KV_BYTES * window_tokens
        return kv + summary_bytes([2, 5], tokens, settings)

    check_fills(bytes_for, sizes.full_max_total_num_tokens)


def capped_configurator() -> type:
    """The configurator that gives the windows' pool a fixed size, by its name in each release."""
    for name in ("SWARequestCapPoolConfigurator", "SWAChunkCapPoolConfigurator"):
        if hasattr(pool_configurator, name):
            return getattr(pool_configurator, name)
    raise AssertionError("this SGLang has no configurator with a cap")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("draft_layers", [0, 1], ids=["", "with a draft model"])
def test_models_with_a_capped_pool_for_windows(settings: dict[str, Any], draft_layers: int) -> None:
    TwilightConfig(**settings).to_environment()
    kvc = configurator(6, (0, 1, 3, 4), draft_layers=draft_layers)
    made = capped_configurator()(kvc)
    sizes = made.calculate_pool_sizes(AVAILABLE_BYTES, PS)
    window_bytes = sizes.swa_max_total_num_tokens * 4 * KV_BYTES

    def bytes_for(tokens: int) -> float:
        kv = (2 + draft_layers) * KV_BYTES * tokens
        return window_bytes + kv + summary_bytes([2, 5], tokens, settings)

    check_fills(bytes_for, sizes.full_max_total_num_tokens)


@pytest.mark.parametrize("name", ["DefaultPoolConfigurator", "HybridSWAPoolConfigurator"])
@pytest.mark.parametrize("why", ["another backend", "draft model"])
def test_nothing_is_added_where_nothing_is_summarised(name: str, why: str) -> None:
    kvc = configurator(6, (0, 1, 3, 4), is_draft_worker=why == "draft model")
    if why == "another backend":
        kvc.server_args.decode_attention_backend = "fa3"
    made = getattr(pool_configurator, name)(kvc)
    sizes = made.calculate_pool_sizes(AVAILABLE_BYTES, PS)
    kv_bytes = (6 if name.startswith("Default") else 4) * KV_BYTES  # windows hold half as many
    assert sizes.max_total_num_tokens == AVAILABLE_BYTES // kv_bytes // PS * PS


def test_models_of_windows_alone_are_left_alone() -> None:
    kvc = configurator(3, (0, 1, 2))
    made = pool_configurator.HybridSWAPoolConfigurator(kvc)
    sizes = made.calculate_pool_sizes(AVAILABLE_BYTES, PS)
    assert sizes.swa_max_total_num_tokens == AVAILABLE_BYTES // (3 * KV_BYTES) // PS * PS


def test_an_attribute_that_is_gone_is_named() -> None:
    patch = next(p for p in pool_size.PATCHES if isinstance(p, pool_size.AttributesPatch))
    patch.check()
    changed = replace(patch, attributes=(*patch.attributes, "_renamed"))
    with pytest.raises(PatchError, match="HybridSWAPoolConfigurator has no _renamed"):
        changed.check()
