"""The benchmark's inputs: planted attention and traces."""

from pathlib import Path

import pytest
import torch
from cases import DEVICE

from twilight_sgl.attention.plan import Selection
from twilight_sgl.benchmark.mass import kept_mass
from twilight_sgl.benchmark.planted import Shape, planted_layers, traced_layers
from twilight_sgl.kernels.seal.reference import summarize


def test_planted_attention_is_sparse_and_kept() -> None:
    shape = Shape("tiny", 4, 1, 64, batch=1, context=2000)
    layers = planted_layers(shape, layers=1, p=0.95, dtype=torch.float32, device=DEVICE)
    selection = Selection(16, 0.25, 16, 64)
    mass = kept_mass(layers.queries[0], layers.caches[0], layers.plan, selection, sm_scale=64**-0.5)
    # A head may draw no run at all in so short a context.
    assert mass["head_tokens"].median() < 0.05 * shape.context
    assert mass["mass"].median() > 0.8
    assert (mass["candidate_mass"] >= mass["mass"] - 1e-6).all()


@pytest.mark.parametrize("with_values", [True, False], ids=["values", "no-values"])
def test_a_trace_is_laid_out_in_pages(tmp_path: Path, with_values: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        {
            "q": torch.randn(4, 64, generator=generator),
            "keys": torch.randn(37, 2, 64, generator=generator),
        }
        for _ in range(2)
    ]
    if with_values:
        for layer in tensors:
            layer["values"] = torch.randn(37, 2, 64, generator=generator)
    path = tmp_path / "trace.pt"
    torch.save({"model": "tiny", "layers": tensors}, path)
    shape, layers = traced_layers(str(path), batch=2, p=0.9, dtype=torch.float32, device=DEVICE)
    assert (shape.heads_q, shape.heads_kv, shape.dim, shape.context) == (4, 2, 64, 37)
    for layer, cache in zip(tensors, layers.caches, strict=True):
        for row in range(2):
            pages = layers.plan.page_ids[row].long()
            got = cache.keys[pages].flatten(0, 1)[:37].cpu()
            assert torch.equal(got, layer["keys"])
            bounds = summarize(cache.keys[pages[:2]])[0]
            assert torch.equal(cache.min_max[pages[:2]], bounds)
            if with_values:
                assert torch.equal(cache.values[pages].flatten(0, 1)[:37].cpu(), layer["values"])
