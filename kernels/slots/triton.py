"""A decode step's KV slots in one launch."""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.launch import CompiledLaunch

_BLOCK = 256  # rows


# What differs from step to step must not change how the kernel is compiled: see `CompiledLaunch`.
@triton.jit(
    do_not_specialize=["stride_table", "num_rows"],
    do_not_specialize_on_alignment=[
        *("req_to_token_ptr", "request_slots_ptr", "seq_lens_ptr"),
        *("free_pages_ptr", "slots_ptr"),
    ],
)
def _slots_kernel(
    req_to_token_ptr,
    request_slots_ptr,
    seq_lens_ptr,
    free_pages_ptr,
    slots_ptr,
    stride_table,
    num_rows,
    PS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    opened = tl.zeros((), tl.int32)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        exists = row < num_rows
        request = tl.load(request_slots_ptr + row, exists, other=0).to(tl.int64)
        length = tl.load(seq_lens_ptr + row, exists, other=1).to(tl.int64)
        next_ptr = req_to_token_ptr + request * stride_table + length
        opens_page = exists & (length % PS == 0)
        last = tl.load(next_ptr - 1, exists & (length % PS != 0), other=0)
        rank = opened + tl.cumsum(opens_page.to(tl.int32), 0) - 1
        page = tl.load(free_pages_ptr + rank, opens_page, other=0)
        slot = tl.where(opens_page, page.to(tl.int64) * PS, last.to(tl.int64) + 1)
        tl.store(slots_ptr + row, slot, exists)
        tl.store(next_ptr, slot.to(tl.int32), exists)
        opened += tl.sum(opens_page.to(tl.int32), 0)


class NextSlots:
    """Gives a decode step's new tokens their KV slots.

    Args:
        device: of all tensors.
        page_size: tokens.
    """

    def __init__(self, device: torch.device, *, page_size: int) -> None:
        self._constants = page_size, _BLOCK
        self._launch = CompiledLaunch(_slots_kernel, num_warps=4)
        no_rows = torch.empty(0, dtype=torch.int64, device=device)
        table = torch.empty((1, 1), dtype=torch.int32, device=device)
        self(table, no_rows, no_rows, no_rows)  # compiles the kernel

    def __call__(
        self,
        req_to_token: torch.Tensor,
        request_slots: torch.Tensor,
        seq_lens: torch.Tensor,
        free_pages: torch.Tensor,
    ) -> torch.Tensor:
        """See `reference.next_slots`; on the current stream."""
        rows = request_slots.shape[0]
        slots = torch.empty(rows, dtype=torch.int64, device=request_slots.device)
        tensors = req_to_token, request_slots, seq_lens, free_pages, slots
        self._launch(
            1,
            (*tensors, req_to_token.stride(0), rows, *self._constants),
            kind=(request_slots.dtype, seq_lens.dtype, free_pages.dtype),
        )
        return slots
