"""What the backend reads off a model runner."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention

from twilight_sgl.attention.backend import (
    TritonAttnBackend,
    TwilightAttnBackend,
    full_attention_layers,
    longest_context,
    selecting_layers,
)
from twilight_sgl.config import TwilightConfig


@pytest.mark.parametrize(
    ("columns", "context_len", "longest"), [(32772, 32768, 32768), (64, 96, 64)]
)
def test_spare_columns_of_the_table_are_no_context(
    columns: int, context_len: int, longest: int
) -> None:
    table = torch.zeros((2, columns), dtype=torch.int32)
    runner = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        model_config=SimpleNamespace(context_len=context_len),
    )
    assert longest_context(runner) == longest


@pytest.mark.parametrize("windows", [(-1, -1, -1), (-1, 128, -1)], ids=["full", "window"])
def test_layers_without_a_kernel_of_ours_are_the_stock_backends(
    windows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [
        RadixAttention(4, 8, 0.5, 2, layer_id, sliding_window_size=window)
        for layer_id, window in enumerate(windows)
    ]
    model = torch.nn.ModuleList(reversed(layers))
    full = full_attention_layers(model)
    assert list(full) == [layer for layer, window in enumerate(windows) if window < 0]
    assert list(selecting_layers(model, TwilightConfig(skip_layers=(0,)))) == list(full)[1:]
    monkeypatch.setattr(TwilightAttnBackend, "__init__", lambda *_: None)
    runner = SimpleNamespace(
        model=model, dtype=torch.bfloat16, token_to_kv_pool_allocator=SimpleNamespace()
    )
    pool = SimpleNamespace(has_layer=full.__contains__)
    runtime = SimpleNamespace(serves=full.__contains__, pool=pool)
    assert TritonAttnBackend(runner, runtime).has_stock_layers == (128 in windows)
