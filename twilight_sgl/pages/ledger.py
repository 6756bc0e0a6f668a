"""What the scheduler did since the last decode step, to be applied on the forward stream."""

import functools
from collections.abc import Callable, Iterable

import torch

from twilight_sgl.kernels.notes import reference
from twilight_sgl.pages.pool import SummaryPool

MOST_TENSORS = 256  # noted, before an extend applies them

ApplyNotes = Callable[[list[torch.Tensor], list[torch.Tensor], dict[int, float]], None]


class RequestTable:
    """Per-request values, by request slot; slot 0 is SGLang's padding row.

    Attributes:
        p: [S] float32, the mass a request keeps; `DENSE` for a request that is not pruned.
        first_step: [S] bool, True until a request's first sparse step.
    """

    DENSE = float("inf")

    def __init__(self, num_slots: int, default_p: float, device: torch.device | str) -> None:
        self.p = torch.full((num_slots,), default_p, dtype=torch.float32, device=device)
        self.first_step = torch.zeros(num_slots, dtype=torch.bool, device=device)


class Ledger:
    """Keeps what ends seals, and per-request values, until a decode step needs them.

    The scheduler frees pages and admits requests while an earlier step may still run; writing
    to the device then could race that step's sealing. Only a decode step seals, and only what is
    here already: so what is noted between two of them has no order among itself, and an extend,
    whose first token waits for every launch before it, applies nothing.

    Args:
        pool: whose seals end.
        requests: whose values are written.
        apply_notes: does both as `kernels.notes.reference.apply_notes` does, to the tensors of
            `pool` and `requests`; by default that itself.
    """

    def __init__(
        self,
        pool: SummaryPool,
        requests: RequestTable,
        apply_notes: ApplyNotes | None = None,
    ) -> None:
        self._pool = pool
        self._apply_notes = apply_notes or functools.partial(
            reference.apply_notes,
            sealed=pool.sealed,
            p=requests.p,
            first_step=requests.first_step,
            page_size=pool.page_size,
        )
        self._pages: list[torch.Tensor] = []
        self._token_slots: list[torch.Tensor] = []
        self._is_all_released = False
        self._p_of_slot: dict[int, float] = {}

    def pages_released(self, page_ids: torch.Tensor) -> None:
        """Note that the allocator took pages back: [M] physical pages."""
        if page_ids.numel():
            self._pages.append(page_ids)

    def all_pages_released(self) -> None:
        """Note that the allocator took every page back."""
        self._is_all_released = True

    def tokens_written(self, token_slots: torch.Tensor) -> None:
        """Note KV slots, [M], that an extend writes: their pages are sealed no longer."""
        if token_slots.numel():
            self._token_slots.append(token_slots)

    def requests_admitted(self, slots_and_p: Iterable[tuple[int, float]]) -> None:
        """Note requests given a slot: (request slot, p or `RequestTable.DENSE`) each."""
        self._p_of_slot.update(slots_and_p)

    @property
    def is_long(self) -> bool:
        """Whether so much is noted that it should be applied though no decode step comes."""
        return len(self._pages) + len(self._token_slots) >= MOST_TENSORS

    def apply(self) -> None:
        """Apply what is noted, on the current stream."""
        if self._is_all_released:
            self._is_all_released = False
            self._pages, self._token_slots = [], []
            self._pool.unseal_all()
        if not (self._pages or self._token_slots or self._p_of_slot):
            return
        notes = self._pages, self._token_slots, self._p_of_slot
        self._pages, self._token_slots, self._p_of_slot = [], [], {}
        self._apply_notes(*notes)
