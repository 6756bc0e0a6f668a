"""What a server compiles ahead is all that its decode steps launch."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from served import DENSE_LAYER, DIM, DTYPE, HEADS_KV, HEADS_Q, LAYERS, PS, Served
from sglang.srt.layers.radix_attention import RadixAttention

from twilight_sgl.attention.backend import TritonAttnBackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SIZES = (1, 2, 4, 8, 12, 24, 64)


def test_steps_compile_nothing_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    served = Served()
    runtime = served.runtime
    runtime.reserve(max(SIZES))
    layers = [
        RadixAttention(HEADS_Q, DIM, 0.125, HEADS_KV, layer) for layer in (DENSE_LAYER, *LAYERS)
    ]
    backend = object.__new__(TritonAttnBackend)
    backend.runtime, backend.data_parallel, backend._dtype = runtime, False, DTYPE
    backend.token_to_kv_pool = SimpleNamespace(dtype=DTYPE)
    backend.req_to_token_pool = SimpleNamespace(req_to_token=served.table, size=4)
    backend._allocator = SimpleNamespace(free_pages=torch.arange(9, device="cuda"), page_size=PS)
    backend._layer_of_kind = {runtime.pool.has_layer(each.layer_id): each for each in layers}
    sealed, keys = runtime.pool.sealed.clone(), runtime.cache_of(LAYERS[0]).keys.clone()

    backend.compile_ahead(SIZES)
    assert torch.equal(runtime.pool.sealed, sealed), "a step was planned"
    assert torch.equal(runtime.cache_of(LAYERS[0]).keys, keys), "a step's keys were written"

    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **call: compiled.append(call["fn"])
    )
    width = HEADS_Q + 2 * HEADS_KV
    for batch in SIZES:
        fused = torch.randn(batch, width * DIM, dtype=DTYPE, device="cuda")
        parts = fused.split([HEADS_Q * DIM, HEADS_KV * DIM, HEADS_KV * DIM], dim=1)
        q, k, v = parts[0], *(part.view(-1, HEADS_KV, DIM) for part in parts[1:])
        slots = torch.zeros(batch, dtype=torch.int64, device="cuda")
        slots[0] = 2
        lengths = torch.where(slots > 0, 9 * PS, 1)
        for dense in (True, False):
            runtime.begin_step(dense=dense)
            runtime.begin_decode(served.table, slots, lengths, dense=dense)
            if not dense:
                runtime.seal_claimed()
            for layer in layers:
                out = backend.forward_decode(q, k, v, layer, None)
                assert out[0].isfinite().all()
    torch.cuda.synchronize()
    assert [info.name for info in compiled] == []
