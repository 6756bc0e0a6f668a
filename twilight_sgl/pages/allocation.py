"""What pages make SGLang's allocator compile, compiled before requests come."""

from typing import Any

import torch


def compile_extend(allocator: Any, max_requests: int) -> None:
    """Have an allocator compile what gives prompts their slots, for batches of every size.

    SGLang's kernel for that is compiled for each power of two of requests when a batch first has
    so many, and all that wait stand still meanwhile: a quarter of a second each beside an H100.
    Pages of one token, which SGLang's own backends mostly have, do not take it.

    Args:
        allocator: an SGLang `PagedTokenToKVPoolAllocator`; none of its pages is taken.
        max_requests: most requests that a batch can have.
    """
    requests = 1
    while True:
        lengths = torch.zeros(requests, dtype=torch.int64)  # prompts of which all is there already
        here = lengths.to(allocator.device)
        allocator.alloc_extend(here, lengths, here, lengths, here - 1, 0)
        if requests >= max_requests:
            return
        requests *= 2
