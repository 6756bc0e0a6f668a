"""Allocation of prompts is compiled for batches of every size, as SGLang will launch it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.allocator import paged

from twilight_sgl.kernels import launch
from twilight_sgl.pages import allocation

PS = 16


class Kernel:
    """Notes what it is compiled and launched for: the grid, the tensors' dtypes, the constants."""

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.launched: list[Any] = []

    def warmup(self, *args: Any, grid: tuple[int]) -> None:
        self.compiled.append(self._kind(grid, args))

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *args: self.launched.append(self._kind(grid, args))

    def _kind(self, grid: tuple[int], args: tuple[Any, ...]) -> Any:
        is_tensor = [isinstance(each, torch.Tensor) for each in args]
        dtypes = [each.dtype for each, known in zip(args, is_tensor, strict=True) if known]
        return dtypes, [each for each, known in zip(args, is_tensor, strict=True) if not known]


@pytest.mark.parametrize(
    "most,sizes", [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 8]), (8, [1, 2, 4, 8])]
)
def test_every_power_of_two_is_compiled(
    most: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    monkeypatch.setattr(allocation, "alloc_extend_kernel", kernel)
    with launch.compiling_ahead():
        allocation.compile_extend(torch.arange(9), PS, most)
    assert kernel.compiled == [([torch.int64] * 5, [size, PS]) for size in sizes]
    assert kernel.launched == []


def test_it_is_what_sglang_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    assert paged.alloc_extend_kernel is allocation.alloc_extend_kernel
    kernel = Kernel()
    monkeypatch.setattr(allocation, "alloc_extend_kernel", kernel)
    monkeypatch.setattr(paged, "alloc_extend_kernel", kernel)
    allocator = paged.PagedTokenToKVPoolAllocator(
        40 * PS, PS, torch.bfloat16, "cpu", SimpleNamespace(), False
    )
    with launch.compiling_ahead():
        allocation.compile_extend(allocator.free_pages, PS, 8)
    for requests in range(1, 9):
        prefix = torch.zeros(requests, dtype=torch.int64)
        lengths = prefix + PS + 1
        allocator.alloc_extend(prefix, prefix, lengths, lengths, prefix - 1, int(lengths.sum()))
        allocator.clear()
    assert len(kernel.launched) == 8
    assert all(each in kernel.compiled for each in kernel.launched)
