"""Everything Twilight keeps for one model runner, and what it does once a step."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from twilight_sgl.attention.plan import DecodePlan, LayerCache, Selection
from twilight_sgl.config import TwilightConfig
from twilight_sgl.kernels.plan.reference import plan_rows
from twilight_sgl.pages.audit import Violation, audit
from twilight_sgl.pages.ledger import Ledger, RequestTable
from twilight_sgl.pages.pool import SummaryPool, bounds_dtype
from twilight_sgl.pages.sealing import pages_needed
from twilight_sgl.request import RequestOptions

logger = logging.getLogger(__name__)


class TwilightRuntime:
    """Summaries, request values and counters of one model runner.

    `on_*` methods are called by the scheduler's thread and only queue; `begin_*` methods run on
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
        )
        self.requests = RequestTable(num_request_slots, config.p, keys.device)
        self.ledger = Ledger(self.pool, self.requests)
        self.pages_built = 0
        self.pages_reused = 0
        self.audit_checks = 0
        self.audit_violations = 0
        self.mixed_rows = 0
        self._decode_steps = 0
        self.dense_steps = 0
        # context, candidate and kept tokens, over sparse steps, layers and KV heads
        self._budget = torch.zeros(3, dtype=torch.int64, device=keys.device)
        logger.info(
            "Twilight: %s; page summaries of %d layers take %.2f GB",
            config,
            len(self.pool.layer_ids),
            self.pool.nbytes / 1e9,
        )

    def keys_of(self, layer_id: int) -> torch.Tensor:
        """A layer's keys by page: [P, PS, HK, D], a view of SGLang's pool."""
        return self._by_page(self._kv_pool.get_key_buffer(layer_id))

    def cache_of(self, layer_id: int) -> LayerCache:
        """A layer's KV cache and summaries."""
        values = self._by_page(self._kv_pool.get_value_buffer(layer_id))
        return LayerCache(self.keys_of(layer_id), values, *self.pool.of_layer(layer_id))

    def on_requests_admitted(self, slots: Iterable[int], options: Iterable[RequestOptions]) -> None:
        """Requests were given slots: their p applies from the next forward on."""
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

    def begin_extend(self, token_slots: torch.Tensor) -> None:
        """An extend is about to write these slots, [M]: their pages are sealed no longer."""
        self.pool.unseal(token_slots // self.config.page_size)

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

    def count_budget(
        self, plan: DecodePlan, candidate_tokens: torch.Tensor, kept_tokens: torch.Tensor
    ) -> None:
        """Add one layer's budgets, [B, HK] each, of the plan's sparse rows."""
        heads_kv = kept_tokens.shape[1]
        context = plan.seq_lens.unsqueeze(1).expand(-1, heads_kv)
        counts = torch.stack((context, candidate_tokens, kept_tokens))
        self._budget += (counts * plan.sparse.view(1, -1, 1)).sum((1, 2))

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

    def state(self) -> dict[str, Any]:
        """Configuration and totals, as `/server_info` shows them. Synchronises."""
        built, reused = self.page_totals()
        context, candidates, kept = self._budget.tolist()
        return {
            "config": self.config.to_dict(),
            "pages": {
                "capacity": self.pool.num_pages - 1,
                "sealed": int(self.pool.sealed.sum()),
                "built": built,
                "reused": reused,
            },
            "budget": {
                "context_tokens": context,
                "candidate_tokens": candidates,
                "kept_tokens": kept,
                "mixed_rows": self.mixed_rows,
            },
            "steps": {"decode": self._decode_steps, "dense": self.dense_steps},
            "audit": {"checks": self.audit_checks, "violations": self.audit_violations},
        }

    def page_totals(self) -> tuple[int, int]:
        """Pages built, and pages that requests found built when they first were sparse."""
        return self.pages_built, self.pages_reused

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
            self.pool.seal(needed.to_seal, self.keys_of)
        self.pages_built += needed.to_seal.numel()
        self.pages_reused += needed.reused
        self.requests.first_step[rows[plan.sparse]] = False

    def _value_of(self, options: RequestOptions) -> float:
        if not options.enabled:
            return RequestTable.DENSE
        return self.config.p if options.p is None else options.p

    def _by_page(self, cache: torch.Tensor) -> torch.Tensor:
        return cache.unflatten(0, (-1, self.config.page_size))
