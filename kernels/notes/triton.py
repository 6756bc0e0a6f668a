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
_SHEETS = 4  # made in advance: to pin memory while requests wait would take longer than all else
_NUMBERS = 4096  # of such a sheet
# What a noted tensor holds.
_TOKENS = 1  # else pages
_INT64 = 2  # else int32
_WIDTHS = {torch.int32: 0, torch.int64: _INT64}
_COLUMNS = 3  # of a tensor's note: its address, its length and a sum of these


@triton.jit(do_not_specialize=["num_tensors", "num_requests", "num_pages"])
def _notes_kernel(
    notes_ptr,
    sealed_ptr,
    p_ptr,
    first_step_ptr,
    num_tensors,
    num_requests,
    num_pages,
    PS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    INT64: tl.constexpr,
):
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if program < num_tensors:
        note_ptr = notes_ptr + program * COLUMNS
        address, count, kind = tl.load(note_ptr), tl.load(note_ptr + 1), tl.load(note_ptr + 2)
        for start in range(0, count, BLOCK):
            inside = start + lane < count
            if (kind & INT64) != 0:
                values_ptr = address.to(tl.pointer_type(tl.int64))
                value = tl.load(values_ptr + start + lane, inside, other=0)
            else:
                narrow_ptr = address.to(tl.pointer_type(tl.int32))
                value = tl.load(narrow_ptr + start + lane, inside, other=0).to(tl.int64)
            page = tl.where((kind & TOKENS) != 0, value // PS, value)
            inside &= (page > 0) & (page < num_pages)
            tl.store(sealed_ptr + page, tl.zeros([BLOCK], tl.int32), inside)
    else:
        request = (program - num_tensors) * BLOCK + lane
        inside = request < num_requests
        note = tl.load(notes_ptr + num_tensors * COLUMNS + request, inside, other=0)
        slot = note >> 32
        p = (note & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(p_ptr + slot, p, inside)
        tl.store(first_step_ptr + slot, tl.full([BLOCK], 1, tl.int1), inside)


@functools.lru_cache(maxsize=1024)
def _bits(value: float) -> int:
    """A float32 as an integer of 32 bits."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


class _Sheet:
    """Host memory that the GPU reads notes from, and tensors that must not be freed before."""

    def __init__(self, capacity: int, is_pinned: bool) -> None:
        self.notes = torch.empty(capacity, dtype=torch.int64, pin_memory=is_pinned)
        self.numbers = self.notes.numpy()
        self.tensors: list[torch.Tensor] = []
        self._read = torch.cuda.Event() if is_pinned else None

    def send(self) -> None:
        """The kernel that reads it was launched."""
        if self._read is not None:
            self._read.record()

    def is_read(self) -> bool:
        """Whether that kernel has ended."""
        return self._read is None or self._read.query()


class NotesApplier:
    """Ends seals and begins requests anew, always in the same tensors.

    The first token of a prompt waits for the launch of the decode step behind it, and with that
    for this. So the host writes down addresses, in memory pinned once and for all (to pin a new
    tensor took a quarter of a millisecond), and one kernel reads them and what lies there.

    Args:
        sealed, p, first_step, page_size: see `reference.apply_notes`.
    """

    def __init__(
        self, sealed: torch.Tensor, p: torch.Tensor, first_step: torch.Tensor, *, page_size: int
    ) -> None:
        self._tensors = sealed, p, first_step
        self._constants = page_size, _BLOCK, _COLUMNS, _TOKENS, _INT64
        self._launch = CompiledLaunch(_notes_kernel, num_warps=4)
        self._sent: deque[_Sheet] = deque()
        self._free = [_Sheet(_NUMBERS, sealed.is_cuda) for _ in range(_SHEETS)]
        self([sealed[:0]], [], {})  # compiles the kernel

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
        tensors: list[torch.Tensor] = []
        notes: list[int] = []
        for values, holds in ((released_pages, 0), (written_slots, _TOKENS)):
            for tensor in map(self._readable, values):
                kind = holds | _WIDTHS[tensor.dtype]
                notes += tensor.data_ptr(), tensor.numel(), kind
                tensors.append(tensor)
        notes += [slot << 32 | _bits(value) for slot, value in p_of_slot.items()]
        sheet = self._sheet(len(notes))
        sheet.numbers[: len(notes)] = notes
        sheet.tensors = [*tensors, *released_pages, *written_slots]
        programs = len(tensors) + triton.cdiv(len(p_of_slot), _BLOCK)
        counts = len(tensors), len(p_of_slot), len(self._tensors[0])
        self._launch(programs, (sheet.notes, *self._tensors, *counts, *self._constants))
        sheet.send()
        self._sent.append(sheet)

    def _readable(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself where the kernel can read it."""
        sealed = self._tensors[0]
        if tensor.dtype not in _WIDTHS:
            tensor = tensor.long()
        if tensor.is_cuda == sealed.is_cuda and tensor.is_contiguous():
            return tensor
        return tensor.to(sealed.device, non_blocking=True).contiguous()

    def _sheet(self, numbers: int) -> _Sheet:
        """A sheet with room for so many, which nobody reads."""
        while self._sent and self._sent[0].is_read():
            sheet = self._sent.popleft()
            sheet.tensors = []
            self._free.append(sheet)
        while self._free:
            sheet = self._free.pop()
            if len(sheet.numbers) >= numbers:
                return sheet
        capacity = triton.next_power_of_2(max(numbers, _NUMBERS))
        return _Sheet(capacity, self._tensors[0].is_cuda)
