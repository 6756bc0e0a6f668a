"""Dense decode attention, of other libraries and our own, as calls on a layer of the benchmark."""

from collections.abc import Callable

import torch

from twilight_sgl.attention.plan import DecodePlan, LayerCache
from twilight_sgl.kernels.attend.rows import attend_rows
from twilight_sgl.kernels.attend.triton import AttendWorkspace

Baseline = Callable[[torch.Tensor, LayerCache, DecodePlan, float], Callable[[], torch.Tensor]]
_TRITON_KV_SPLITS = 8  # SGLang's default --triton-attention-num-kv-splits
_FLASHINFER_WORKSPACE_BYTES = 128 << 20  # what its documentation recommends


def own_dense(
    q: torch.Tensor, cache: LayerCache, plan: DecodePlan, sm_scale: float
) -> Callable[[], torch.Tensor]:
    """What our backend runs where nothing selects; it writes each row's newest token, as it is."""
    page_size, heads_kv, dim_v = cache.values.shape[1:]
    newest = plan.seq_lens.long() - 1
    page = plan.page_ids.gather(1, (newest // page_size).unsqueeze(1)).squeeze(1).long()
    token = cache.keys[page, newest % page_size], cache.values[page, newest % page_size]
    workspace = AttendWorkspace(q.shape[0], q.shape[1], heads_kv, dim_v, q.device)
    out = torch.empty(*q.shape[:2], dim_v, dtype=q.dtype, device=q.device)

    def call() -> torch.Tensor:
        attend_rows(
            q,
            cache.keys,
            cache.values,
            plan.page_ids,
            plan.seq_lens,
            workspace,
            out,
            token,
            sm_scale=sm_scale,
        )
        return out

    return call


def fa3(
    q: torch.Tensor, cache: LayerCache, plan: DecodePlan, sm_scale: float
) -> Callable[[], torch.Tensor]:
    """FlashAttention-3 from sgl_kernel, over pages."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    def call() -> torch.Tensor:
        return flash_attn_with_kvcache(
            q.unsqueeze(1),
            cache.keys,
            cache.values,
            cache_seqlens=plan.seq_lens,
            page_table=plan.page_ids,
            softmax_scale=sm_scale,
            causal=True,
        ).squeeze(1)

    return call


def sglang_triton(
    q: torch.Tensor, cache: LayerCache, plan: DecodePlan, sm_scale: float
) -> Callable[[], torch.Tensor]:
    """SGLang's own Triton decode kernel, over token slots."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    batch, heads_q, _ = q.shape
    page_size, _, dim_v = cache.values.shape[1:]
    device = q.device
    offset = torch.arange(page_size, device=device, dtype=torch.int32)
    slots = (plan.page_ids.unsqueeze(-1) * page_size + offset).flatten(1)
    there = torch.arange(slots.shape[1], device=device) < plan.seq_lens.unsqueeze(1)
    kv_indices = slots[there].long()
    kv_indptr = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    kv_indptr[1:] = plan.seq_lens.cumsum(0)
    size = (batch, heads_q, _TRITON_KV_SPLITS)
    partial = torch.empty(*size, dim_v, dtype=torch.float32, device=device)
    lse = torch.empty(size, dtype=torch.float32, device=device)
    splits = torch.full((batch,), _TRITON_KV_SPLITS, dtype=torch.int32, device=device)
    out = torch.empty(batch, heads_q, dim_v, dtype=q.dtype, device=device)

    def call() -> torch.Tensor:
        decode_attention_fwd(
            q,
            cache.keys.flatten(0, 1),
            cache.values.flatten(0, 1),
            out,
            kv_indptr,
            kv_indices,
            partial,
            lse,
            splits,
            _TRITON_KV_SPLITS,
            sm_scale,
            1.0,
            1.0,
        )
        return out

    return call


def flashinfer(
    q: torch.Tensor, cache: LayerCache, plan: DecodePlan, sm_scale: float
) -> Callable[[], torch.Tensor]:
    """FlashInfer's paged decode, planned once; planning compiles its kernels on first use.

    Tensor cores are used where SGLang's `flashinfer` backend uses them.
    """
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    batch, heads_q, dim = q.shape
    page_size, heads_kv = cache.keys.shape[1:3]
    device = q.device
    pages = (plan.seq_lens + page_size - 1) // page_size
    indptr = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    indptr[1:] = pages.cumsum(0)
    there = torch.arange(plan.page_ids.shape[1], device=device) < pages.unsqueeze(1)
    indices = plan.page_ids[there].contiguous()
    last = (plan.seq_lens - 1) % page_size + 1
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        # Zeroed, as its first use asks for.
        torch.zeros(_FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=heads_q // heads_kv >= 4 or cache.keys.dtype == torch.float8_e4m3fn,
        paged_kv_indptr_buffer=torch.empty_like(indptr),
        paged_kv_indices_buffer=torch.empty_like(indices),
        paged_kv_last_page_len_buffer=torch.empty_like(last),
    )
    wrapper.plan(
        indptr.cpu(),
        indices,
        last.cpu(),
        heads_q,
        heads_kv,
        dim,
        page_size,
        q_data_type=q.dtype,
        kv_data_type=cache.keys.dtype,
        sm_scale=sm_scale,
    )
    out = torch.empty(batch, heads_q, dim, dtype=q.dtype, device=device)

    def call() -> torch.Tensor:
        wrapper.run(q, (cache.keys, cache.values), out=out)
        return out

    return call


BASELINES: dict[str, Baseline] = {
    "fa3": fa3,
    "sglang_triton": sglang_triton,
    "flashinfer": flashinfer,
}
