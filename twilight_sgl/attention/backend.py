"""SGLang's view of Twilight: an attention backend for decoding."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from twilight_sgl.attention.pipeline import decode_reference
from twilight_sgl.attention.plan import DecodePlan
from twilight_sgl.attention.runtime import TwilightRuntime
from twilight_sgl.config import TwilightConfig
from twilight_sgl.errors import TwilightError
from twilight_sgl.kernels.launch import compiling_ahead
from twilight_sgl.pages.allocation import compile_extend
from twilight_sgl.patches import decode_slots
from twilight_sgl.patches.compat import attention_backend_names, parallel_layout

if TYPE_CHECKING:
    from twilight_sgl.attention.triton_runtime import TritonRuntime


class TwilightAttnBackend(AttentionBackend):
    """Decodes with Twilight in the layers that select.

    Prefill never comes here: SGLang sends it to the prefill backend. A second instance of that
    backend, the stock backend, decodes the layers that Twilight has no kernel for.
    """

    def __init__(self, model_runner: Any, runtime: TwilightRuntime) -> None:
        super().__init__()
        prefill_name, _ = attention_backend_names(model_runner.server_args)
        self.dense: AttentionBackend = ATTENTION_BACKENDS[prefill_name](model_runner)
        self.needs_cpu_seq_lens = self.dense.needs_cpu_seq_lens
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.runtime = runtime
        _, groups = parallel_layout(model_runner.server_args)
        self.data_parallel = groups > 1

    def _save(
        self, k: torch.Tensor | None, v: torch.Tensor | None, layer: Any, forward_batch: Any
    ) -> None:
        """Write the step's keys and values, unless a fused kernel has."""
        if k is not None:
            loc = KVWriteLoc(forward_batch.out_cache_loc, None)
            self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v, layer.k_scale, layer.v_scale)

    def forward_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Prefill: SGLang sends it to the prefill backend, so the dense one stands in."""
        return self.dense.forward_extend(*args, **kwargs)

    def support_triton(self) -> bool:
        """As the prefill backend."""
        return self.dense.support_triton()


class ReferenceAttnBackend(TwilightAttnBackend):
    """On a CPU: eager, with shapes that follow the batch; layers that stay dense are stock."""

    def __init__(self, model_runner: Any, runtime: TwilightRuntime) -> None:
        super().__init__(model_runner, runtime)
        self._plan: DecodePlan | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan a step: snapshot its rows and seal the pages it needs."""
        self.dense.init_forward_metadata(forward_batch)
        self._plan = None
        if forward_batch.forward_mode.is_decode():
            plan = self.runtime.begin_decode(
                self.req_to_token_pool.req_to_token,
                forward_batch.req_pool_indices,
                forward_batch.seq_lens,
            )
            if plan.sparse.any():
                self._plan = plan

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One layer of a decode step: [B, HQ * D] queries to [B, HQ * DV]."""
        plan = self._plan
        if plan is None or not self.runtime.pool.has_layer(layer.layer_id):
            return self.dense.forward_decode(
                q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs
            )
        if save_kv_cache:
            self._save(k, v, layer, forward_batch)
        result = decode_reference(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.runtime.cache_of(layer.layer_id),
            plan,
            self.runtime.selection,
            sm_scale=layer.scaling,
            logit_cap=layer.logit_cap or 0.0,
            sinks=kwargs.get("sinks"),
        )
        self.runtime.count_layer(plan, result)
        return result.output.to(q.dtype).flatten(1)


class TritonAttnBackend(TwilightAttnBackend):
    """On a GPU, inside CUDA graphs or not.

    A step either selects, with the same launches whatever the batch holds, or is dense: then every
    row attends to all of its tokens. The host decides, from the lengths it knows. Layers that never
    select run dense too, by our own kernel where their caches are like the others'; what is left
    (sliding windows, cross attention) is the stock backend's.

    Attributes:
        has_stock_layers: whether the stock backend decodes any layer.
        dense_step: whether the current step, or the one being captured, is dense.
        captures_dense: whether the next graph captured is to be of a dense step.
        has_dense_graphs: whether graphs of dense steps were captured beside the others.
    """

    runtime: "TritonRuntime"
    dense_step = False
    captures_dense = False
    has_dense_graphs = False
    _captured_size: int | None = None  # batch size of the capture before, if it was one

    def __init__(self, model_runner: Any, runtime: "TritonRuntime") -> None:
        super().__init__(model_runner, runtime)
        layers = attention_layers(model_runner.model)
        served = [layer for layer in layers if runtime.serves(layer.layer_id)]
        self.has_stock_layers = len(served) < len(layers)
        # The last that selects is among them: it counts the step.
        self._layer_of_kind = {
            (runtime.pool.has_layer(layer.layer_id), bool(layer.logit_cap)): layer
            for layer in served
        }
        self._dtype = model_runner.dtype
        self._allocator = full_attention_allocator(model_runner.token_to_kv_pool_allocator)

    @property
    def wants_dense_graphs(self) -> bool:
        """Whether some steps would be dense.

        Not under data-parallel attention, whose ranks must replay the same graph.
        """
        config = self.runtime.config
        return not self.data_parallel and (config.min_step_mb > 0 or config.min_context_tokens > 1)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what graphs of up to max_bs rows use."""
        self.dense.init_cuda_graph_state(max_bs, max_num_tokens)
        self.runtime.reserve(max_bs)

    def compile_ahead(self, batch_sizes: Sequence[int]) -> None:
        """Compile what gives prompts their pages, and what steps of these sizes launch.

        It comes before graphs of them are captured. Some of it only a call tells: where layers have
        attention sinks, or a model's own kernel writes keys and values, the kernels that differ by
        it are compiled as graphs are captured.
        """
        table = self.req_to_token_pool.req_to_token
        rows = torch.zeros(max(batch_sizes), dtype=torch.int64, device=table.device)
        with compiling_ahead():
            for batch in batch_sizes:
                for dense in (False, True) if self.wants_dense_graphs else (False,):
                    self.runtime.begin_decode(table, rows[:batch], rows[:batch], dense=dense)
                    if not dense:
                        self.runtime.seal_claimed()
                    for layer in self._layer_of_kind.values():
                        self._compile_layer(layer, batch)
            allocator, most = self._allocator, self.req_to_token_pool.size
            compile_extend(allocator.free_pages, allocator.page_size, most)

    def _compile_layer(self, layer: RadixAttention, batch: int) -> None:
        shapes = (
            (layer.tp_q_head_num, layer.qk_head_dim),
            (layer.tp_k_head_num, layer.qk_head_dim),
            (layer.tp_v_head_num, layer.v_head_dim),
        )
        device = self.req_to_token_pool.req_to_token.device
        q, k, v = (torch.empty((batch, *s), dtype=self._dtype, device=device) for s in shapes)
        self.forward_decode(q, k, v, layer, None, save_kv_cache=self._is_cache_row(k))

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """As the prefill backend; our padded rows are known by their request slot, 0."""
        return self.dense.get_cuda_graph_seq_len_fill_value()

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan an eager step, and seal the pages it needs."""
        if self.has_stock_layers or not forward_batch.forward_mode.is_decode():
            self.dense.init_forward_metadata(forward_batch)
        if forward_batch.forward_mode.is_decode():
            self.dense_step = self.wants_dense_graphs and self._is_faster_dense(forward_batch)
            self._begin(forward_batch)
            if not self.dense_step:
                self.runtime.seal_claimed()

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plan a graph's step; the graph reads the plan, never SGLang's request table."""
        # All graphs of a batch size read the metadata of its first capture: a later one's could
        # take its place (flashinfer makes a wrapper for each).
        is_first = not in_capture or forward_batch.batch_size != self._captured_size
        if is_first and self.has_stock_layers:
            self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        self._captured_size = forward_batch.batch_size if in_capture else None
        if in_capture:
            self.dense_step = self.captures_dense
        else:
            self.dense_step = self.has_dense_graphs and self._is_faster_dense(forward_batch)
        self._begin(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Seal the pages that the plan claimed."""
        if self.has_stock_layers:
            self.dense.init_forward_metadata_in_graph(forward_batch)
        if not self.dense_step:
            self.runtime.seal_claimed()

    def on_after_cuda_graph_warmup(self) -> None:
        """As the prefill backend."""
        self.dense.on_after_cuda_graph_warmup()

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One layer of a decode step: [B, HQ * D] queries to [B, HQ * DV]."""
        if not self.runtime.serves(layer.layer_id):
            return self.dense.forward_decode(
                q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs
            )
        token = None
        if save_kv_cache and k is not None and v is not None:
            if self._is_cache_row(k) and self._is_cache_row(v):
                token = k, v
            else:
                self._save(k, v, layer, forward_batch)
        fp8 = self.token_to_kv_pool.dtype == torch.float8_e4m3fn
        key_scale = (layer.k_scale_float or 1.0) if fp8 else 1.0
        value_scale = (layer.v_scale_float or 1.0) if fp8 else 1.0
        output = self.runtime.run_layer(
            layer.layer_id,
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            sm_scale=layer.scaling * key_scale,
            logit_cap=layer.logit_cap or 0.0,
            sinks=kwargs.get("sinks"),
            token=token,
        )
        if value_scale != 1.0:
            output.mul_(value_scale)
        return output.flatten(1)

    def _is_cache_row(self, new: torch.Tensor) -> bool:
        """Whether the kernels can write new keys or values [B, HK, D] as they are.

        It saves the launch that SGLang writes them by, which converts and scales too.
        """
        return new.dtype == self.token_to_kv_pool.dtype and new[:1].is_contiguous()

    def _is_faster_dense(self, forward_batch: Any) -> bool:
        return self.runtime.is_faster_dense(forward_batch.seq_lens_cpu, forward_batch.seq_lens_sum)

    def _begin(self, forward_batch: Any, in_capture: bool = False) -> None:
        # A rank that replays beside others without a request of its own shows it as a decode.
        mode = getattr(forward_batch, "actual_forward_mode", forward_batch.forward_mode)
        if not in_capture and not mode.is_idle():
            self.runtime.begin_step(dense=self.dense_step)
        self.runtime.begin_decode(
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices,
            forward_batch.seq_lens,
            dense=self.dense_step,
        )


def create_backend(model_runner: Any) -> TwilightAttnBackend:
    """Build a model runner's backend, and attach its state where the patches look for it.

    Raises:
        TwilightError: no layer of the model can select, or the kernels cannot serve its shape.
    """
    if model_runner.is_draft_worker:
        raise TwilightError(
            "Twilight does not serve draft models: name another backend for them with "
            "--speculative-draft-attention-backend"
        )
    config = TwilightConfig.from_environment()
    layers = selecting_layers(model_runner.model, config)
    if not layers:
        raise TwilightError(
            "no layer of this model can select: all are skipped (--twilight-skip-layers), have a "
            "sliding window or are no plain decoder attention; use another decode backend"
        )
    table = model_runner.req_to_token_pool.req_to_token
    pool = model_runner.token_to_kv_pool
    backend: TwilightAttnBackend
    if table.is_cuda:
        from twilight_sgl.attention.triton_runtime import TritonRuntime

        shapes = {(layer.tp_q_head_num, layer.v_head_dim) for layer in layers.values()}
        if len(shapes) > 1:
            raise TwilightError(
                f"layers that select differ in (query heads, value dim): {sorted(shapes)}; skip "
                "those of all but one shape with --twilight-skip-layers"
            )
        heads_q, dim_v = shapes.pop()
        dense_layers = [
            layer
            for layer, module in full_attention_layers(model_runner.model).items()
            if layer not in layers
            and (module.tp_q_head_num, module.v_head_dim) == (heads_q, dim_v)
            and pool.get_key_buffer(layer).shape == pool.get_key_buffer(min(layers)).shape
        ]
        runtime = TritonRuntime(
            config,
            pool,
            list(layers),
            table.shape[0],
            max_context=longest_context(model_runner),
            heads_q=heads_q,
            dim_v=dim_v,
            q_dtype=model_runner.dtype,
            dense_layer_ids=dense_layers,
        )
        backend = TritonAttnBackend(model_runner, runtime)
        decode_slots.log_if_left_alone()
    else:
        cpu_runtime = TwilightRuntime(config, pool, list(layers), table.shape[0])
        backend = ReferenceAttnBackend(model_runner, cpu_runtime)
    # Sums would not reach the stage that answers; HTTP workers load no plugin to read them.
    args = model_runner.server_args
    if args.pp_size > 1 or args.tokenizer_worker_num > 1:
        backend.runtime.reports_requests = False
    model_runner.twilight = backend.runtime
    model_runner.req_to_token_pool.twilight = backend.runtime
    full_attention_allocator(model_runner.token_to_kv_pool_allocator).twilight = backend.runtime
    return backend


def longest_context(model_runner: Any) -> int:
    """Tokens that a request can have while it decodes.

    SGLang's table of KV slots is a few columns wider than that, which would double the power of
    two that kernels pad its pages to.
    """
    width: int = model_runner.req_to_token_pool.req_to_token.shape[1]
    return min(width, model_runner.model_config.context_len)


def full_attention_allocator(allocator: Any) -> Any:
    """The allocator of full-attention pages, of the two that a sliding-window model has."""
    return getattr(allocator, "full_attn_allocator", allocator)


def attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    """All attention layers over a KV cache."""
    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def full_attention_layers(model: torch.nn.Module) -> dict[int, RadixAttention]:
    """The layers of plain decoder attention over the whole context, by id, in order."""
    layers = {
        layer.layer_id: layer
        for layer in attention_layers(model)
        if not layer.is_cross_attention
        and layer.attn_type == AttentionType.DECODER
        and not layer.use_irope
        and (layer.sliding_window_size is None or layer.sliding_window_size < 0)
    }
    return dict(sorted(layers.items()))


def selecting_layers(model: torch.nn.Module, config: TwilightConfig) -> dict[int, RadixAttention]:
    """The layers that select, by id: those of full attention that are not to be skipped."""
    layers = full_attention_layers(model)
    return {layer: layers[layer] for layer in layers if layer not in config.skip_layers}
