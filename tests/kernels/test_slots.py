"""Slots of a decode step: the kernel against its reference, and the hook against SGLang's own."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import schedule_batch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.mem_cache import allocation
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs

from twilight_sgl.kernels.slots.reference import next_slots
from twilight_sgl.kernels.slots.triton import _BLOCK, _STEPS, NextSlots
from twilight_sgl.patches import decode_slots, install
from twilight_sgl.patches.decode_slots import (
    PATCHES,
    STANDS_IN_FOR,
    _prepare,
    _take_slots,
    is_known,
)

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
    orig_seq_lens = (3 * seq_lens).int()
    generator = torch.Generator().manual_seed(6)
    request_slots = torch.randperm(rows, generator=generator).to(DEVICE, row_dtype) + 1
    free = torch.randperm(rows + 8, generator=generator).to(DEVICE, page_dtype)
    free_pages = (free + 10_000)[3:]  # an address that no vector load is aligned to
    before = table(rows)
    before[request_slots.long(), seq_lens.long()] = -1
    expected_table, found_table = before.clone(), before.clone()
    batch = request_slots, seq_lens, orig_seq_lens, free_pages
    expected = next_slots(expected_table, *batch, page_size=PS)
    taker = NextSlots(torch.device(DEVICE), page_size=PS)
    results = []
    for _ in range(2 * _STEPS + 1):  # compiled, as compiled, and with tensors allocated again
        found_table.copy_(before)
        results.append(taker(found_table, *batch))
        assert torch.equal(found_table, expected_table)
    for found in results:
        assert [t.dtype for t in found] == [torch.int64, row_dtype, torch.int32]
        assert all(map(torch.equal, found, expected))
    assert len({t.data_ptr() for found in results for t in found}) == 3 * len(results)
    assert (expected_table != before).sum() == rows
    opened = seq_lens % PS == 0
    assert torch.equal(expected[0][opened], free_pages[: int(opened.sum())].long() * PS)
    assert expected[1].tolist() == [length + 1 for length in lengths]
    assert expected[2].tolist() == [3 * length + 1 for length in lengths]


def test_a_batch_that_changes_gets_its_own_number_of_rows() -> None:
    taker = NextSlots(torch.device(DEVICE), page_size=PS)
    pages = torch.arange(20, 30, device=DEVICE)
    for rows in (2, 3, 3, 1, 2):
        lengths = torch.tensor([5, 7, 9][:rows], device=DEVICE)
        slots = torch.arange(rows, device=DEVICE)
        found = taker(table(rows), slots, lengths, lengths.int(), pages)
        expected = next_slots(table(rows), slots, lengths, lengths.int(), pages, page_size=PS)
        assert all(map(torch.equal, found, expected))


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
            orig_seq_lens=torch.tensor(lengths, device=DEVICE, dtype=torch.int32) + 2,
            seq_lens_sum=sum(lengths),
            model_config=SimpleNamespace(is_encoder_decoder=False),
            spec_algorithm=SimpleNamespace(is_none=lambda: True),
            sampling_info=SimpleNamespace(
                penalizer_orchestrator=SimpleNamespace(is_required=False)
            ),
            hisparse_coordinator=None,
            attn_cp_metadata="of a prefill",
            input_embeds="of a prefill",
            reqs=[
                SimpleNamespace(
                    kv=SimpleNamespace(kv_allocated_len=tokens),
                    kv_committed_len=tokens,
                    decode_batch_idx=0,
                )
                for tokens in lengths
            ],
            maybe_evict_swa=lambda: None,
            cumulate_penalty_output_tokens=lambda: self.penalized.append(1),
        )
        self.penalized: list[int] = []

    def grow(self) -> None:
        """As SGLang does after the allocation."""
        self.batch.seq_lens = self.batch.seq_lens + 1
        self.batch.seq_lens_cpu = self.batch.seq_lens_cpu + 1

    def state(self) -> dict[str, Any]:
        """All that preparing a step may change."""
        batch = {
            name: value.tolist() if isinstance(value, torch.Tensor) else value
            for name, value in vars(self.batch).items()
            if name not in ("tree_cache", "token_to_kv_pool_allocator", "req_to_token_pool")
            and not callable(value)
            and name not in ("model_config", "spec_algorithm", "sampling_info", "reqs")
        }
        reqs = [vars(req) | {"kv": vars(req.kv).copy()} for req in self.batch.reqs]
        pages = self.allocator.free_pages.tolist()
        table = self.table.req_to_token.tolist()
        return batch | {"reqs": reqs, "pages": pages, "table": table, "penalized": self.penalized}


@pytest.fixture(autouse=True)
def _one_token_a_page_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang asks its server arguments for the page size; here it is the tree's."""
    monkeypatch.setattr(allocation, "_alloc_page_size", lambda batch: batch.tree_cache.page_size)


@pytest.fixture(autouse=True)
def server_args(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """SGLang's server arguments, as far as a step's preparation asks for them."""
    args = SimpleNamespace(mamba_radix_cache_strategy="no_buffer", disable_radix_cache=False)
    args.enable_mamba_extra_buffer = lambda: ServerArgs.enable_mamba_extra_buffer(args)
    for module in (schedule_batch, decode_slots):
        monkeypatch.setattr(module, "get_server_args", lambda: args)
    return args


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


def prepared_by_sglang(batch: Any) -> None:
    ScheduleBatch.prepare_for_decode(batch)
    if batch.seq_lens_sum is None:  # which its forward batch makes up for
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())


@as_known
@pytest.mark.parametrize("penalized", [False, True], ids=["", "penalized"])
def test_many_prepared_steps_are_sglangs(penalized: bool) -> None:
    lengths = [1, PS, PS - 3, 2 * PS, 40, 3 * PS + 15]
    theirs, ours = Server(lengths, 35), Server(lengths, 35, twilight=runtime())
    for server in (theirs, ours):
        server.batch.sampling_info.penalizer_orchestrator.is_required = penalized
    sglangs = []

    def original(batch: Any) -> None:
        sglangs.append(batch)
        prepared_by_sglang(batch)

    for step in range(40):
        before = ours.batch.seq_lens, ours.batch.seq_lens_cpu, ours.batch.orig_seq_lens
        values = [tensor.tolist() for tensor in before]
        prepared_by_sglang(theirs.batch)
        _prepare(original, ours.batch)
        assert ours.state() == theirs.state()
        for name in ("out_cache_loc", "seq_lens", "seq_lens_cpu", "orig_seq_lens"):
            found, expected = getattr(ours.batch, name), getattr(theirs.batch, name)
            assert (found.dtype, found.device) == (expected.dtype, expected.device)
        assert [tensor.tolist() for tensor in before] == values  # a forward may still read them
        if step % 7 == 3:
            for server in (theirs, ours):
                server.allocator._release_page_ids(torch.tensor([70 + step], device=DEVICE))
    assert len(sglangs) < 10
    assert theirs.batch.reqs[0].kv_committed_len == 41
    assert len(ours.penalized) == 40 * penalized


@as_known
@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("allocator", "twilight", SimpleNamespace()),
        ("allocator", "free_pages", torch.zeros(1, dtype=torch.int64)),
        ("batch", "spec_algorithm", SimpleNamespace(is_none=lambda: False)),
        ("batch", "model_config", SimpleNamespace(is_encoder_decoder=True)),
        ("batch", "hisparse_coordinator", SimpleNamespace()),
        ("args", "mamba_radix_cache_strategy", "extra_buffer"),
    ],
)
def test_sglangs_own_prepares_the_rest(
    part: str, name: str, value: Any, server_args: SimpleNamespace
) -> None:
    server = Server([5, PS], 20, twilight=runtime())
    parts = {"allocator": server.allocator, "batch": server.batch, "args": server_args}
    setattr(parts[part], name, value)
    before = server.state()
    asked: list[Any] = []
    _prepare(asked.append, server.batch)
    assert asked == [server.batch]
    assert server.state() == before


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
    for owner in (allocation, schedule_batch):  # both names of the function are put back after
        monkeypatch.setattr(owner, "alloc_for_decode", owner.alloc_for_decode)
    prepare = ScheduleBatch.prepare_for_decode
    monkeypatch.setattr(ScheduleBatch, "prepare_for_decode", prepare)
    HookRegistry.reset()
    install(PATCHES)
    theirs, ours = Server([5, PS], 20), Server([5, PS], 20, twilight=runtime())
    monkeypatch.setattr(ours.allocator, "alloc_decode", None)
    expected = schedule_batch.alloc_for_decode(theirs.batch, token_per_req=1)
    assert torch.equal(schedule_batch.alloc_for_decode(ours.batch, token_per_req=1), expected)
    assert ours.state() == theirs.state()
    theirs, ours = Server([5, PS], 20), Server([5, PS], 20, twilight=runtime())
    monkeypatch.setattr(ours.allocator, "alloc_decode", None)
    prepare(theirs.batch)
    ScheduleBatch.prepare_for_decode(ours.batch)
    assert theirs.batch.seq_lens_sum is None  # its forward batch sums
    theirs.batch.seq_lens_sum = 23
    assert ours.state() == theirs.state()
    HookRegistry.reset()


@as_known
@pytest.mark.parametrize("path", STANDS_IN_FOR)
def test_a_changed_allocation_is_left_alone(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PATCHES
    names = STANDS_IN_FOR[path]
    for changed in (f"{names} a_new_field", names.split(" ", 1)[1]):  # lost one, gained one
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
