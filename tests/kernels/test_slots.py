"""Slots of a decode step: the kernel against its reference, and the hook against SGLang's own."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import schedule_batch
from sglang.srt.mem_cache import allocation
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.plugins.hook_registry import HookRegistry

from twilight_sgl.kernels.slots.reference import next_slots
from twilight_sgl.kernels.slots.triton import _BLOCK, NextSlots
from twilight_sgl.patches import decode_slots, install
from twilight_sgl.patches.decode_slots import PATCHES, STANDS_IN_FOR, _take_slots, is_known

PS = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = 8 * PS

LENGTHS = {
    "within a page": [5, 1, PS - 1, PS + 3],
    "all open a page": [PS, 2 * PS, 5 * PS],
    "both": [PS, 7, 3 * PS, 2 * PS - 1, 2 * PS, 2 * PS + 1],
    "one row": [4 * PS],
    "more than a block": [1 + 7 * row % (5 * PS) for row in range(2 * _BLOCK + 5)],
}


def table(rows: int) -> torch.Tensor:
    """Request slots with pages of their own, and one slot that no row has."""
    generator = torch.Generator().manual_seed(5)
    pages = torch.randperm((rows + 1) * COLUMNS // PS, generator=generator) + 1
    slots = pages.unsqueeze(-1) * PS + torch.arange(PS)
    return slots.reshape(rows + 1, COLUMNS).int().to(DEVICE)


@pytest.mark.parametrize("row_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("page_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_kernel_is_the_reference(
    lengths: list[int], page_dtype: torch.dtype, row_dtype: torch.dtype
) -> None:
    rows = len(lengths)
    seq_lens = torch.tensor(lengths, device=DEVICE, dtype=row_dtype)
    generator = torch.Generator().manual_seed(6)
    request_slots = torch.randperm(rows, generator=generator).to(DEVICE, row_dtype) + 1
    free = torch.randperm(rows + 8, generator=generator).to(DEVICE, page_dtype)
    free_pages = (free + 10_000)[3:]  # an address that no vector load is aligned to
    before = table(rows)
    before[request_slots.long(), seq_lens.long()] = -1
    expected_table, found_table = before.clone(), before.clone()
    expected = next_slots(expected_table, request_slots, seq_lens, free_pages, page_size=PS)
    taker = NextSlots(torch.device(DEVICE), page_size=PS)
    for _ in range(2):  # compiled, and as compiled
        found_table.copy_(before)
        found = taker(found_table, request_slots, seq_lens, free_pages)
        assert found.dtype == torch.int64
        assert torch.equal(found, expected)
        assert torch.equal(found_table, expected_table)
    assert (expected_table != before).sum() == rows
    opened = seq_lens % PS == 0
    assert torch.equal(expected[opened], free_pages[: int(opened.sum())].long() * PS)


as_known = pytest.mark.skipif(not is_known(), reason="this SGLang allocates in another way")


class Server:
    """The parts of SGLang that allocate a decode step's slots, with requests under way."""

    def __init__(
        self,
        lengths: list[int],
        num_pages: int,
        *,
        twilight: Any = None,
        need_sort: bool = False,
    ) -> None:
        self.evictions: list[int] = []
        self.allocator = PagedTokenToKVPoolAllocator(
            num_pages * PS, PS, torch.float32, DEVICE, SimpleNamespace(), need_sort
        )
        if twilight is not None:
            self.allocator.twilight = twilight
        self.table = ReqToTokenPool(len(lengths) + 2, COLUMNS, DEVICE, enable_memory_saver=False)
        tree_cache = SimpleNamespace(
            page_size=PS,
            token_to_kv_pool_allocator=self.allocator,
            is_chunk_cache=lambda: False,
            evict=lambda params: self.evictions.append(params.num_tokens),
            available_and_evictable_str=lambda: "none is left",
            pretty_print=lambda: None,
        )
        for row, tokens in enumerate(lengths):
            slots = self.allocator.alloc(-(-tokens // PS) * PS)
            assert slots is not None
            self.table.req_to_token[row + 1, :tokens] = slots[:tokens]
        self.batch = SimpleNamespace(
            tree_cache=tree_cache,
            token_to_kv_pool_allocator=self.allocator,
            req_to_token_pool=self.table,
            req_pool_indices=torch.arange(len(lengths), device=DEVICE) + 1,
            seq_lens=torch.tensor(lengths, device=DEVICE),
            seq_lens_cpu=torch.tensor(lengths),
            model_config=SimpleNamespace(is_encoder_decoder=False),
            reqs=[
                SimpleNamespace(kv=SimpleNamespace(kv_allocated_len=tokens)) for tokens in lengths
            ],
            maybe_evict_swa=lambda: None,
        )

    def grow(self) -> None:
        """As SGLang does after the allocation."""
        self.batch.seq_lens = self.batch.seq_lens + 1
        self.batch.seq_lens_cpu = self.batch.seq_lens_cpu + 1

    def state(self) -> tuple[list, list, list]:
        allocated = [req.kv.kv_allocated_len for req in self.batch.reqs]
        return self.table.req_to_token.tolist(), self.allocator.free_pages.tolist(), allocated


@pytest.fixture(autouse=True)
def _one_token_a_page_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang asks its server arguments for the page size; here it is the tree's."""
    monkeypatch.setattr(allocation, "_alloc_page_size", lambda batch: batch.tree_cache.page_size)


def runtime() -> Any:
    return SimpleNamespace(next_slots=NextSlots(torch.device(DEVICE), page_size=PS))


@as_known
@pytest.mark.parametrize("need_sort", [False, True], ids=["", "sorted"])
def test_many_steps_are_sglangs(need_sort: bool) -> None:
    lengths = [1, PS, PS - 3, 2 * PS, 40, 3 * PS + 15]
    theirs = Server(lengths, 35, need_sort=need_sort)
    ours = Server(lengths, 35, twilight=runtime(), need_sort=need_sort)
    sglangs = []

    def original(batch: Any, token_per_req: int) -> torch.Tensor:
        sglangs.append(batch)
        return allocation.alloc_for_decode(batch, token_per_req)

    for step in range(40):
        expected = allocation.alloc_for_decode(theirs.batch, token_per_req=1)
        found = _take_slots(original, ours.batch, token_per_req=1)
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
        assert ours.state() == theirs.state()
        for server in (theirs, ours):
            server.grow()
            if step % 7 == 3:  # pages come back while others decode
                server.allocator._release_page_ids(torch.tensor([70 + step], device=DEVICE))
    assert ours.evictions == theirs.evictions == []
    assert len(sglangs) < 10
    assert theirs.batch.reqs[0].kv.kv_allocated_len == 41


@as_known
def test_sglangs_own_evicts_when_pages_run_low() -> None:
    lengths = [PS - 1, 3, 5]
    theirs, ours = Server(lengths, 5), Server(lengths, 5, twilight=runtime())
    assert len(ours.allocator.free_pages) == 2  # fewer than rows
    calls = []

    def original(batch: Any, token_per_req: int) -> torch.Tensor:
        calls.append(batch)
        return allocation.alloc_for_decode(batch, token_per_req)

    expected = allocation.alloc_for_decode(theirs.batch, token_per_req=1)
    assert torch.equal(_take_slots(original, ours.batch, token_per_req=1), expected)
    assert calls == [ours.batch]
    assert ours.state() == theirs.state()
    assert ours.evictions == theirs.evictions == [PS]


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("allocator", "twilight", SimpleNamespace()),  # of a CPU
        ("allocator", "debug_mode", True),
        ("batch", "reqs", []),
    ],
)
def test_sglangs_own_serves_the_rest(part: str, name: str, value: Any) -> None:
    server = Server([5, PS], 20, twilight=runtime())
    parts = {"allocator": server.allocator, "batch": server.batch}
    before = server.state()
    setattr(parts[part], name, value)
    asked = []
    result = _take_slots(lambda batch, token_per_req: asked.append(token_per_req), server.batch, 1)
    assert result is None
    assert asked == [1]
    if name != "reqs":
        assert server.state() == before


def test_more_than_a_token_is_sglangs() -> None:
    server = Server([5, PS], 20, twilight=runtime())
    assert _take_slots(lambda batch, token_per_req: token_per_req, server.batch, 4) == 4


@as_known
def test_the_hook_reaches_where_a_batch_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (allocation, schedule_batch):  # both names of the function are put back after
        monkeypatch.setattr(module, "alloc_for_decode", module.alloc_for_decode)
    HookRegistry.reset()
    install(PATCHES)
    theirs, ours = Server([5, PS], 20), Server([5, PS], 20, twilight=runtime())
    monkeypatch.setattr(ours.allocator, "alloc_decode", None)
    expected = schedule_batch.alloc_for_decode(theirs.batch, token_per_req=1)
    assert torch.equal(schedule_batch.alloc_for_decode(ours.batch, token_per_req=1), expected)
    assert ours.state() == theirs.state()
    HookRegistry.reset()


@as_known
@pytest.mark.parametrize("path", STANDS_IN_FOR)
def test_a_changed_allocation_is_left_alone(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PATCHES
    names = STANDS_IN_FOR[path]
    for changed in (f"{names} kv_committed_len", names.split(" ", 1)[1]):  # lost one, gained one
        monkeypatch.setitem(STANDS_IN_FOR, path, changed)
        assert not is_known()


@pytest.mark.parametrize("patches", [[], [SimpleNamespace()]], ids=["left alone", "hooked"])
def test_the_log_says_when_slots_stay_sglangs(
    patches: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decode_slots, "PATCHES", patches)
    with caplog.at_level(logging.INFO, decode_slots.__name__):
        decode_slots.log_if_left_alone()
    assert ("they stay its own" in caplog.text) == (not patches)


@as_known
def test_a_callable_object_in_place_of_a_function_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(allocation, "alloc_for_decode", SimpleNamespace())
    assert not is_known()
