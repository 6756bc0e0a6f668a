"""SGLang's view of Twilight: an attention backend for decoding."""

from typing import Any

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
from twilight_sgl.patches.compat import attention_backend_names


class TwilightAttnBackend(AttentionBackend):
    """Decodes with Twilight in the layers that select, and with a stock backend in the others.

    Prefill never comes here: SGLang sends it to the prefill backend, which also serves the layers
    that stay dense (skipped ones, sliding windows, cross attention).
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        prefill_name, _ = attention_backend_names(model_runner.server_args)
        self.dense: AttentionBackend = ATTENTION_BACKENDS[prefill_name](model_runner)
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.runtime = create_runtime(model_runner)
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
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(
                layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v
            )
        result = decode_reference(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.runtime.cache_of(layer.layer_id),
            plan,
            self.runtime.selection,
            sm_scale=layer.scaling,
            logit_cap=layer.logit_cap or 0.0,
        )
        self.runtime.count_budget(plan, result.candidate_tokens, result.kept_tokens)
        return result.output.to(q.dtype).flatten(1)

    def forward_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Prefill: SGLang sends it to the prefill backend, so the dense one stands in."""
        return self.dense.forward_extend(*args, **kwargs)

    def support_triton(self) -> bool:
        """As the prefill backend."""
        return self.dense.support_triton()


def create_runtime(model_runner: Any) -> TwilightRuntime:
    """Build a model runner's Twilight state and attach it where the patches look for it.

    Raises:
        TwilightError: no layer of the model can select.
    """
    config = TwilightConfig.from_environment()
    layer_ids = selecting_layers(model_runner.model, config)
    if not layer_ids:
        raise TwilightError(
            "no layer of this model can select: all are skipped (--twilight-skip-layers), have a "
            "sliding window or are no plain decoder attention; use another decode backend"
        )
    runtime = TwilightRuntime(
        config,
        model_runner.token_to_kv_pool,
        layer_ids,
        model_runner.req_to_token_pool.req_to_token.shape[0],
    )
    model_runner.twilight = runtime
    model_runner.req_to_token_pool.twilight = runtime
    full_attention_allocator(model_runner.token_to_kv_pool_allocator).twilight = runtime
    return runtime


def full_attention_allocator(allocator: Any) -> Any:
    """The allocator of full-attention pages, of the two that a sliding-window model has."""
    return getattr(allocator, "full_attn_allocator", allocator)


def selecting_layers(model: torch.nn.Module, config: TwilightConfig) -> list[int]:
    """Ids of the layers that select: plain decoder attention over the whole context."""
    layers = {
        module.layer_id
        for module in model.modules()
        if isinstance(module, RadixAttention)
        and not module.is_cross_attention
        and module.attn_type == AttentionType.DECODER
        and not module.use_irope
        and (module.sliding_window_size is None or module.sliding_window_size < 0)
    }
    return sorted(layers - set(config.skip_layers))
