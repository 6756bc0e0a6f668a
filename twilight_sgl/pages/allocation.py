"""What pages make SGLang's allocator compile, compiled before requests come."""

import torch
from sglang.kernels.ops.memory.allocator import alloc_extend_kernel

from twilight_sgl.kernels.launch import launch


def compile_extend(free_pages: torch.Tensor, page_size: int, max_requests: int) -> None:
    """Compile what gives prompts their slots, for batches of every size; in `compiling_ahead`.

    SGLang's kernel for that is compiled for each power of two of requests when a batch first has
    so many, and all that wait stand still meanwhile: a quarter of a second each beside an H100.
    Pages of one token, which SGLang's own backends mostly have, do not take it.

    Args:
        free_pages: [F] int64, an SGLang `PagedTokenToKVPoolAllocator`'s.
        page_size: tokens.
        max_requests: most requests that a batch can have.
    """
    requests = 1
    while True:
        each = free_pages.new_empty(requests)  # prefix and sequence lengths, last slots, new slots
        tensors = each, each, each, free_pages, each
        launch(alloc_extend_kernel, requests)(*tensors, requests, page_size)
        if requests >= max_requests:
            return
        requests *= 2
