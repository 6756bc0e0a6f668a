"""The torch allocator gives the slots that SGLang's own would, and loses no page."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive

from twilight_sgl.platforms.paged_allocator import TorchPagedAllocator

PS = 16
NUM_PAGES = 40

checked = settings(max_examples=100, deadline=None, derandomize=True, database=None)
sizes = st.integers(0, 5 * PS) | st.sampled_from([PS - 1, PS, PS + 1])
requests = st.lists(st.tuples(sizes, sizes), min_size=1, max_size=6)


def make(order: list[int] | None = None, *, need_sort: bool = False) -> TorchPagedAllocator:
    """An allocator whose free pages are those of `order`, in that order."""
    allocator = TorchPagedAllocator(
        NUM_PAGES * PS, PS, torch.float32, "cpu", SimpleNamespace(), need_sort
    )
    if order is not None:
        allocator.free_pages = torch.tensor(order)
    return allocator


def last_slots(prefix: torch.Tensor) -> torch.Tensor:
    """A last slot for each prefix, each in a page of its own beyond the pool; -1 for none."""
    page = torch.arange(len(prefix)) + NUM_PAGES + 1
    return torch.where(prefix > 0, page * PS + (prefix - 1) % PS, -1)


def pages_of(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens + PS - 1) // PS


def extend(
    allocator: TorchPagedAllocator, prefix: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor | None:
    total = int((lengths - prefix).sum())
    return allocator.alloc_extend(prefix, prefix, lengths, lengths, last_slots(prefix), total)


@checked
@given(requests, st.permutations(range(1, NUM_PAGES + 1)))
def test_extend_is_sglangs(rows: list[tuple[int, int]], order: list[int]) -> None:
    prefix, added = torch.tensor(rows).unbind(1)
    lengths = prefix + added
    taken = int((pages_of(lengths) - pages_of(prefix)).sum())
    allocator = make(order)
    slots = extend(allocator, prefix, lengths)
    if taken > NUM_PAGES:
        assert slots is None
        assert allocator.free_pages.tolist() == order
        return
    expected = torch.empty(int(added.sum()), dtype=torch.int64)
    free = torch.tensor(order)
    alloc_extend_naive(prefix, lengths, last_slots(prefix), free, expected, PS, "cpu")
    assert slots is not None
    assert slots.dtype == torch.int64
    assert slots.tolist() == expected.tolist()
    assert allocator.free_pages.tolist() == order[taken:]


@checked
@given(st.lists(st.integers(1, 5 * PS), min_size=1, max_size=8), st.integers(0, NUM_PAGES))
def test_decode_is_an_extend_by_one(prefixes: list[int], free_pages: int) -> None:
    prefix = torch.tensor(prefixes)
    lengths = prefix + 1
    order = list(range(NUM_PAGES, NUM_PAGES - free_pages, -1))
    taken = sum(length % PS == 0 for length in prefixes)
    allocator = make(order)
    slots = allocator.alloc_decode(lengths, lengths, last_slots(prefix))
    if taken > free_pages:
        assert slots is None
        assert allocator.free_pages.tolist() == order
        return
    expected = torch.empty(len(prefixes), dtype=torch.int64)
    free = torch.tensor([*order, 0])  # SGLang's index must not be out of range
    alloc_extend_naive(prefix, lengths, last_slots(prefix), free, expected, PS, "cpu")
    assert slots is not None
    assert slots.dtype == torch.int64
    assert slots.tolist() == expected.tolist()
    assert allocator.free_pages.tolist() == order[taken:]


@pytest.mark.parametrize("need_sort", [False, True], ids=["unsorted", "sorted"])
def test_pages_are_neither_lost_nor_given_twice(need_sort: bool) -> None:
    allocator = make(need_sort=need_sort)
    full = NUM_PAGES * PS
    zero, ten = torch.tensor([0]), torch.tensor([10 * PS])
    held = []
    while (slots := extend(allocator, zero, ten)) is not None:
        held.append(slots)
    assert allocator.available_size() == 0
    assert len(torch.unique(torch.cat(held))) == full
    assert torch.cat(held).min() >= PS, "page 0 is padding"
    one = torch.tensor([PS])
    assert allocator.alloc_decode(one + 1, one + 1, one * 7 - 1) is None
    allocator.free(held[2])
    allocator.free(held[0])
    assert allocator.available_size() == 20 * PS
    again = extend(allocator, zero, 2 * ten)
    assert again is not None
    assert set(again.tolist()) == {*held[0].tolist(), *held[2].tolist()}
    for slots in (again, held[1], held[3]):
        allocator.free(slots)
    assert allocator.available_size() == full


def test_what_does_not_fit_leaves_released_pages_usable() -> None:
    allocator = make([3], need_sort=True)
    allocator.free(torch.arange(7 * PS, 8 * PS))
    assert extend(allocator, torch.tensor([0]), torch.tensor([3 * PS])) is None
    assert allocator.available_size() == 2 * PS
    slots = extend(allocator, torch.tensor([0]), torch.tensor([2 * PS]))
    assert slots is not None
    assert slots[::PS].tolist() == [3 * PS, 7 * PS]


def test_a_batch_that_stays_in_its_pages_needs_no_free_page() -> None:
    allocator = make([])
    prefix, lengths = torch.tensor([3, 17]), torch.tensor([PS, 20])
    slots = extend(allocator, prefix, lengths)
    first, second = last_slots(prefix).tolist()
    assert slots is not None
    assert slots.tolist() == [*range(first + 1, first + 14), *range(second + 1, second + 4)]
    assert allocator.alloc_decode(prefix + 1, prefix + 1, last_slots(prefix)).tolist() == [
        first + 1,
        second + 1,
    ]
