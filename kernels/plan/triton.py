"""A decode step's rows and the pages to seal for it, in one launch."""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.launch import CompiledLaunch

_BLOCK = 2048


# What differs from step to step must not change how the kernel is compiled: see `CompiledLaunch`.
@triton.jit(
    do_not_specialize=["turn", "stride_table", "min_context_tokens"],
    do_not_specialize_on_alignment=["req_to_token_ptr", "request_slots_ptr", "seq_lens_ptr"],
)
def _plan_kernel(
    req_to_token_ptr,
    request_slots_ptr,
    seq_lens_ptr,
    p_of_slot_ptr,
    first_step_ptr,
    sealed_ptr,
    page_ids_ptr,
    lengths_ptr,
    p_ptr,
    sparse_ptr,
    claimed_ptr,
    num_claimed_ptr,
    totals_ptr,
    reused_ptr,
    turn_ptr,
    turn,
    stride_table,
    stride_pages,
    min_context_tokens,
    PS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row == 0:
        tl.store(turn_ptr, turn)
    slot = tl.load(request_slots_ptr + row).to(tl.int64)
    length = tl.where(slot > 0, tl.load(seq_lens_ptr + row), 0).to(tl.int32)
    p = tl.load(p_of_slot_ptr + slot)
    sparse = (p <= 1) & (length >= min_context_tokens) & (length > 0)
    first_step = sparse & (tl.load(first_step_ptr + slot) != 0)
    tl.store(lengths_ptr + row, length)
    tl.store(p_ptr + row, tl.minimum(p, 1.0))
    tl.store(sparse_ptr + row, sparse)

    num_pages = (length + PS - 1) // PS
    full_pages = tl.where(sparse, tl.maximum(length - 1, 0) // PS, 0)
    built = tl.zeros((), tl.int64)
    for start in range(0, num_pages, BLOCK):
        column = start + tl.arange(0, BLOCK)
        exists = column < num_pages
        token_slot = tl.load(
            req_to_token_ptr + slot * stride_table + column.to(tl.int64) * PS, exists, other=0
        )
        page = token_slot // PS
        tl.store(page_ids_ptr + row * stride_pages + column, page, exists)
        full = column < full_pages
        unsealed = full & (tl.load(sealed_ptr + page, full, other=1) == 0)
        if tl.max(unsealed.to(tl.int32), 0) > 0:
            was = tl.atomic_xchg(sealed_ptr + page, 1, unsealed)
            won = (unsealed & (was == 0)).to(tl.int32)
            count = tl.sum(won, 0)
            position = tl.atomic_add(num_claimed_ptr, count) + tl.cumsum(won, 0) - 1
            tl.store(claimed_ptr + position, page, won != 0)
            built += count.to(tl.int64)
    if built > 0:
        tl.atomic_add(totals_ptr, built)
    reused = tl.where(first_step, full_pages.to(tl.int64) - built, 0)
    tl.store(reused_ptr + row, reused.to(tl.int32))
    if first_step:
        tl.atomic_add(totals_ptr + 1, reused)
        tl.store(first_step_ptr + slot, tl.zeros((), tl.int1))


class StepPlanner:
    """Snapshots a step's rows and claims the pages to seal for it, always into the same tensors.

    It runs before each step outside the step's CUDA graph.

    Args:
        p_of_slot: [S] float32 by request slot, see `reference.plan_rows`.
        first_step: [S] bool by request slot; read, and cleared for the sparse rows.
        sealed: [P] int32 by physical page.
        page_ids: [B, T] int32, lengths: [B] int32, p: [B] float32, sparse: [B] bool; written, for
            at most B rows. Columns behind a row's last page are left as they are.
        claimed_page_ids: [P] int32, appended to from num_claimed, [1] int32, on.
        totals: [2] int64, increased: pages claimed, and pages that rows in their first sparse
            step did not have to claim; pages_reused: [B] int32, written: the latter by row.
        turn: [1] int32, written, for the kernels of the step's graph to read.
        page_size: tokens.
    """

    def __init__(
        self,
        p_of_slot: torch.Tensor,
        first_step: torch.Tensor,
        sealed: torch.Tensor,
        page_ids: torch.Tensor,
        lengths: torch.Tensor,
        p: torch.Tensor,
        sparse: torch.Tensor,
        claimed_page_ids: torch.Tensor,
        num_claimed: torch.Tensor,
        totals: torch.Tensor,
        pages_reused: torch.Tensor,
        turn: torch.Tensor,
        *,
        page_size: int,
    ) -> None:
        self._tensors = (
            *(p_of_slot, first_step, sealed, page_ids, lengths, p, sparse),
            *(claimed_page_ids, num_claimed, totals, pages_reused, turn),
        )
        self._stride_pages = page_ids.stride(0)
        self._constants = page_size, min(_BLOCK, triton.next_power_of_2(page_ids.shape[1]))
        self._launch = CompiledLaunch(_plan_kernel, num_warps=4)

    def __call__(
        self,
        req_to_token: torch.Tensor,
        request_slots: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        min_context_tokens: int,
        this_turn: int,
    ) -> None:
        """Snapshot rows as `reference.plan_rows` does, and claim the full pages without a summary.

        A full page is one before the page that holds the newest token. A claimed page is marked as
        sealed at once, so that of rows that share it one claims it; it must be sealed before any
        summary of the step is read. The order of claimed pages is not defined.

        Args:
            req_to_token, request_slots, seq_lens: see `reference.plan_rows`; at most B rows.
            this_turn: what `turn` becomes.
        """
        arguments = (
            *(req_to_token, request_slots, seq_lens),
            *self._tensors,
            *(this_turn, req_to_token.stride(0), self._stride_pages, min_context_tokens),
            *self._constants,
        )
        dtypes = req_to_token.dtype, request_slots.dtype, seq_lens.dtype
        self._launch(request_slots.shape[0], arguments, dtypes)
