"""The benchmark's inputs: planted attention and traces."""

from pathlib import Path

import pytest
import torch
from cases import DEVICE

from twilight_sgl.attention.plan import Selection
from twilight_sgl.benchmark.mass import kept_mass
from twilight_sgl.benchmark.planted import (
    HOT_LOGIT,
    MEAN_SHARE,
    RUN_TOKENS,
    Shape,
    planted_layers,
    traced_layers,
)
from twilight_sgl.kernels.seal.reference import summarize

SHAPES = [
    Shape("llama-3.1-8b", 32, 8, 128, batch=1, context=8192),
    Shape("llama-2-7b", 32, 32, 128, batch=1, context=8192),
    Shape("qwen2.5-0.5b", 14, 2, 64, batch=1, context=8192),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.model)
def test_planted_budgets_are_those_of_real_models(shape: Shape) -> None:
    layers = planted_layers(shape, layers=1, p=0.95, dtype=torch.float32, device=DEVICE)
    selection = Selection(16, 0.25, sink_tokens=1, recent_tokens=1)  # few are always kept
    mass = kept_mass(
        layers.queries[0], layers.caches[0], layers.plan, selection, sm_scale=shape.dim**-0.5
    )
    kept = mass["head_tokens"].float()
    assert 0.01 <= kept.mean() / shape.context <= 0.02
    assert kept.max() / kept.min() >= 10
    union = (mass["kept_tokens"].float().mean() / kept.mean()).item()
    # 17 tokens are always kept, a sixth of one head's.
    least, most = {1: (1.0, 1.2), 4: (2.2, 2.8), 7: (2.7, 3.5)}[shape.heads_q // shape.heads_kv]
    assert least <= union <= most
    assert mass["mass"].mean() > 0.93
    assert (mass["candidate_mass"] > 0.95).all()
    assert (mass["candidate_mass"] >= mass["mass"] - 1e-6).all()


def test_planted_logits_stand_out_for_the_heads_that_drew_them() -> None:
    shape = Shape("tiny", 7, 1, 64, batch=1, context=4096)
    layers = planted_layers(shape, layers=1, p=0.95, dtype=torch.float32, device=DEVICE)
    pages = layers.plan.page_ids[0].long()
    keys = layers.caches[0].keys[pages].flatten(0, 1)[:, 0]
    logits = layers.queries[0][0] @ keys.T / 8  # [7, N]
    hot = (logits > HOT_LOGIT / 2).sum(1)
    planted = round(MEAN_SHARE * shape.context / RUN_TOKENS) * RUN_TOKENS
    assert ((hot - planted).abs() <= 2).all()


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
