"""Models with sliding windows: summaries follow the pool and the allocator of full attention."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

from twilight_sgl.attention.backend import full_attention_allocator
from twilight_sgl.attention.runtime import TwilightRuntime
from twilight_sgl.config import TwilightConfig
from twilight_sgl.patches import page_release

PS = 16
FULL_PAGES, WINDOW_PAGES = 8, 5
FULL_LAYERS, WINDOW_LAYERS = [1, 3], [0, 2]


class Server:
    """SGLang's two pools and their allocator, with a runtime on the layers of full attention."""

    def __init__(self) -> None:
        self.kv_pool = SWAKVPool(
            size=FULL_PAGES * PS,
            size_swa=WINDOW_PAGES * PS,
            page_size=PS,
            dtype=torch.float32,
            head_num=2,
            head_dim=8,
            swa_attention_layer_ids=WINDOW_LAYERS,
            full_attention_layer_ids=FULL_LAYERS,
            device="cpu",
        )
        self.allocator = SWATokenToKVPoolAllocator(
            FULL_PAGES * PS, WINDOW_PAGES * PS, PS, torch.float32, "cpu", self.kv_pool, False
        )
        self.runtime = TwilightRuntime(TwilightConfig(bounds="keys"), self.kv_pool, FULL_LAYERS, 3)
        full_attention_allocator(self.allocator).twilight = self.runtime

    def allocate(self, pages: int) -> torch.Tensor:
        """Slots of full attention, each with a slot of the windows' pool."""
        slots = self.allocator.full_attn_allocator.alloc(pages * PS)
        window_slots = self.allocator.swa_attn_allocator.alloc(pages * PS)
        self.allocator.full_to_swa_index_mapping[slots] = window_slots
        return slots

    @property
    def sealed(self) -> list[int]:
        self.runtime.ledger.apply()
        return self.runtime.pool.sealed.nonzero().squeeze(1).tolist()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    for patch in page_release.PATCHES:
        name = patch.target.rpartition(".")[2]
        original = getattr(PagedTokenToKVPoolAllocator, name)
        wrapped = _wrap_fn(original, patch.hook, HookType(patch.when))
        monkeypatch.setattr(PagedTokenToKVPoolAllocator, name, wrapped)
    return Server()


def test_summaries_have_the_pages_of_full_attention(server: Server) -> None:
    pool = server.runtime.pool
    assert pool.num_pages == FULL_PAGES + 1
    assert pool.min_max.shape[:2] == (len(FULL_LAYERS), FULL_PAGES + 1)
    for layer in FULL_LAYERS:
        assert server.runtime.keys_of(layer).shape == (FULL_PAGES + 1, PS, 2, 8)
    with pytest.raises(KeyError):
        pool.of_layer(WINDOW_LAYERS[0])


def test_keys_written_without_slots_of_the_windows_are_sealed(server: Server) -> None:
    slots = server.allocate(2)
    keys = torch.randn(2 * PS, 2, 8, generator=torch.Generator().manual_seed(0))
    for layer in FULL_LAYERS:
        server.kv_pool.set_kv_buffer(
            SimpleNamespace(layer_id=layer), KVWriteLoc(slots, None), keys, keys, None, None
        )
    pages = (slots[::PS] // PS).tolist()
    server.runtime.pool.seal(torch.tensor(pages), server.runtime.keys_of)
    expected = torch.stack((keys.view(2, PS, 2, 8).amin(1), keys.view(2, PS, 2, 8).amax(1)), 2)
    for layer in FULL_LAYERS:
        assert torch.equal(server.runtime.pool.of_layer(layer)[0][pages], expected)


def test_only_pages_of_full_attention_lose_their_seal(server: Server) -> None:
    server.allocator.swa_attn_allocator.alloc(PS)  # so that page ids of the two pools differ
    slots = server.allocate(4)
    pages = (slots[::PS] // PS).tolist()
    server.runtime.pool.seal(torch.tensor(pages), server.runtime.keys_of)
    server.allocator.free_swa(slots[: 2 * PS])  # they left the window
    assert server.sealed == sorted(pages)
    server.allocator.free(slots[2 * PS :])
    assert server.sealed == sorted(pages[:2])
    server.allocator.clear()
    assert server.sealed == []


def test_models_of_one_pool_have_one_allocator() -> None:
    allocator = SimpleNamespace()
    assert full_attention_allocator(allocator) is allocator
