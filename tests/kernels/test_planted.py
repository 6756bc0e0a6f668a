"""The benchmark's inputs, planted attention and traces, and what it reads off them untimed."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from cases import DEVICE

from twilight_sgl.attention.pipeline import LayerOutput
from twilight_sgl.attention.plan import LayerCache, Selection
from twilight_sgl.attention.triton_pipeline import TritonDecode
from twilight_sgl.benchmark.checks import check
from twilight_sgl.benchmark.kernels import add_arguments, main
from twilight_sgl.benchmark.mass import kept_mass
from twilight_sgl.benchmark.planted import (
    HOT_LOGIT,
    MEAN_SHARE,
    RUN_TOKENS,
    Shape,
    load_trace,
    planted_layers,
    traced_layers,
)
from twilight_sgl.benchmark.quality import BOUNDS
from twilight_sgl.errors import TwilightError
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


def saved_trace(path: Path, *, tokens: int = 333, layers: tuple[int, ...] = (4, 7, 9)) -> Path:
    """A trace of layers with planted attention, G = 2."""
    shape = Shape("tiny", 4, 2, 64, batch=1, context=tokens)
    planted = planted_layers(shape, layers=len(layers), p=0.9, device="cpu")
    pages = planted.plan.page_ids[0].long()
    entries = [
        {
            "layer": layer,
            "q": q[0].clone(),
            "keys": cache.keys[pages].flatten(0, 1)[:tokens].clone(),
            "values": cache.values[pages].flatten(0, 1)[:tokens].clone(),
        }
        for layer, q, cache in zip(layers, planted.queries, planted.caches, strict=True)
    ]
    torch.save({"model": "tiny", "layers": entries}, path)
    return path


def decoder(shape: Shape, selection: Selection, dtype: torch.dtype) -> TritonDecode:
    return TritonDecode(
        max_batch=shape.batch,
        max_context=shape.context,
        heads_q=shape.heads_q,
        heads_kv=shape.heads_kv,
        dim=shape.dim,
        dim_v=shape.dim,
        selection=selection,
        q_dtype=dtype,
        cache_dtype=dtype,
        device=DEVICE,
    )


@pytest.mark.parametrize(
    ("bounds", "estimator"), [*((bounds, "int4") for bounds in BOUNDS), ("fp8", "int4_centred")]
)
def test_every_layer_of_a_trace_is_checked_and_described(
    tmp_path: Path, bounds: str, estimator: str
) -> None:
    path = saved_trace(tmp_path / "trace.pt")
    selection = Selection(16, 0.25, 4, 8, estimator)
    shape, layers = traced_layers(
        str(path),
        batch=2,
        p=0.9,
        bounds_dtype=BOUNDS[bounds],
        centred=selection.centred,
        device=DEVICE,
    )
    result, moved = check(shape, layers, selection, decoder(shape, selection, torch.bfloat16))
    assert "wrong" not in result
    assert result["bounds"] == {"key": "bfloat16", "fp8": "float8_e4m3fn"}[bounds]
    per_layer = result["per_layer"]
    assert [row["layer"] for row in per_layer] == [4, 7, 9]
    assert result["worst_layer"] == min(per_layer, key=lambda row: row["mass"])
    assert result["mass"] == pytest.approx(sum(row["mass"] for row in per_layer) / 3)
    assert result["least_mass"] == min(row["least_mass"] for row in per_layer)
    for row in per_layer:
        assert 0 < row["least_mass"] <= row["mass"] <= row["candidate_mass"] <= 1
        assert 0 < row["head_share"] < row["union_share"] < row["candidate_share"] < 0.5
    # The kernels and the reference agree on what is kept.
    union = sum(row["union_share"] for row in per_layer) / 3
    assert result["kept_share"] == pytest.approx(union, rel=0.02)
    assert set(moved) == {"select", "attend", "estimate", "top_p", "union"}
    full_pages = 2 * 2 * ((shape.context - 1) // 16)
    bound_bytes = {"key": 2, "fp8": 1}[bounds]
    middle_bytes = 2 * 4 if selection.centred else 0  # of a group's two heads
    listed = round(result["candidate_share"] * shape.context) * 2 * 2 // 16
    scored = full_pages * (2 * 64 * bound_bytes + 4 + middle_bytes)
    assert moved["select"] == scored + listed * 12


def test_dense_rows_move_what_they_attend_to(tmp_path: Path) -> None:
    path = saved_trace(tmp_path / "trace.pt", tokens=40)
    shape, layers = traced_layers(str(path), batch=2, p=0.9, device=DEVICE)
    selection = Selection(16, 0.25, 4, 8)
    layers.plan.sparse[0] = False
    layers.plan.seq_lens[1] = 0  # a row of nothing
    result, moved = check(shape, layers, selection, decoder(shape, selection, torch.bfloat16))
    assert "wrong" not in result
    attended = shape.heads_kv * shape.context * 2 * shape.dim * 2
    assert moved.pop("attend") == attended
    assert set(moved.values()) == {0}


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_that_is_wrong_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    path = saved_trace(tmp_path / "trace.pt")
    shape, layers = traced_layers(str(path), batch=1, p=0.9, device=DEVICE)
    selection = Selection(16, 0.25, 4, 8)
    decode = decoder(shape, selection, torch.bfloat16)
    honest = decode.run

    def wrong(q: torch.Tensor, cache: LayerCache, *args: object, **kwargs: object) -> LayerOutput:
        got = honest(q, cache, *args, **kwargs)
        if cache is layers.caches[layer]:
            got.output.mul_(2)
        return got

    monkeypatch.setattr(decode, "run", wrong)
    result, _ = check(shape, layers, selection, decode)
    assert re.match(rf"layer {layers.layer_ids[layer]}: error (0\.99|1\.0)", result["wrong"])
    assert "mass" not in result


def test_layers_of_a_trace_can_be_left_out(tmp_path: Path) -> None:
    path = saved_trace(tmp_path / "trace.pt", tokens=40)
    _, layers = traced_layers(str(path), batch=1, p=0.9, device=DEVICE, skip_layers=(4,))
    assert layers.layer_ids == (7, 9)
    with pytest.raises(TwilightError, match=r"no layer left: name fewer in --skip-layers"):
        load_trace(str(path), skip_layers=(4, 7, 9))


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.pt"
    remedy = r"--trace .*trace\.pt is not a trace .* make one with"
    with pytest.raises(TwilightError, match=remedy):
        load_trace(str(path))
    for content in ({"layers": [{"q": torch.zeros(2, 4)}]}, {"model": "x"}, [1]):
        torch.save(content, path)
        with pytest.raises(TwilightError, match=remedy):
            load_trace(str(path))
    path.write_bytes(b"no pickle")
    with pytest.raises(TwilightError, match=remedy):
        load_trace(str(path))
    entries = [{"q": torch.zeros(2, 4), "keys": torch.zeros(n, 2, 4)} for n in (5, 6)]
    torch.save({"layers": entries}, path)
    with pytest.raises(TwilightError, match="layers of other shapes"):
        load_trace(str(path))


def test_quality_grows_with_p_and_with_the_candidates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved_trace(tmp_path / "trace.pt", tokens=1500)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = ["--quality", "--trace", str(path), "--out", str(tmp_path), "--skip-layers", "9"]
    assert main(parser.parse_args([*flags, "--recent-tokens", "16"])) == 0
    rows = json.loads((tmp_path / "quality.json").read_text())
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 2 == 2 * 3 * 3 + 2
    found = {(row["bounds"], row["budget"], row["p"]): row for row in rows}
    assert len(found) == len(rows)
    for bounds in ("key", "fp8"):
        for budget in (1 / 8, 1 / 4, 1 / 2):
            least, middle, most = (found[bounds, budget, p] for p in (0.85, 0.95, 0.99))
            assert [row["layer"] for row in least["per_layer"]] == [4, 7]
            assert least["mass"] < middle["mass"] < most["mass"]
            assert most["mass"] <= most["candidate_mass"] == least["candidate_mass"]
            assert least["head_share"] < middle["head_share"] < most["head_share"]
        few, more = found[bounds, 1 / 8, 0.95], found[bounds, 1 / 2, 0.95]
        assert few["candidate_mass"] < more["candidate_mass"]
        # float8 bounds are looser, so they may find less, but not much.
        assert abs(found["fp8", 1 / 4, 0.95]["mass"] - found["key", 1 / 4, 0.95]["mass"]) < 0.05


def test_quality_needs_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert main(parser.parse_args(["--quality"])) == 2
    assert "--quality reads a trace: pass --trace FILE" in capsys.readouterr().err
    gone = str(tmp_path / "gone.pt")
    assert main(parser.parse_args(["--quality", "--trace", gone, "--out", str(tmp_path)])) == 2
    assert "gone.pt is not a trace" in capsys.readouterr().err
