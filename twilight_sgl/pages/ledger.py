"""What the scheduler did since the last decode step, to be applied on the forward stream."""

from collections.abc import Iterable

import torch

from twilight_sgl.pages.pool import SummaryPool

MOST_TENSORS = 64  # noted, before an extend applies them


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
    """

    def __init__(self, pool: SummaryPool, requests: RequestTable) -> None:
        self._pool = pool
        self._requests = requests
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
        if self._p_of_slot:
            values, self._p_of_slot = self._p_of_slot, {}
            self._write_requests(values)
        if self._is_all_released:
            self._is_all_released = False
            self._pages, self._token_slots = [], []
            self._pool.unseal_all()
            return
        pages, self._pages = self._pages, []
        if self._token_slots:
            slots, self._token_slots = self._token_slots, []
            pages.append(self._joined(slots) // self._pool.page_size)
        if pages:
            self._pool.unseal(self._joined(pages))

    def _joined(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """All in one, on the pool's device."""
        device = self._pool.sealed.device
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream())
        moved = [tensor.to(device, torch.int64, non_blocking=True) for tensor in tensors]
        return moved[0] if len(moved) == 1 else torch.cat(moved)

    def _write_requests(self, values: dict[int, float]) -> None:
        device = self._requests.p.device
        # One copy for both; float64 holds every slot.
        rows = torch.tensor(
            [list(values), list(values.values())],
            dtype=torch.float64,
            pin_memory=device.type == "cuda",
        ).to(device, non_blocking=True)
        slots = rows[0].long()
        self._requests.p.index_copy_(0, slots, rows[1].float())
        self._requests.first_step.index_fill_(0, slots, True)
