"""Allocation is compiled for batches of every size, and takes no page for it."""

from types import SimpleNamespace

import pytest
import torch

from twilight_sgl.pages.allocation import compile_extend
from twilight_sgl.platforms.paged_allocator import TorchPagedAllocator


@pytest.mark.parametrize(
    "most,sizes", [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 8]), (8, [1, 2, 4, 8])]
)
def test_every_power_of_two_is_compiled(
    most: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator = TorchPagedAllocator(160, 16, torch.float32, "cpu", SimpleNamespace(), False)
    seen, slots = [], []
    original = allocator.alloc_extend

    def extend(prefix: torch.Tensor, *args: object) -> torch.Tensor | None:
        seen.append(len(prefix))
        slots.append(original(prefix, *args))
        return slots[-1]

    monkeypatch.setattr(allocator, "alloc_extend", extend)
    free = allocator.free_pages.tolist()
    compile_extend(allocator, most)
    assert seen == sizes
    assert [given.tolist() for given in slots] == [[] for _ in sizes]
    assert allocator.free_pages.tolist() == free
