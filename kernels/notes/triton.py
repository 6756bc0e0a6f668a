"""What the scheduler noted, applied in one launch."""

import functools
import struct
from collections import deque
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from twilight_sgl.kernels.launch import CompiledLaunch

_BLOCK = 1024


@triton.jit(do_not_specialize=["num_tensors", "num_requests"])
def _notes_kernel(
    notes_ptr,
    sealed_ptr,
    p_ptr,
    first_step_ptr,
    num_tensors,
    num_requests,
    PS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if program < num_tensors:
        values_ptr = tl.load(notes_ptr + 2 * program).to(tl.pointer_type(tl.int64))
        count = tl.load(notes_ptr + 2 * program + 1)  # negative where values are tokens
        for start in range(0, tl.abs(count), BLOCK):
            inside = start + lane < tl.abs(count)
            value = tl.load(values_ptr + start + lane, inside, other=0)
            page = tl.where(count < 0, value // PS, value)
            tl.store(sealed_ptr + page, tl.zeros([BLOCK], tl.int32), inside)
    else:
        request = (program - num_tensors) * BLOCK + lane
        inside = request < num_requests
        note = tl.load(notes_ptr + 2 * num_tensors + request, inside, other=0)
        slot = note >> 32
        p = (note & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(p_ptr + slot, p, inside)
        tl.store(first_step_ptr + slot, tl.full([BLOCK], 1, tl.int1), inside)


@functools.lru_cache(maxsize=1024)
def _bits(value: float) -> int:
    """A float32 as an integer of 32 bits."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


class NotesApplier:
    """Ends seals and begins requests anew, always in the same tensors.

    The first token of a prompt waits for the launch of the decode step behind it, and with that
    for this. So the host sends addresses, and the GPU reads what lies there.

    Args:
        sealed, p, first_step, page_size: see `reference.apply_notes`.
    """

    def __init__(
        self, sealed: torch.Tensor, p: torch.Tensor, first_step: torch.Tensor, *, page_size: int
    ) -> None:
        self._tensors = sealed, p, first_step
        self._constants = page_size, _BLOCK
        self._launch = CompiledLaunch(_notes_kernel, num_warps=4)
        self._in_use: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()

    def __call__(
        self,
        released_pages: Sequence[torch.Tensor],
        written_slots: Sequence[torch.Tensor],
        p_of_slot: Mapping[int, float],
    ) -> None:
        """Apply notes on the current stream: see `reference.apply_notes`.

        The tensors may be of another stream, whose work on them the current one waits for; they
        are kept until they have been read.
        """
        device = self._tensors[0].device
        tensors, notes = [], []
        for values, sign in ((released_pages, 1), (written_slots, -1)):
            for tensor in values:
                tensor = tensor.to(device, torch.int64, non_blocking=True).contiguous()
                tensors.append(tensor)
                notes += tensor.data_ptr(), sign * tensor.numel()
        notes += [slot << 32 | _bits(value) for slot, value in p_of_slot.items()]
        sent = torch.tensor(notes, dtype=torch.int64, pin_memory=device.type == "cuda")
        programs = len(tensors) + triton.cdiv(len(p_of_slot), _BLOCK)
        counts = len(tensors), len(p_of_slot)
        self._launch(
            programs,
            (sent.to(device, non_blocking=True), *self._tensors, *counts, *self._constants),
        )
        if tensors and device.type == "cuda":
            self._keep(tensors)

    def _keep(self, tensors: list[torch.Tensor]) -> None:
        while self._in_use and self._in_use[0][0].query():
            self._in_use.popleft()
        event = torch.cuda.Event()
        event.record()
        self._in_use.append((event, tensors))
