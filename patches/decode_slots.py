"""Take a decode step's KV slots in one launch.

Twilight wants pages, and SGLang takes the next slots in pages with seven launches and a handful of
operations on the host: a fifth of what its scheduler does in a step.
"""

import logging
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import numpy as np

from twilight_sgl.patches import Patch

logger = logging.getLogger(__name__)

ALLOCATION = "sglang.srt.mem_cache.allocation"
# What `_take_slots` stands in for, and the names that each uses: bookkeeping that is not known here
# would go missing.
STANDS_IN_FOR = {
    f"{ALLOCATION}.alloc_for_decode": (
        "_alloc_page_size _compute_dsv4_state_lens _is_npu alloc_paged_token_slots_decode "
        "alloc_token_slots clone encoder_lens int32 is_encoder_decoder kv kv_allocated_len "
        "maybe_evict_swa maybe_write_dsv4_decode model_config req_pool_indices req_to_token "
        "req_to_token_pool reqs seq_lens seq_lens_cpu shape to torch tree_cache write"
    ),
    f"{ALLOCATION}.alloc_paged_token_slots_decode": (
        "RuntimeError alloc_decode available_and_evictable_str error evict_from_tree_cache hasattr "
        "len logger out_cache_loc_dsv4 out_full_loc page_size pretty_print req_to_token_pool "
        "token_to_kv_pool_allocator"
    ),
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_decode": (
        "all alloc_decode_kernel debug_mode device empty free_pages get_num_new_pages int64 len "
        "merge_and_sort_free need_sort next_power_of_2 page_size torch unique"
    ),
    "sglang.srt.mem_cache.common.evict_from_tree_cache": (
        "EvictParams SWATokenToKVPoolAllocator available_size evict full_available_size "
        "is_chunk_cache isinstance max swa_available_size token_to_kv_pool_allocator"
    ),
    "sglang.srt.utils.common.get_num_new_pages": "device int int64 item sum to torch",
}


def is_known() -> bool:
    """Whether this SGLang allocates as `_take_slots` does: 0.5.17, unless another plugin hooks it.

    Read once, when Twilight's patches are loaded: a plugin that hooks one of these functions later
    is passed by.
    """
    codes = {path: getattr(resolve_name(path), "__code__", None) for path in STANDS_IN_FOR}
    return all(
        code is not None and set(code.co_names) == set(STANDS_IN_FOR[path].split())
        for path, code in codes.items()
    )


def log_if_left_alone() -> None:
    """Log that SGLang's own allocation stays; where plugins are loaded its log is not set up."""
    if not PATCHES:
        logger.info(
            "Twilight: this SGLang allocates decode slots in another way; they stay its own"
        )


def _take_slots(original: Callable[..., Any], batch: Any, token_per_req: int) -> Any:
    """SGLang's own where it would evict or run out, and where Twilight does not serve the pool.

    The pool of a sliding-window model is two, of which neither is the batch's allocator.
    """
    allocator = batch.tree_cache.token_to_kv_pool_allocator
    next_slots = getattr(getattr(allocator, "twilight", None), "next_slots", None)
    rows = len(batch.reqs)
    if (
        next_slots is None
        or not 0 < rows <= allocator.free_pages.shape[0]
        or token_per_req != 1
        or allocator.debug_mode
    ):
        return original(batch, token_per_req=token_per_req)
    slots = next_slots(
        batch.req_to_token_pool.req_to_token,
        batch.req_pool_indices,
        batch.seq_lens,
        allocator.free_pages,
    )
    opened_pages = np.count_nonzero(batch.seq_lens_cpu.numpy() % allocator.page_size == 0)
    allocator.free_pages = allocator.free_pages[opened_pages:]
    for req in batch.reqs:
        req.kv.kv_allocated_len += 1
    return slots


PATCHES: list[Patch] = []
if is_known():
    PATCHES.append(
        Patch(
            "sglang.srt.managers.schedule_batch.alloc_for_decode",
            "around",
            _take_slots,
            "the scheduler's host would bound steps that the GPU ends sooner",
            ("batch", "token_per_req"),
        )
    )
