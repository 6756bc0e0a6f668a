"""Everything Twilight keeps for one model runner, and what it does once a step."""

import functools
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

import twilight_sgl
from twilight_sgl.attention.pipeline import LayerOutput
from twilight_sgl.attention.plan import DecodePlan, LayerCache, Selection
from twilight_sgl.config import TwilightConfig
from twilight_sgl.kernels.count.reference import ROW_SUMS, count_step
from twilight_sgl.kernels.plan.reference import plan_rows
from twilight_sgl.pages.audit import Violation, audit
from twilight_sgl.pages.ledger import Ledger, RequestTable
from twilight_sgl.pages.pool import SummaryPool, bounds_dtype
from twilight_sgl.pages.sealing import pages_needed
from twilight_sgl.request import RequestOptions
from twilight_sgl.telemetry.counters import Counters, HostTotals
from twilight_sgl.telemetry.report import Reports, RequestReport, RowSums
from twilight_sgl.telemetry.snapshot import Snapshot

logger = logging.getLogger(__name__)

PACKAGES = ("sglang", "torch", "triton")


@functools.cache
def installed_versions() -> dict[str, str | None]:
    """Versions by package, of Twilight and what it runs on; None for one without metadata."""
    versions: dict[str, str | None] = {"twilight_sgl": twilight_sgl.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


class TwilightRuntime:
    """Summaries, request values and counters of one model runner.

    `on_*` methods are called by the scheduler's thread and only note; `begin_*` methods run on
    the forward stream.

    Args:
        config: the resolved configuration; its page size is the KV pool's.
        kv_pool: SGLang's KV pool (`get_key_buffer`, `get_value_buffer`).
        layer_ids: the layers that select; the others stay dense and have no summaries.
        num_request_slots: rows of SGLang's request table, the padding row included.
    """

    def __init__(
        self,
        config: TwilightConfig,
        kv_pool: Any,
        layer_ids: Sequence[int],
        num_request_slots: int,
    ) -> None:
        self.config = config
        self.selection = Selection(
            page_size=config.page_size,
            budget=config.selector_budget,
            sink_tokens=config.sink_tokens,
            recent_tokens=config.recent_tokens,
            estimator=config.estimator,
            pruner=config.pruner,
            selector=config.selector,
            min_candidate_tokens=config.min_candidate_tokens,
        )
        self._kv_pool = kv_pool
        keys = kv_pool.get_key_buffer(layer_ids[0])
        _, heads_kv, dim = keys.shape
        self.pool = SummaryPool(
            layer_ids=layer_ids,
            num_pages=keys.shape[0] // config.page_size,
            page_size=config.page_size,
            heads_kv=heads_kv,
            dim=dim,
            dtype=bounds_dtype(config.bounds, keys.dtype),
            device=keys.device,
            has_codes=config.keeps_int4_keys,
            centred=self.selection.centred,
        )
        self.requests = RequestTable(num_request_slots, config.p, keys.device)
        self.ledger = Ledger(self.pool, self.requests)
        self.counters = Counters(
            self.pool.layer_ids, heads_kv, self.pool.num_pages - 1, keys.device
        )
        self.audit_checks = 0
        self.audit_violations = 0
        self.mixed_rows = 0
        self._decode_steps = 0
        self.dense_steps = 0
        self.reports_requests = config.telemetry
        self.reports = Reports()
        self._stream: torch.cuda.Stream | None = None  # the forward stream, once known
        self._layer_outputs: list[LayerOutput] = []
        self._pages_reused_by_row = torch.zeros(0, dtype=torch.int32)
        self._row_sums: RowSums | None = None
        logger.info(
            "Twilight: %s; page summaries of %d layers take %.2f GB",
            config,
            len(self.pool.layer_ids),
            self.pool.nbytes / 1e9,
        )

    def keys_of(self, layer_id: int) -> torch.Tensor:
        """A layer's keys by page: [P, PS, HK, D], a view of SGLang's pool."""
        return self._by_page(self._kv_pool.get_key_buffer(layer_id))

    def values_of(self, layer_id: int) -> torch.Tensor:
        """A layer's values by page: [P, PS, HK, DV], a view of SGLang's pool."""
        return self._by_page(self._kv_pool.get_value_buffer(layer_id))

    def cache_of(self, layer_id: int) -> LayerCache:
        """A layer's KV cache and summaries."""
        summaries = self.pool.of_layer(layer_id)
        return LayerCache(self.keys_of(layer_id), self.values_of(layer_id), *summaries)

    def on_requests_admitted(self, slots: Iterable[int], options: Iterable[RequestOptions]) -> None:
        """Requests were given slots: their p applies from the next decode step on."""
        values = (self._value_of(option) for option in options)
        self.ledger.requests_admitted(zip(slots, values, strict=True))

    def on_dense_step(
        self, context_tokens: Iterable[int], options: Iterable[RequestOptions]
    ) -> None:
        """Requests decode in a prefill step: count those that would have been sparse.

        Args:
            context_tokens: of each request, the token being decoded included.
            options: what each asked for.
        """
        least = max(self.config.min_context_tokens, 1)
        self.mixed_rows += sum(
            option.enabled and tokens >= least
            for tokens, option in zip(context_tokens, options, strict=True)
        )

    def begin_decode(
        self, req_to_token: torch.Tensor, request_slots: torch.Tensor, seq_lens: torch.Tensor
    ) -> DecodePlan:
        """Snapshot a decode step's rows and seal the pages it needs.

        Args:
            req_to_token: [S, N] int32, SGLang's table of KV slots.
            request_slots: [B] rows of it; 0 for padding.
            seq_lens: [B] tokens, the one being decoded included.
        """
        self.audit_when_due()
        self._layer_outputs, self._row_sums = [], None
        plan = DecodePlan(
            *plan_rows(
                req_to_token,
                request_slots,
                seq_lens,
                self.requests.p,
                page_size=self.config.page_size,
                min_context_tokens=self.config.min_context_tokens,
            )
        )
        self._seal(plan, request_slots.long())
        return plan

    def audit_when_due(self) -> None:
        """Count a decode step, and audit every `audit_interval` of them, before it is planned."""
        self._decode_steps += 1
        if self.config.audit_interval and self._decode_steps % self.config.audit_interval == 0:
            self.run_audit()

    def count_layer(self, plan: DecodePlan, result: LayerOutput) -> None:
        """Note what a layer did; the last one that selects adds the step to the totals."""
        if not self.config.telemetry:
            return
        self._layer_outputs.append(result)
        if len(self._layer_outputs) < len(self.pool.layer_ids):
            return
        outputs, self._layer_outputs = self._layer_outputs, []
        row_sums = torch.zeros((len(plan.sparse), len(ROW_SUMS)), dtype=torch.float64)
        self._row_sums = row_sums.numpy()
        count_step(
            torch.stack([output.candidate_tokens for output in outputs]),
            torch.stack([output.kept_tokens for output in outputs]),
            torch.stack([output.kept_mass for output in outputs]),
            plan.seq_lens,
            plan.sparse,
            self._pages_reused_by_row,
            self.counters.tokens,
            self.counters.kept_mass,
            self.counters.sparse_rows,
            row_sums,
        )

    def report_for(self, req: Any, options: RequestOptions) -> RequestReport | None:
        """A report that `reports` fills for a request; None for no report."""
        if not self.reports_requests:
            return None
        p = self._value_of(options) if options.enabled else None
        return RequestReport(req, p, self.counters.kept_mass.numel(), self.reports.settle)

    def take_row_sums(self) -> RowSums | None:
        """The last step's sums of each row, once.

        Returns:
            [B, 5] float64 on the host, `kernels.count.reference.ROW_SUMS`; None if no row of the
            step was sparse, or where requests get no report.
        """
        sums, self._row_sums = self._row_sums, None
        return sums if self.reports_requests else None

    def row_sums_kept(self) -> Callable[[], bool]:
        """What tells later whether the sums that were just taken have not been overwritten."""
        return lambda: True

    def run_audit(self) -> list[Violation]:
        """Check the seal invariant now; count, log and unseal the pages that break it."""
        violations = audit(self.pool, self.keys_of)
        self.audit_checks += 1
        self.audit_violations += len(violations)
        for violation in violations:
            logger.error(
                "Twilight audit: page %d, layer %d: %s differ from the page's keys; "
                "the keys were written after the page was sealed",
                violation.page_id,
                violation.layer_id,
                " and ".join(violation.fields),
            )
        if violations:
            device = self.pool.sealed.device
            self.pool.unseal(torch.tensor([v.page_id for v in violations], device=device))
        return violations

    def snapshot(self) -> Snapshot:
        """The totals now, after every step launched so far. Synchronises."""
        with torch.cuda.stream(self._stream):
            return self.counters.read(self.pool.sealed, self._host_totals())

    def poll_snapshot(self) -> Snapshot | None:
        """The newest totals that have reached the host, without waiting for any.

        For the scheduler's thread, about once a second: each call asks for newer totals. On a GPU
        the first calls return None; so do all without telemetry.
        """
        if not self.config.telemetry:
            return None
        with torch.cuda.stream(self._stream):
            return self.counters.poll(self.pool.sealed, self._host_totals())

    def state(self) -> dict[str, Any]:
        """Configuration, versions and totals, as `/server_info` shows them. Synchronises."""
        return {
            "config": self.config.to_dict(),
            "versions": installed_versions(),
            **self.snapshot().to_dict(),
        }

    def _host_totals(self) -> HostTotals:
        return HostTotals(
            time=time.time(),
            decode_steps=self._decode_steps,
            dense_steps=self.dense_steps,
            mixed_rows=self.mixed_rows,
            audit_checks=self.audit_checks,
            audit_violations=self.audit_violations,
        )

    @property
    def pages_built(self) -> int:
        """Summaries built. Synchronises."""
        return int(self.counters.pages[0])

    @property
    def pages_reused(self) -> int:
        """Pages that requests found built when they first were sparse. Synchronises."""
        return int(self.counters.pages[1])

    def _seal(self, plan: DecodePlan, rows: torch.Tensor) -> None:
        if not plan.sparse.any():
            return
        first_step = self.requests.first_step[rows]
        needed = pages_needed(
            plan.page_ids,
            plan.seq_lens,
            plan.sparse,
            first_step,
            self.pool.sealed,
            self.config.page_size,
        )
        if needed.to_seal.numel():
            began = time.perf_counter_ns()
            self.pool.seal(needed.to_seal, self.keys_of)
            self.counters.sealing_nanoseconds += time.perf_counter_ns() - began
        self.counters.pages[0] += needed.to_seal.numel()
        self.counters.pages[1] += needed.reused
        self._pages_reused_by_row = needed.reused_by_row
        self.requests.first_step[rows[plan.sparse]] = False

    def _value_of(self, options: RequestOptions) -> float:
        if not options.enabled:
            return RequestTable.DENSE
        return self.config.p if options.p is None else options.p

    def _by_page(self, cache: torch.Tensor) -> torch.Tensor:
        return cache.unflatten(0, (-1, self.config.page_size))
