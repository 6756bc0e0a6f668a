"""A decode step's KV slots and lengths in one launch."""

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.launch import CompiledLaunch

_BLOCK = 256  # rows
_STEPS = 16  # steps whose slots are allocated at once, which costs the host less than one by one


# What differs from step to step must not change how the kernel is compiled: see `CompiledLaunch`.
@triton.jit(
    do_not_specialize=["stride_table", "num_rows"],
    do_not_specialize_on_alignment=[
        *("req_to_token_ptr", "request_slots_ptr", "seq_lens_ptr", "orig_seq_lens_ptr"),
        *("free_pages_ptr", "slots_ptr", "grown_ptr", "grown_orig_ptr"),
    ],
)
def _slots_kernel(
    req_to_token_ptr,
    request_slots_ptr,
    seq_lens_ptr,
    orig_seq_lens_ptr,
    free_pages_ptr,
    slots_ptr,
    grown_ptr,
    grown_orig_ptr,
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
        tl.store(grown_ptr + row, length + 1, exists)
        orig_length = tl.load(orig_seq_lens_ptr + row, exists, other=0)
        tl.store(grown_orig_ptr + row, orig_length + 1, exists)
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
        self._device = device
        self._unused_are: object = None
        self._unused: list[tuple[torch.Tensor, ...]] = []
        no_rows = torch.empty(0, dtype=torch.int64, device=device)
        table = torch.empty((1, 1), dtype=torch.int32, device=device)
        self(table, no_rows, no_rows, no_rows.int(), no_rows)  # compiles the kernel

    def __call__(
        self,
        req_to_token: torch.Tensor,
        request_slots: torch.Tensor,
        seq_lens: torch.Tensor,
        orig_seq_lens: torch.Tensor,
        free_pages: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """See `reference.next_slots`; on the current stream."""
        rows = request_slots.shape[0]
        results = self._results(rows, seq_lens.dtype, orig_seq_lens.dtype)
        tensors = req_to_token, request_slots, seq_lens, orig_seq_lens, free_pages, *results
        self._launch(
            1,
            (*tensors, req_to_token.stride(0), rows, *self._constants),
            kind=(request_slots.dtype, seq_lens.dtype, orig_seq_lens.dtype, free_pages.dtype),
        )
        return results

    def _results(self, rows: int, *dtypes: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Tensors that no step has had: slots, and lengths of these dtypes."""
        if not self._unused or self._unused_are != (rows, dtypes):
            shape = _STEPS, rows
            of_steps = [
                torch.empty(shape, dtype=dtype, device=self._device).unbind()
                for dtype in (torch.int64, *dtypes)
            ]
            self._unused = list(zip(*of_steps, strict=True))
            self._unused_are = rows, dtypes
        return self._unused.pop()
