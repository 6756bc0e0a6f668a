"""Totals that kernels add to, and how the host reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from twilight_sgl.telemetry.snapshot import Snapshot


@dataclass(frozen=True)
class HostTotals:
    """What the host counted itself, of a moment; the fields are `Snapshot`'s."""

    time: float
    decode_steps: int
    dense_steps: int
    mixed_rows: int
    audit_checks: int
    audit_violations: int


class Counters:
    """Totals since the server started, in one tensor that one copy reads.

    They are written on the forward stream, by one kernel a step.

    Args:
        layer_ids: the L layers that select; heads_kv: HK; num_pages: pages of the KV pool, the
            padding page not counted.

    Attributes:
        tokens: [L, HK, 3] int64: context, candidate and kept tokens of sparse rows.
        kept_mass: [L, HK] float64, sums over sparse rows, see `Snapshot`.
        sparse_rows: [1] int64.
        pages: [2] int64: summaries built, and pages found sealed.
        sealing_nanoseconds: [1] int64.
    """

    def __init__(
        self,
        layer_ids: Sequence[int],
        heads_kv: int,
        num_pages: int,
        device: torch.device | str,
    ) -> None:
        self._layer_ids = tuple(layer_ids)
        self._num_pages = num_pages
        self._shape = (len(self._layer_ids), heads_kv)
        heads = self._shape[0] * heads_kv
        self._sizes = (3 * heads, heads, 1, 2, 1, 1)
        self._all = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        (
            self.tokens,
            self.kept_mass,
            self.sparse_rows,
            self.pages,
            self.sealing_nanoseconds,
            self._pages_sealed,
        ) = self._parts(self._all)
        self._copy: torch.Tensor | None = None
        if self._all.is_cuda:
            self._copy = torch.empty_like(self._all, device="cpu", pin_memory=True)
            self._copied = torch.cuda.Event()
        self._in_flight: HostTotals | None = None
        self._newest: Snapshot | None = None

    def read(self, sealed: torch.Tensor, host: HostTotals) -> Snapshot:
        """The totals now. Synchronises.

        Args:
            sealed: [P] int32, 1 for pages with a summary.
        """
        self._count_sealed(sealed)
        return self._snapshot(self._all.cpu(), host)

    def poll(self, sealed: torch.Tensor, host: HostTotals) -> Snapshot | None:
        """The newest totals that have reached the host; asks for newer ones.

        On a GPU it enqueues a copy on the current stream, unless one is under way, and never
        waits: the first call returns None, a later one what an earlier one asked for. Enqueue it
        between steps, where no step is half counted: on the forward stream.
        """
        if self._copy is None:
            return self.read(sealed, host)
        if self._in_flight is not None and self._copied.query():
            self._newest = self._snapshot(self._copy, self._in_flight)
            self._in_flight = None
        if self._in_flight is None:
            self._count_sealed(sealed)
            self._copy.copy_(self._all, non_blocking=True)
            self._copied.record()
            self._in_flight = host
        return self._newest

    def _count_sealed(self, sealed: torch.Tensor) -> None:
        torch.sum(sealed, 0, keepdim=True, dtype=torch.int64, out=self._pages_sealed)

    def _parts(self, totals: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of one tensor of all totals, in the order of the attributes."""
        tokens, mass, *others = totals.split(self._sizes)
        return (
            tokens.view(*self._shape, 3),
            mass.view(torch.float64).view(self._shape),
            *others,
        )

    def _snapshot(self, totals: torch.Tensor, host: HostTotals) -> Snapshot:
        tokens, mass, rows, pages, nanoseconds, sealed = self._parts(totals.clone())
        context, candidate, kept = tokens.numpy().transpose(2, 0, 1)
        built, reused = pages.tolist()
        return Snapshot(
            time=host.time,
            layer_ids=self._layer_ids,
            context_tokens=context,
            candidate_tokens=candidate,
            kept_tokens=kept,
            kept_mass=mass.numpy(),
            sparse_rows=int(rows),
            decode_steps=host.decode_steps,
            dense_steps=host.dense_steps,
            mixed_rows=host.mixed_rows,
            pages_capacity=self._num_pages,
            pages_sealed=int(sealed),
            pages_built=built,
            pages_reused=reused,
            sealing_seconds=int(nanoseconds) / 1e9,
            audit_checks=host.audit_checks,
            audit_violations=host.audit_violations,
        )
