"""The decode pipeline of one layer in Triton, without allocation or synchronisation."""

from collections.abc import Callable

import torch
import triton

from twilight_sgl.attention.pipeline import LayerOutput
from twilight_sgl.attention.plan import DecodePlan, LayerCache, Selection
from twilight_sgl.attention.selectors.boxes import SLACK
from twilight_sgl.kernels.attend.triton import AttendWorkspace, attend
from twilight_sgl.kernels.decode.triton import decode_layer
from twilight_sgl.kernels.estimate.triton import estimate_logits
from twilight_sgl.kernels.launch import is_interpreted
from twilight_sgl.kernels.row import Token
from twilight_sgl.kernels.select.triton import budget_table, max_candidate_pages, select_pages
from twilight_sgl.kernels.top_p.triton import (
    BISECTION_STEPS,
    top_p_thresholds,
    union_chunks,
    unite_kept,
)

HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (16, 32, 64)
MAX_GROUP = 16
MAX_PAGES = 32768
MOST_CANDIDATES = 16384  # tokens that a program can weigh in its registers
MOST_PAIRS = 16  # (request, KV head)s up to which one launch is no slower on a served model
CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def supports(
    *,
    heads_q: int,
    heads_kv: int,
    dim: int,
    dim_v: int,
    page_size: int,
    q_dtype: torch.dtype,
    cache_dtype: torch.dtype,
    max_context: int,
    device: torch.device,
) -> tuple[bool, str]:
    """Whether the Triton pipeline can serve a model, and if not, why."""
    interpreted = is_interpreted()
    if device.type != "cuda" and not interpreted:
        return False, f"needs a CUDA device, got {device}"
    if heads_q % heads_kv or heads_q // heads_kv > MAX_GROUP:
        return False, f"needs 1 to {MAX_GROUP} query heads a KV head, got {heads_q} / {heads_kv}"
    if dim not in HEAD_DIMS or dim_v not in HEAD_DIMS:
        return False, f"head dims are one of {HEAD_DIMS}, got {dim} and {dim_v}"
    if page_size not in PAGE_SIZES:
        return False, f"page size is one of {PAGE_SIZES}, got {page_size}"
    if triton.cdiv(max_context, page_size) > MAX_PAGES:
        return False, f"at most {MAX_PAGES} pages a request, got {max_context} tokens of context"
    float32 = q_dtype == cache_dtype == torch.float32
    if not float32 and q_dtype not in (torch.bfloat16, torch.float16):
        return False, f"queries are bfloat16 or float16, got {q_dtype}"
    if not float32 and cache_dtype not in CACHE_DTYPES:
        return False, f"the KV cache is one of {CACHE_DTYPES}, got {cache_dtype}"
    if cache_dtype in (torch.bfloat16, torch.float16) and cache_dtype != q_dtype:
        return False, f"queries are {q_dtype}, the KV cache {cache_dtype}"
    if cache_dtype == torch.float8_e4m3fn and not interpreted:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            return False, f"float8 needs compute capability 8.9, the GPU has {capability}"
    return True, ""


class TritonDecode:
    """Runs the decode pipeline of layers that share one shape, from static workspaces.

    Every call launches the same grids on the same memory whatever the plan says, so it can be
    captured in a CUDA graph, and gives the same bits each time. The workspaces hold no state
    between calls: one object serves all layers and batch sizes of a stream.

    Args:
        max_batch: most requests of a plan.
        max_context: most tokens of a request.
        heads_q, heads_kv, dim, dim_v: HQ, HK, D, DV.
        selection: what to keep; its `estimator` chooses INT4 or exact keys.
        device: where the KV pool lives.
        prune: False attends to every candidate (the selector alone, no top-p).
        logits_dtype: in which estimated logits are kept; float16 rounds them to 11 bits.
        top_p_steps: halvings of the search for the threshold, see `top_p_thresholds`.
        one_launch: whether to run `decode_layer` instead of a launch a stage; None chooses the
            faster of the two for each batch.
        attend_workspace: for so many rows, where other kernels of the stream use one too.

    Raises:
        ValueError: the shape or the selector is not supported.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_context: int,
        heads_q: int,
        heads_kv: int,
        dim: int,
        dim_v: int,
        selection: Selection,
        q_dtype: torch.dtype,
        cache_dtype: torch.dtype,
        device: torch.device | str,
        prune: bool = True,
        logits_dtype: torch.dtype = torch.float16,
        top_p_steps: int = BISECTION_STEPS,
        one_launch: bool | None = None,
        attend_workspace: AttendWorkspace | None = None,
    ) -> None:
        device = torch.device(device)
        ok, reason = supports(
            heads_q=heads_q,
            heads_kv=heads_kv,
            dim=dim,
            dim_v=dim_v,
            page_size=selection.page_size,
            q_dtype=q_dtype,
            cache_dtype=cache_dtype,
            max_context=max_context,
            device=device,
        )
        if not ok:
            raise ValueError(f"the Triton decode pipeline {reason}")
        if selection.selector not in SLACK:
            raise ValueError(
                f"the Triton decode pipeline has no kernel for the selector {selection.selector!r}"
            )
        self.selection = selection
        self.slack = SLACK[selection.selector]
        self.prune = prune
        self.max_batch = max_batch
        self.columns = triton.cdiv(max_context, selection.page_size)
        self.top_p_steps = top_p_steps
        self.one_launch = one_launch
        self._use_codes = prune and selection.estimator != "exact"
        page_size = selection.page_size
        width = max_candidate_pages(
            self.columns,
            selection.budget,
            page_size,
            selection.min_candidate_tokens,
            selection.sink_tokens,
            selection.recent_tokens,
        )

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        pairs = (max_batch, heads_kv)
        self.rank_keys = empty(*pairs, self.columns, dtype=torch.int32)
        self.candidate_page_ids = empty(*pairs, width, dtype=torch.int32)
        self.positions = empty(*pairs, width, dtype=torch.int32)
        self.counts = empty(*pairs, dtype=torch.int32)
        self.candidate_tokens = empty(*pairs, dtype=torch.int32)
        self.kept_tokens = empty(*pairs, dtype=torch.int32)
        self.budgets = budget_table(
            self.columns, selection.budget, page_size, selection.min_candidate_tokens, device
        )
        self.out = empty(max_batch, heads_q, dim_v, dtype=q_dtype)
        self.attend_workspace = attend_workspace or AttendWorkspace(
            max_batch, heads_q, heads_kv, dim_v, device
        )
        self.masses = torch.ones((max_batch, heads_q), device=device)
        self.logits = self.thresholds = self.q_codes = self.q_scale_sum = self.middles = None
        self.kept_token_slots = self.chunk_counts = None
        if prune:
            capacity = width * page_size
            self.kept_token_slots = empty(*pairs, capacity, dtype=torch.int32)
            self.chunk_counts = empty(*pairs, union_chunks(capacity), dtype=torch.int32)
            self.logits = empty(max_batch, heads_q, width * page_size, dtype=logits_dtype)
            self.thresholds = empty(max_batch, heads_q, dtype=torch.float32)
        if self._use_codes:
            self.q_codes = empty(max_batch, heads_q, 2, dim, dtype=torch.int8)
            self.q_scale_sum = empty(max_batch, heads_q, 2, dtype=torch.float32)
        if self._use_codes and selection.centred:
            group_rows = triton.next_power_of_2(heads_q // heads_kv)
            self.middles = empty(*pairs, self.columns, group_rows, dtype=torch.float32)

    def run(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        plan: DecodePlan,
        *,
        sm_scale: float,
        logit_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        counts: tuple[torch.Tensor, torch.Tensor] | None = None,
        masses: torch.Tensor | None = None,
        token: Token | None = None,
    ) -> LayerOutput:
        """Run one layer; what `decode_reference` computes.

        Args:
            q: [B, HQ, D], last dimension contiguous.
            cache: the layer's KV cache, and summaries of every full page that a sparse row of
                the plan names.
            sinks: [HQ] learned attention sinks, see `attend`.
            out: [B, HQ, DV] for the output; the object's own memory by default.
            counts: [>= B, HK] int32 each, for the candidate and the kept tokens; likewise.
            masses: [>= B, HQ] float32, for the kept mass of sparse rows; likewise.
            token: this step's keys and values, to be written into the cache first; None where it
                holds them.
        Returns:
            Output in q's dtype, zeros for padded rows. The three tensors are overwritten by the
            next call that writes to the same memory.
        """
        out = self.out[: q.shape[0]] if out is None else out
        counts = (self.candidate_tokens, self.kept_tokens) if counts is None else counts
        masses = self.masses if masses is None else masses
        stages = self.stages(
            q,
            cache,
            plan,
            out,
            sm_scale=sm_scale,
            logit_cap=logit_cap,
            sinks=sinks,
            counts=counts,
            masses=masses,
            token=token,
        )
        for launch in stages.values():
            launch()
        batch = q.shape[0]
        return LayerOutput(out, counts[0][:batch], counts[1][:batch], masses[:batch])

    def _runs_in_one_launch(self, batch: int) -> bool:
        """Whether a batch of this size takes `decode_layer`."""
        if not self.prune:
            return False
        if self.one_launch is not None:
            return self.one_launch
        capacity = self.candidate_page_ids.shape[-1] * self.selection.page_size
        return batch * self.counts.shape[1] <= MOST_PAIRS and capacity <= MOST_CANDIDATES

    def stages(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        plan: DecodePlan,
        out: torch.Tensor,
        *,
        sm_scale: float,
        logit_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        counts: tuple[torch.Tensor, torch.Tensor] | None = None,
        masses: torch.Tensor | None = None,
        token: Token | None = None,
    ) -> dict[str, Callable[[], None]]:
        """The launches of `run` by name, in order, for benchmarks to time one by one."""
        batch = q.shape[0]
        if batch > self.max_batch or plan.page_ids.shape[-1] > self.columns:
            raise ValueError(
                f"a plan of {batch} rows x {plan.page_ids.shape[-1]} pages does not fit "
                f"max_batch {self.max_batch} x {self.columns} pages"
            )
        selection = self.selection
        columns = plan.page_ids.shape[-1]
        rank_keys = self.rank_keys[:batch, :, :columns]
        middles = None if self.middles is None else self.middles[:batch, :, :columns]
        positions = self.positions[:batch]
        page_counts = self.counts[:batch]
        candidate_page_ids = self.candidate_page_ids[:batch]
        totals = (self.candidate_tokens, self.kept_tokens) if counts is None else counts
        candidate_tokens, kept_tokens = totals[0][:batch], totals[1][:batch]
        kept_mass = (self.masses if masses is None else masses)[:batch]
        logits = None if self.logits is None else self.logits[:batch]
        thresholds = None if self.thresholds is None else self.thresholds[:batch]
        q_codes = None if self.q_codes is None else self.q_codes[:batch]
        q_scale_sum = None if self.q_scale_sum is None else self.q_scale_sum[:batch]
        chunk_counts = None if self.chunk_counts is None else self.chunk_counts[:batch]
        lists = candidate_page_ids
        if self.kept_token_slots is not None:
            lists = self.kept_token_slots[:batch]
        launches: dict[str, Callable[[], None]] = {}
        if self._runs_in_one_launch(batch) and logits is not None and thresholds is not None:
            launches["decode"] = lambda: decode_layer(
                q,
                cache.keys,
                cache.values,
                cache.min_max,
                cache.codes if self._use_codes else None,
                cache.scale_zero if self._use_codes else None,
                plan.page_ids,
                plan.seq_lens,
                plan.sparse,
                plan.p,
                self.budgets,
                rank_keys,
                middles,
                candidate_page_ids,
                positions,
                page_counts,
                candidate_tokens,
                kept_tokens,
                logits,
                thresholds,
                kept_mass,
                lists,
                self.attend_workspace,
                out,
                token,
                sink_tokens=selection.sink_tokens,
                recent_tokens=selection.recent_tokens,
                steps=self.top_p_steps,
                slack=self.slack,
                sm_scale=sm_scale,
                logit_cap=logit_cap,
                sinks=sinks,
            )
            return launches
        launches["select"] = lambda: select_pages(
            q,
            cache.min_max,
            plan.page_ids,
            plan.seq_lens,
            plan.sparse,
            self.budgets,
            rank_keys,
            middles,
            candidate_page_ids,
            positions,
            page_counts,
            candidate_tokens,
            kept_tokens,
            q_codes,
            q_scale_sum,
            chunk_counts,
            out,
            cache.keys,
            cache.values,
            token,
            page_size=selection.page_size,
            sink_tokens=selection.sink_tokens,
            recent_tokens=selection.recent_tokens,
            slack=self.slack,
        )
        if logits is not None and thresholds is not None and chunk_counts is not None:
            launches["estimate"] = lambda: estimate_logits(
                q,
                cache.keys,
                cache.codes if self._use_codes else None,
                cache.scale_zero if self._use_codes else None,
                q_codes,
                q_scale_sum,
                middles,
                positions,
                candidate_page_ids,
                page_counts,
                plan.seq_lens,
                logits,
                sm_scale=sm_scale,
                logit_cap=logit_cap,
            )
            launches["top_p"] = lambda: top_p_thresholds(
                logits,
                plan.p,
                page_counts,
                candidate_tokens,
                thresholds,
                kept_mass,
                steps=self.top_p_steps,
            )
            launches["union"] = lambda: unite_kept(
                logits,
                thresholds,
                plan.seq_lens,
                candidate_page_ids,
                positions,
                page_counts,
                candidate_tokens,
                lists,
                kept_tokens,
                chunk_counts,
                page_size=selection.page_size,
                sink_tokens=selection.sink_tokens,
                recent_tokens=selection.recent_tokens,
            )
        launches["attend"] = lambda: attend(
            q,
            cache.keys,
            cache.values,
            plan.page_ids,
            plan.sparse,
            lists,
            kept_tokens,
            self.attend_workspace,
            out,
            lists_tokens=self.prune,
            sm_scale=sm_scale,
            logit_cap=logit_cap,
            sinks=sinks,
        )
        return launches
