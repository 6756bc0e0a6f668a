"""Who writes a step's new keys and values: the kernels, or SGLang where it has to convert them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from twilight_sgl.attention.backend import TritonAttnBackend
from twilight_sgl.attention.runtime import TwilightRuntime
from twilight_sgl.config import TwilightConfig

LAYER = SimpleNamespace(
    layer_id=3,
    tp_q_head_num=4,
    qk_head_dim=8,
    scaling=0.5,
    logit_cap=None,
    k_scale=None,
    v_scale=None,
    k_scale_float=None,
    v_scale_float=None,
)
BATCH = SimpleNamespace(out_cache_loc=torch.tensor([5, 6]))
FUSED = torch.zeros(2, 8, 8, dtype=torch.bfloat16)  # [B, HQ + 2 HK, D], as a projection leaves it


class Steps:
    """A backend that notes what it gives to the kernels, and what to SGLang's pool."""

    def __init__(self, cache_dtype: torch.dtype) -> None:
        self.tokens: list[Any] = []
        self.written: list[Any] = []
        self.backend = object.__new__(TritonAttnBackend)
        self.backend.token_to_kv_pool = SimpleNamespace(
            dtype=cache_dtype, set_kv_buffer=lambda *given: self.written.append(given)
        )
        self.backend.runtime = SimpleNamespace(serves=lambda layer: True, run_layer=self._run_layer)

    def _run_layer(self, layer_id: int, q: torch.Tensor, *, token: Any, **_: Any) -> torch.Tensor:
        self.tokens.append(token)
        return q

    def decode(self, k: torch.Tensor | None, v: torch.Tensor | None, **options: bool) -> None:
        q = torch.zeros(2, 32, dtype=torch.bfloat16)
        self.backend.forward_decode(q, k, v, LAYER, BATCH, **options)


def test_kernels_write_what_the_cache_holds_as_it_is() -> None:
    steps = Steps(torch.bfloat16)
    keys, values = FUSED[:, 4:6], FUSED[:, 6:]
    steps.decode(keys, values)
    assert len(steps.tokens) == 1
    assert steps.tokens[0][0] is keys and steps.tokens[0][1] is values
    assert not steps.written


@pytest.mark.parametrize(
    ("keys", "values", "cache_dtype"),
    [
        (FUSED[:, 4:6], FUSED[:, 6:], torch.float8_e4m3fn),
        (FUSED[:, 4:6].float(), FUSED[:, 6:], torch.bfloat16),
        (FUSED[:, 4:8:2], FUSED[:, 6:], torch.bfloat16),
        (FUSED[:, 4:6], FUSED[:, 6:].transpose(1, 2), torch.bfloat16),
    ],
    ids=["fp8-cache", "other-dtype", "heads-apart", "channels-apart"],
)
def test_sglang_writes_the_rest(
    keys: torch.Tensor, values: torch.Tensor, cache_dtype: torch.dtype
) -> None:
    steps = Steps(cache_dtype)
    steps.decode(keys, values)
    assert steps.tokens == [None]
    ((layer, where, *given),) = steps.written
    assert layer is LAYER and where.loc is BATCH.out_cache_loc
    assert given[0] is keys and given[1] is values


@pytest.mark.parametrize("keys", [None, FUSED[:, 4:6]], ids=["shared-layer", "fused-elsewhere"])
def test_nothing_is_written_twice(keys: torch.Tensor | None) -> None:
    steps = Steps(torch.bfloat16)
    steps.decode(keys, None if keys is None else FUSED[:, 6:], save_kv_cache=False)
    assert steps.tokens == [None]
    assert not steps.written


PS, PAGES = 16, 4
SHAPE = {"page_size": PS, "dtype": torch.bfloat16, "head_num": 2, "head_dim": 8, "device": "cpu"}


def plain_pool() -> MHATokenToKVPool:
    return MHATokenToKVPool(PAGES * PS, layer_num=2, enable_memory_saver=False, **SHAPE)


def pool_with_windows() -> SWAKVPool:
    layers = {"swa_attention_layer_ids": [0], "full_attention_layer_ids": [1]}
    return SWAKVPool(size=PAGES * PS, size_swa=2 * PS, **layers, **SHAPE)


@pytest.mark.parametrize("make", [plain_pool, pool_with_windows])
def test_sglang_writes_keys_and_values_where_and_as_the_kernels_do(make: Any) -> None:
    pool = make()
    cache = TwilightRuntime(TwilightConfig(), pool, [1], 3).cache_of(1)
    keys, values = (torch.randn(2, 2, 8).bfloat16() for _ in range(2))
    slots = torch.tensor([PS + 3, 3 * PS])
    expected = cache.keys.clone(), cache.values.clone()
    for held, new in zip(expected, (keys, values), strict=True):
        held[slots // PS, slots % PS] = new
    layer = SimpleNamespace(layer_id=1)
    pool.set_kv_buffer(layer, KVWriteLoc(slots, None), keys.clone(), values.clone(), 2.0, 3.0)
    assert torch.equal(cache.keys, expected[0])
    assert torch.equal(cache.values, expected[1])
