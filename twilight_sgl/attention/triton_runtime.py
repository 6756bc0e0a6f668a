"""Twilight on a GPU: static buffers, no allocation and no synchronisation in a decode step."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from twilight_sgl.attention.plan import DecodePlan
from twilight_sgl.attention.runtime import TwilightRuntime
from twilight_sgl.attention.triton_pipeline import TritonDecode
from twilight_sgl.config import TwilightConfig
from twilight_sgl.errors import TwilightError
from twilight_sgl.kernels.attend.rows import attend_rows
from twilight_sgl.kernels.attend.triton import AttendWorkspace
from twilight_sgl.kernels.count.reference import ROW_SUMS
from twilight_sgl.kernels.count.triton import IDLE_CLOCK, count_step
from twilight_sgl.kernels.notes.triton import NotesApplier
from twilight_sgl.kernels.plan.triton import StepPlanner
from twilight_sgl.kernels.row import Token
from twilight_sgl.kernels.seal.triton import layer_pointers, seal_pages
from twilight_sgl.kernels.slots.triton import NextSlots
from twilight_sgl.pages.ledger import Ledger
from twilight_sgl.telemetry.report import RowSums

logger = logging.getLogger(__name__)

_NO_CONTEXT = torch.iinfo(torch.int32).max  # tokens, more than a request can have
_TURNS = 16  # steps whose row sums are kept: SGLang reads a step's while the next one runs


class _Buffers:
    """What a step of up to `max_batch` rows writes, at addresses that a CUDA graph may keep.

    Attributes:
        planner: writes `plan`.
        decode: runs the layers that select; None until a step of so many rows does, for its
            workspaces are large.
        workspace: of attention, whether rows select or not.
        row_sums: [_TURNS, B, 5] pinned on the host, where the GPU writes them: a copy of their own
            would take a launch and the host's time in each step.
        turn: [1], the one of `row_sums` that the step under way writes.
    """

    planner: StepPlanner

    def __init__(
        self,
        layers: int,
        max_batch: int,
        columns: int,
        heads_q: int,
        heads_kv: int,
        workspace: AttendWorkspace,
        device: torch.device,
    ) -> None:
        self.max_batch = max_batch
        self.workspace = workspace
        self.decode: TritonDecode | None = None
        self.page_ids = torch.zeros((max_batch, columns), dtype=torch.int32, device=device)
        self.lengths = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self.p = torch.ones(max_batch, dtype=torch.float32, device=device)
        self.sparse = torch.zeros(max_batch, dtype=torch.bool, device=device)
        counts = (layers, max_batch, heads_kv)
        self.candidate_tokens = torch.zeros(counts, dtype=torch.int32, device=device)
        self.kept_tokens = torch.zeros(counts, dtype=torch.int32, device=device)
        self.masses = torch.ones((layers, max_batch, heads_q), device=device)
        self.pages_reused = torch.zeros(max_batch, dtype=torch.int32, device=device)
        row_sums = (_TURNS, max_batch, len(ROW_SUMS))
        pinned = device.type == "cuda"
        self.row_sums = torch.zeros(row_sums, dtype=torch.float64, pin_memory=pinned)
        self.row_sums_read: RowSums = self.row_sums.numpy()
        self.turn = torch.zeros(1, dtype=torch.int32, device=device)
        self._plans: dict[int, DecodePlan] = {}  # views are made once for each batch size

    def plan(self, batch: int) -> DecodePlan:
        """The plan of a batch, on the first rows of the buffers."""
        if batch not in self._plans:
            rows = (self.page_ids, self.lengths, self.p, self.sparse)
            self._plans[batch] = DecodePlan(*(each[:batch] for each in rows))
        return self._plans[batch]


class TritonRuntime(TwilightRuntime):
    """The runtime of a CUDA model runner.

    A step is planned outside the CUDA graph (`begin_decode`: one launch that snapshots SGLang's
    request table and, unless the step is dense, claims pages to seal) and runs inside it:
    `seal_claimed`, then `run_layer` for every layer of `serves`, in order.

    Attributes:
        next_slots: allocates a step's KV slots, on the scheduler's stream.

    Args:
        dense_layer_ids: layers that never select, with caches like those of the ones that do.
        max_context: most tokens of a request.
        heads_q, dim_v: HQ and DV of the layers that select, the same for all.
        q_dtype: dtype of the model's queries.
    """

    def __init__(
        self,
        config: TwilightConfig,
        kv_pool: Any,
        layer_ids: Sequence[int],
        num_request_slots: int,
        *,
        max_context: int,
        heads_q: int,
        dim_v: int,
        q_dtype: torch.dtype,
        dense_layer_ids: Sequence[int] = (),
    ) -> None:
        super().__init__(config, kv_pool, layer_ids, num_request_slots)
        requests = self.requests
        apply_notes = NotesApplier(
            self.pool.sealed, requests.p, requests.first_step, page_size=config.page_size
        )
        self.ledger = Ledger(self.pool, requests, apply_notes)
        self.next_slots = NextSlots(self.pool.sealed.device, page_size=config.page_size)
        self._max_context = max_context
        self._heads_q, self._dim_v, self._q_dtype = heads_q, dim_v, q_dtype
        self._caches = {layer: self.cache_of(layer) for layer in layer_ids}
        self._keys = [self._caches[layer].keys for layer in layer_ids]
        self._key_pointers = layer_pointers(self._keys)
        self._keys_values = {
            layer: (self.keys_of(layer), self.values_of(layer))
            for layer in (*layer_ids, *dense_layer_ids)
        }
        heads_kv, dim = self._keys[0].shape[2:]
        self._layer_token_bytes = heads_kv * (dim + dim_v) * self._keys[0].element_size()
        device = self._keys[0].device
        self._claimed = torch.zeros(self.pool.num_pages, dtype=torch.int32, device=device)
        self._num_claimed = torch.zeros(1, dtype=torch.int32, device=device)
        self._sealing_clock: torch.Tensor | None = None
        if config.telemetry:
            self._sealing_clock = torch.tensor(IDLE_CLOCK, dtype=torch.int64, device=device)
        self._buffers: list[_Buffers] = []
        self._current: _Buffers | None = None
        self._plan: DecodePlan | None = None
        self._is_dense = False  # whether no row of the step under way selects
        self._counts_rows = False  # whether the step under way writes row sums
        self._planned = 0  # steps

    def reserve(self, max_batch: int) -> None:
        """Allocate for batches of up to max_batch rows, as the largest graph has.

        A larger eager batch gets buffers of its own when one first comes.
        """
        self._buffers_for(max_batch, selects=True)

    def is_faster_dense(self, seq_lens: torch.Tensor | None, total: int | None = None) -> bool:
        """Whether a step's KV cache is too small for selection to pay.

        Args:
            seq_lens: [B] tokens of each request on the host; None where they are not known.
            total: their sum, if known, which mostly decides without a look at each.
        """
        if seq_lens is None:
            return False
        least = self.config.min_context_tokens
        if total is not None and self._is_small(total):
            return True
        if total is not None and not self._is_small(total - len(seq_lens) * max(least - 1, 0)):
            return False
        lengths = seq_lens.numpy()
        return self._is_small(int(lengths[lengths >= least].sum()))

    def _is_small(self, tokens: int) -> bool:
        """Whether so many tokens of requests that may select are too few to."""
        return tokens <= 0 or tokens * self._layer_token_bytes < self.config.min_step_mb * 1e6

    def begin_step(self, *, dense: bool) -> None:
        """Count a decode step, and audit when it is time, before it is planned."""
        self.audit_when_due()
        self.dense_steps += dense
        self._counts_rows = self.config.telemetry and not dense
        if self.counters.tokens.is_cuda:
            raw = torch._C._cuda_getCurrentRawStream(self.counters.tokens.get_device())
            if self._stream is None or raw != self._stream.cuda_stream:
                self._stream = torch.cuda.current_stream()  # an object costs microseconds

    def serves(self, layer_id: int) -> bool:
        """Whether `run_layer` takes a layer."""
        return layer_id in self._keys_values

    def begin_decode(
        self,
        req_to_token: torch.Tensor,
        request_slots: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        dense: bool = False,
    ) -> DecodePlan:
        """Snapshot a step's rows into static buffers and claim the pages it needs sealed.

        Args:
            dense: no row selects, so no page is claimed.
            Others: see `TwilightRuntime.begin_decode`.
        """
        batch = request_slots.shape[0]
        buffers = self._current = self._buffers_for(batch, selects=not dense)
        plan = buffers.plan(batch)
        self._planned += 1
        buffers.planner(
            req_to_token,
            request_slots,
            seq_lens,
            min_context_tokens=_NO_CONTEXT if dense else self.config.min_context_tokens,
            this_turn=self._planned % _TURNS,
        )
        self._plan, self._is_dense = plan, dense
        return plan

    def seal_claimed(self) -> None:
        """Build the summaries of the pages that `begin_decode` claimed."""
        seal_pages(
            self._keys,
            self._key_pointers,
            self.pool.min_max,
            self.pool.codes,
            self.pool.scale_zero,
            self._claimed,
            self._num_claimed,
            self._sealing_clock,
            centred=self.pool.centred,
        )
        self._num_claimed.zero_()

    @torch.compiler.disable
    def run_layer(
        self,
        layer_id: int,
        q: torch.Tensor,
        *,
        sm_scale: float,
        logit_cap: float,
        sinks: torch.Tensor | None,
        token: Token | None = None,
    ) -> torch.Tensor:
        """Attend in one layer: [B, HQ, D] queries to a new [B, HQ, DV] in their dtype.

        A layer that never selects, or one of a dense step, attends to all tokens.

        Args:
            token: the step's keys and values where the cache does not hold them, see
                `TritonDecode.run`.
        """
        buffers, plan = self._current, self._plan
        assert buffers is not None and plan is not None, "run_layer before begin_decode"
        out = torch.empty((*q.shape[:2], self._dim_v), dtype=q.dtype, device=q.device)
        if self._is_dense or not self.pool.has_layer(layer_id):
            attend_rows(
                q,
                *self._keys_values[layer_id],
                plan.page_ids,
                plan.seq_lens,
                buffers.workspace,
                out,
                token,
                sm_scale=sm_scale,
                logit_cap=logit_cap,
                sinks=sinks,
            )
            return out
        assert buffers.decode is not None
        row = self.pool.row_of(layer_id)
        buffers.decode.run(
            q,
            self._caches[layer_id],
            plan,
            sm_scale=sm_scale,
            logit_cap=logit_cap,
            sinks=sinks,
            out=out,
            counts=(buffers.candidate_tokens[row], buffers.kept_tokens[row]),
            masses=buffers.masses[row],
            token=token,
        )
        if self.config.telemetry and row == len(self.pool.layer_ids) - 1:
            count_step(
                buffers.candidate_tokens,
                buffers.kept_tokens,
                buffers.masses,
                plan.seq_lens,
                plan.sparse,
                buffers.pages_reused,
                self.counters.tokens,
                self.counters.kept_mass,
                self.counters.sparse_rows,
                buffers.row_sums,
                buffers.turn,
                self._sealing_clock,
                self.counters.sealing_nanoseconds,
            )
        return out

    def take_row_sums(self) -> RowSums | None:
        """See `TwilightRuntime.take_row_sums`; rows of dense requests are 0.

        The GPU may not have written them yet: read them once the step is known to have ended, as
        SGLang knows before it looks at a step's tokens, and while they are kept.
        """
        if self._counts_rows and self._current is not None and self._plan is not None:
            turn, rows = self._planned % _TURNS, len(self._plan.sparse)
            self._row_sums = self._current.row_sums_read[turn, :rows]
        self._counts_rows = False
        return super().take_row_sums()

    def row_sums_kept(self) -> Callable[[], bool]:
        """See `TwilightRuntime.row_sums_kept`: the step that many later takes their place."""
        planned = self._planned
        return lambda: self._planned < planned + _TURNS

    def _buffers_for(self, batch: int, *, selects: bool) -> _Buffers:
        """Buffers for so many rows; with the workspaces of selection where a row `selects`."""
        fitting = [buffers for buffers in self._buffers if batch <= buffers.max_batch]
        if fitting and (fitting[0].decode is not None or not selects):
            return fitting[0]
        max_batch = fitting[0].max_batch if fitting else triton.next_power_of_2(batch)
        before = torch.cuda.memory_allocated()
        try:
            if not fitting:
                fitting.append(self._allocate(max_batch))
                self._buffers.append(fitting[0])
            if selects:
                fitting[0].decode = self._allocate_decode(max_batch, fitting[0].workspace)
        except torch.OutOfMemoryError as error:
            raise TwilightError(
                f"no GPU memory is left for the workspaces of {max_batch} requests of up to "
                f"{self._max_context} tokens: lower --mem-fraction-static, --cuda-graph-max-bs, "
                "--max-running-requests or --context-length"
            ) from error
        logger.info(
            "Twilight: workspaces of up to %d requests take %.2f GB",
            max_batch,
            (torch.cuda.memory_allocated() - before) / 1e9,
        )
        return fitting[0]

    def _allocate(self, max_batch: int) -> _Buffers:
        keys = self._keys[0]
        heads_kv, device = keys.shape[2], keys.device
        shape = (max_batch, self._heads_q, heads_kv, self._dim_v)
        buffers = _Buffers(
            len(self._keys),
            max_batch,
            triton.cdiv(self._max_context, self.config.page_size),
            self._heads_q,
            heads_kv,
            AttendWorkspace(*shape, device),
            device,
        )
        buffers.planner = StepPlanner(
            self.requests.p,
            self.requests.first_step,
            self.pool.sealed,
            buffers.page_ids,
            buffers.lengths,
            buffers.p,
            buffers.sparse,
            self._claimed,
            self._num_claimed,
            self.counters.pages,
            buffers.pages_reused,
            buffers.turn,
            page_size=self.config.page_size,
        )
        return buffers

    def _allocate_decode(self, max_batch: int, workspace: AttendWorkspace) -> TritonDecode:
        keys = self._keys[0]
        heads_kv, dim = keys.shape[2:]
        return TritonDecode(
            max_batch=max_batch,
            max_context=self._max_context,
            heads_q=self._heads_q,
            heads_kv=heads_kv,
            dim=dim,
            dim_v=self._dim_v,
            selection=self.selection,
            q_dtype=self._q_dtype,
            cache_dtype=keys.dtype,
            device=keys.device,
            prune=self.selection.pruner == "top_p",
            attend_workspace=workspace,
        )
