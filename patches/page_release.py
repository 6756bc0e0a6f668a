"""Learn when the allocator takes pages back: their seals end with their contents."""

from typing import Any

import torch

from twilight_sgl.patches import Patch

ALLOCATOR = "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator"


def _pages_released(allocator: Any, *page_ids: torch.Tensor) -> None:
    runtime = getattr(allocator, "twilight", None)
    if runtime is not None:
        for pages in page_ids:
            runtime.ledger.pages_released(pages)


def _all_released(allocator: Any, *args: Any, **kwargs: Any) -> None:
    runtime = getattr(allocator, "twilight", None)
    if runtime is not None:
        runtime.ledger.all_pages_released()


PATCHES = [
    Patch(
        f"{ALLOCATOR}._release_page_ids",
        "before",
        _pages_released,
        "a page given to another request must not keep its old summary",
        ("self", "page_ids"),
    ),
    Patch(
        f"{ALLOCATOR}.clear",
        "before",
        _all_released,
        "a flushed cache gives all pages back at once",
        ("self",),
    ),
]
