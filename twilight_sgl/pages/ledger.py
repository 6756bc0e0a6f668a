"""What the scheduler did since the last forward, to be applied in order on the forward stream."""

from collections import deque
from collections.abc import Iterable

import torch

from twilight_sgl.pages.pool import SummaryPool


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
    """Queues page releases and per-request values until the next forward applies them.

    The scheduler frees pages and admits requests while an earlier step may still run; writing
    to the device then could race that step's sealing. Entries keep their order: a page freed,
    given to another request and sealed again must not lose the second seal to the first free.
    """

    def __init__(self, pool: SummaryPool, requests: RequestTable) -> None:
        self._pool = pool
        self._requests = requests
        self._entries: deque[torch.Tensor | dict[int, float] | None] = deque()

    def pages_released(self, page_ids: torch.Tensor) -> None:
        """Note that the allocator took pages back: [M] physical pages."""
        if page_ids.numel():
            self._entries.append(page_ids)

    def all_pages_released(self) -> None:
        """Note that the allocator took every page back."""
        self._entries.append(None)

    def requests_admitted(self, slots_and_p: Iterable[tuple[int, float]]) -> None:
        """Note requests given a slot: (request slot, p or `RequestTable.DENSE`) each."""
        self._entries.append(dict(slots_and_p))

    def apply(self) -> None:
        """Apply every entry, in order, on the current stream."""
        while self._entries:
            entry = self._entries.popleft()
            if entry is None:
                self._pool.unseal_all()
            elif isinstance(entry, torch.Tensor):
                if entry.is_cuda:
                    entry.record_stream(torch.cuda.current_stream())
                self._pool.unseal(entry.to(self._pool.sealed.device, non_blocking=True))
            else:
                self._write_requests(entry)

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
