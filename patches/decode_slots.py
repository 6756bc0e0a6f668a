"""Take a decode step's KV slots, and count its tokens, in one launch.

Twilight wants pages, and SGLang takes the next slots in pages with seven launches and a handful of
operations on the host: a fifth of what its scheduler does in a step. To count the tokens it takes
two more launches, and two more operations on the host.
"""

import logging
from collections.abc import Callable
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_server_args

from twilight_sgl.patches import Patch

if TYPE_CHECKING:
    import torch

    from twilight_sgl.kernels.slots.triton import NextSlots

logger = logging.getLogger(__name__)

ALLOCATION = "sglang.srt.mem_cache.allocation"
# What the hooks stand in for, and the names that each uses: bookkeeping that is not known here
# would go missing.
STANDS_IN_FOR = {
    "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_decode": (
        "DECODE ForwardMode alloc_for_decode attn_cp_metadata cumulate_penalty_output_tokens "
        "decode_batch_idx device empty enable_mamba_extra_buffer enable_mamba_extra_buffer_lazy "
        "forward_mode get_exec get_server_args hasattr hisparse_coordinator input_embeds int64 "
        "is_encoder_decoder is_none is_required kv_committed_len len mamba "
        "mamba_lazy_prealloc_at_boundary mamba_track_indices mamba_track_interval "
        "mamba_track_mask map_last_loc_to_buffer model_config orig_seq_lens out_cache_loc "
        "penalizer_orchestrator pin_memory prepare_encoder_info_decode req_pool_indices "
        "req_pool_indices_cpu reqs sampling_info seq_lens seq_lens_cpu seq_lens_sum "
        "set_mamba_track_indices_from_reqs sglang.srt.speculative.spec_utils spec_algorithm "
        "spec_prepare_for_decode to torch"
    ),
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
    """Whether this SGLang prepares a step as the hooks do: 0.5.17, unless another plugin hooks it.

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
        logger.info("Twilight: this SGLang prepares decode steps in another way; they stay its own")


def _next_slots(batch: Any) -> "NextSlots | None":
    """What takes a batch's slots; None where SGLang's own would evict or run out, and without us.

    The pool of a sliding-window model is two, of which neither is the batch's allocator.
    """
    allocator = batch.tree_cache.token_to_kv_pool_allocator
    next_slots = getattr(getattr(allocator, "twilight", None), "next_slots", None)
    if (
        next_slots is None
        or not 0 < len(batch.reqs) <= allocator.free_pages.shape[0]
        or allocator.debug_mode
    ):
        return None
    return next_slots


def _take(batch: Any, next_slots: "NextSlots") -> "tuple[tuple[torch.Tensor, ...], int]":
    """Take a batch's slots: what `next_slots` returns, and the tokens of all its requests."""
    allocator = batch.tree_cache.token_to_kv_pool_allocator
    taken = next_slots(
        batch.req_to_token_pool.req_to_token,
        batch.req_pool_indices,
        batch.seq_lens,
        batch.orig_seq_lens,
        allocator.free_pages,
    )
    page_size = allocator.page_size
    total = opened_pages = 0
    for req, tokens in zip(batch.reqs, batch.seq_lens_cpu.tolist(), strict=True):
        total += tokens + 1
        opened_pages += not tokens % page_size
        req.kv.kv_allocated_len += 1
    if opened_pages:  # a view of a tensor costs as much as all that
        allocator.free_pages = allocator.free_pages[opened_pages:]
    return taken, total


def _take_slots(original: Callable[..., Any], batch: Any, token_per_req: int) -> Any:
    """Slots alone, where `_prepare` leaves the step to SGLang."""
    next_slots = _next_slots(batch)
    if next_slots is None or token_per_req != 1:
        return original(batch, token_per_req=token_per_req)
    (slots, *_), _ = _take(batch, next_slots)
    return slots


def _prepare(original: Callable[..., None], batch: Any) -> None:
    """Prepare a plain decode step; other models' steps and speculative ones stay SGLang's."""
    next_slots = _next_slots(batch)
    if (
        next_slots is None
        or not batch.spec_algorithm.is_none()
        or batch.model_config.is_encoder_decoder
        or batch.hisparse_coordinator is not None
        or get_server_args().enable_mamba_extra_buffer()
    ):
        return original(batch)
    batch.forward_mode = ForwardMode.DECODE
    batch.input_embeds = None
    if getattr(batch, "attn_cp_metadata", None) is not None:
        batch.attn_cp_metadata = None
    if batch.sampling_info.penalizer_orchestrator.is_required:
        batch.cumulate_penalty_output_tokens()
    taken, batch.seq_lens_sum = _take(batch, next_slots)
    batch.out_cache_loc, batch.seq_lens, batch.orig_seq_lens = taken
    batch.seq_lens_cpu = batch.seq_lens_cpu + 1  # others may still read the one before
    for req in batch.reqs:
        req.decode_batch_idx += 1
        req.kv_committed_len += 1
    return None


WHY = "the scheduler's host would bound steps that the GPU ends sooner"

PATCHES: list[Patch] = []
if is_known():
    PATCHES += [
        Patch(
            "sglang.srt.managers.schedule_batch.alloc_for_decode",
            "around",
            _take_slots,
            WHY,
            ("batch", "token_per_req"),
        ),
        Patch(
            "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_decode",
            "around",
            _prepare,
            WHY,
            ("self",),
        ),
    ]
