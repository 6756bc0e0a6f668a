"""Decode-attention kernels against dense attention, stage by stage."""

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

import torch

from twilight_sgl.attention.pipeline import decode_reference
from twilight_sgl.attention.plan import DecodePlan, Selection
from twilight_sgl.attention.selectors.boxes import SLACK
from twilight_sgl.attention.triton_pipeline import TritonDecode
from twilight_sgl.benchmark.baselines import BASELINES, Baseline, own_dense
from twilight_sgl.benchmark.checks import MAX_ERROR, check, first_row, relative_error
from twilight_sgl.benchmark.planted import PAGE_SIZE, Layers, Shape, planted_layers, traced_layers
from twilight_sgl.benchmark.plot import plot
from twilight_sgl.benchmark.quality import BOUNDS, HEADER, quality, table_line
from twilight_sgl.benchmark.record import parse_layers
from twilight_sgl.benchmark.timing import Timing, copy_bandwidth, describe_machine, time_calls
from twilight_sgl.config import ESTIMATORS
from twilight_sgl.errors import TwilightError
from twilight_sgl.kernels.seal.reference import summarize
from twilight_sgl.kernels.seal.triton import layer_pointers, seal_pages

SHAPES = (
    Shape("llama-3.1-8b", 32, 8, 128, 64, 32 << 10),
    Shape("llama-3.1-8b", 32, 8, 128, 8, 32 << 10),
    Shape("llama-3.1-8b", 32, 8, 128, 8, 128 << 10),
    Shape("llama-3.1-8b", 32, 8, 128, 1, 128 << 10),
    Shape("llama-3.1-8b", 32, 8, 128, 1, 32 << 10),
    Shape("llama-2-7b", 32, 32, 128, 64, 32 << 10),
    Shape("qwen2.5-0.5b", 14, 2, 64, 64, 32 << 10),
    Shape("qwen2.5-0.5b", 14, 2, 64, 8, 28 << 10),
    Shape("qwen2.5-0.5b", 14, 2, 64, 1, 28 << 10),
    Shape("qwen2.5-0.5b", 14, 2, 64, 64, 1 << 10),
    Shape("llama-3.1-8b", 32, 8, 128, 64, 2 << 10),
    Shape("llama-3.1-8b", 32, 8, 128, 1, 2 << 10),
)
LAYER_BYTES = 3 << 29  # of keys and values that a timed round reads densely
MAX_LAYERS = 8
DENSE_BELOW_TOKENS = 2049  # requests so short are not pruned, as the backend does


def _all_dense(plan: DecodePlan) -> DecodePlan:
    return dataclasses.replace(plan, sparse=torch.zeros_like(plan.sparse))


def _row(timing: Timing, moved: int | None, bandwidth: float) -> dict[str, float | int | None]:
    row: dict[str, float | int | None] = dataclasses.asdict(timing)
    row["bytes"] = moved
    if moved is not None:
        row["share_of_copy_bandwidth"] = moved / (timing.p50_us * 1e-6) / bandwidth
    return row


def _decoder(shape: Shape, layers: Layers, selection: Selection, *, prune: bool) -> TritonDecode:
    return TritonDecode(
        max_batch=shape.batch,
        max_context=shape.context,
        heads_q=shape.heads_q,
        heads_kv=shape.heads_kv,
        dim=shape.dim,
        dim_v=shape.dim,
        selection=selection,
        q_dtype=layers.queries[0].dtype,
        cache_dtype=layers.caches[0].keys.dtype,
        device=layers.plan.seq_lens.device,
        prune=prune,
    )


def measure(
    shape: Shape,
    layers: Layers,
    selection: Selection,
    bandwidth: float,
    baselines: tuple[str, ...],
) -> dict[str, object]:
    """Check one shape against the references, then time it; no figures for a wrong result."""
    sm_scale = shape.dim**-0.5
    plan = layers.plan
    decode = _decoder(shape, layers, selection, prune=True)
    result, moved = check(shape, layers, selection, decode)
    if "wrong" in result:
        return result

    def calls(decoder: TritonDecode) -> list:
        return [
            lambda q=q, cache=cache: decoder.run(q, cache, plan, sm_scale=sm_scale)
            for q, cache in zip(layers.queries, layers.caches, strict=True)
        ]

    key_bytes = layers.caches[0].keys.element_size()
    dense_bytes = shape.batch * shape.context * shape.heads_kv * 2 * shape.dim * key_bytes
    dense_row = decode_reference(
        layers.queries[0][:1],
        layers.caches[0],
        first_row(plan, sparse=False),
        selection,
        sm_scale=sm_scale,
    ).output

    def dense(baseline: Baseline) -> dict[str, object]:
        return _baseline(baseline, layers, sm_scale, dense_row, dense_bytes, bandwidth)

    others: dict[str, object] = {}
    own = dense(own_dense)
    if "error" not in own:
        return {**result, "wrong": f"own dense attention: {own}"}
    if bool(plan.sparse[0]):
        stages = {}
        per_layer = [
            decode.stages(q, cache, plan, decode.out[: shape.batch], sm_scale=sm_scale)
            for q, cache in zip(layers.queries, layers.caches, strict=True)
        ]
        total = time_calls(calls(decode))
        result["total"] = _row(total, sum(moved.values()), bandwidth)
        for name in per_layer[0]:
            timing = time_calls([stage[name] for stage in per_layer])
            # One launch for all stages moves what they move.
            stage_bytes = sum(moved.values()) if name == "decode" else moved.get(name)
            stages[name] = _row(timing, stage_bytes, bandwidth)
        result["stages"] = stages
        others["own_dense"] = own
        quest = _decoder(
            shape, layers, dataclasses.replace(selection, selector="quest"), prune=False
        )
        others["quest_only"] = _row(time_calls(calls(quest)), None, bandwidth)
        del quest
    else:
        result["total"], result["stages"] = own, {"rows": own}
    others |= {name: dense(BASELINES[name]) for name in baselines}
    result["others"] = others
    return result


def _baseline(
    baseline: Baseline,
    layers: Layers,
    sm_scale: float,
    dense_row: torch.Tensor,
    dense_bytes: int,
    bandwidth: float,
) -> dict[str, object]:
    # Planning and the first call compile, so both come before any timing.
    try:
        each = [
            baseline(q, cache, layers.plan, sm_scale)
            for q, cache in zip(layers.queries, layers.caches, strict=True)
        ]
        error = relative_error(each[0]()[:1], dense_row)
        if not error < MAX_ERROR:
            return {"wrong": f"error {error:.4f}"}
        return {**_row(time_calls(each), dense_bytes, bandwidth), "error": error}
    except Exception as failure:  # a library that is missing or refuses the shape
        said = next(iter(str(failure).strip().splitlines()), "")
        return {"missing": f"{type(failure).__name__}: {said}"[:300]}


def measure_seal(
    bandwidth: float, shape: Shape, centred: bool, tokens: int = 32 << 10
) -> dict[str, object]:
    """Seal a prompt's pages in one layer."""
    pages, layers = tokens // shape.page_size, 4
    dims = (pages + 1, shape.page_size, shape.heads_kv, shape.dim)
    keys = [torch.randn(dims, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
    listed = (torch.randperm(pages, device="cuda") + 1).int()
    count = torch.tensor([pages], dtype=torch.int32, device="cuda")
    lead = (1, dims[0], dims[2])
    calls, outputs = [], []
    for key in keys:
        summaries = (
            torch.empty(*lead, 2, shape.dim, dtype=key.dtype, device="cuda"),
            torch.empty(*lead, shape.page_size, shape.dim // 2, dtype=torch.uint8, device="cuda"),
            torch.empty(*lead, shape.page_size, 2, dtype=torch.float16, device="cuda"),
        )
        outputs.append(summaries)
        pointers = layer_pointers([key])
        tensors = (*summaries, listed, count)
        calls.append(functools.partial(seal_pages, [key], pointers, *tensors, centred=centred))
    calls[0]()
    expected = summarize(keys[0][1:], centred=centred)
    same = all(torch.equal(a[0, 1:], b) for a, b in zip(outputs[0], expected, strict=True))
    result: dict[str, object] = {"shape": f"seal {shape.model} {tokens // 1024}k, one layer"}
    if not same:
        result["wrong"] = "not bit-equal to the reference"
        return result
    values = pages * shape.heads_kv * shape.page_size * shape.dim
    moved = values * 2 + values // shape.page_size * 4 + values // 2 + values // shape.dim * 4
    result["total"] = _row(time_calls(calls), moved, bandwidth)
    return result


def _layers_for(shape: Shape) -> int:
    layer_bytes = shape.batch * shape.context * shape.heads_kv * shape.dim * 4
    return max(1, min(MAX_LAYERS, -(-LAYER_BYTES // layer_bytes)))


def _print(result: dict[str, object], bandwidth: float) -> None:
    if "wrong" in result:
        print(f"{result['shape']:28s} WRONG: {result['wrong']}")
        return
    total = result["total"]
    assert isinstance(total, dict)
    line = f"{result['shape']:28s} {total['p50_us']:9.1f} us"
    line += f" ({total['p20_us']:.1f}-{total['p80_us']:.1f})"
    line += f" {total['share_of_copy_bandwidth']:4.0%} of copy bandwidth"
    if "stages" not in result:
        print(line)
        return
    others = result["others"]
    assert isinstance(others, dict)
    for name, other in others.items():
        if "p50_us" in other:
            line += f" | {name} {other['p50_us']:.1f} = {other['p50_us'] / total['p50_us']:.2f}x"
        else:
            line += f" | {name}: {other.get('wrong') or other.get('missing')}"
    print(line)
    stages = result["stages"]
    assert isinstance(stages, dict)
    print(
        "    "
        + ", ".join(
            f"{name} {row['p50_us']:.1f} us {row['share_of_copy_bandwidth']:.0%}"
            for name, row in stages.items()
        )
    )
    if "mass" in result:
        print(
            f"    B0 {result['candidate_share']:.1%} of the context, B1 {result['head_share']:.2%} "
            f"a head (spread {result['head_spread']:.0f}x), union {result['kept_share']:.2%}; "
            f"mass {result['mass']:.3f} (least {result['least_mass']:.3f}) "
            f"of {result['candidate_mass']:.3f} in the candidates; error {result['error']:.4f}"
        )
        worst = result["worst_layer"]
        assert isinstance(worst, dict)
        print(
            f"    layer {worst['layer']} keeps least: B1 {worst['head_share']:.2%} a head, union "
            f"{worst['union_share']:.2%}, mass {worst['mass']:.3f} (least "
            f"{worst['least_mass']:.3f}) of {worst['candidate_mass']:.3f} in the candidates"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default="", help="only shapes whose name contains this")
    parser.add_argument("--p", type=float, default=0.95)
    parser.add_argument("--selector", choices=sorted(SLACK), default="quest")
    parser.add_argument(
        "--budget", type=float, default=0.25, help="B0, as --twilight-selector-budget"
    )
    parser.add_argument(
        "--bounds",
        choices=tuple(BOUNDS),
        default="fp8",
        help="dtype of the page bounds: float8 rounded outward, or that of the keys",
    )
    parser.add_argument("--estimator", choices=ESTIMATORS, default="int4")
    parser.add_argument("--sink-tokens", type=int, default=16)
    parser.add_argument("--recent-tokens", type=int, default=64)
    parser.add_argument("--baselines", default="fa3,sglang_triton,flashinfer")
    parser.add_argument("--trace", type=Path, help="what `record` wrote, in place of --shapes")
    parser.add_argument("--trace-batch", type=int, default=8, help="requests made of the trace")
    parser.add_argument(
        "--skip-layers", type=parse_layers, default=(), help="layers of the trace to leave out"
    )
    parser.add_argument(
        "--quality",
        action="store_true",
        help="time nothing: compare the mass that bounds, B0 and p keep of --trace; needs no GPU",
    )
    parser.add_argument("--commit", help="recorded with the rows; read from git by default")
    parser.add_argument("--out", type=Path, default=Path("kernels-benchmark"))


def _selection(args: argparse.Namespace) -> Selection:
    return Selection(
        PAGE_SIZE,
        args.budget,
        args.sink_tokens,
        args.recent_tokens,
        estimator=args.estimator,
        selector=args.selector,
    )


def _compare_quality(args: argparse.Namespace) -> int:
    """Print and save what bounds, B0 and p keep of the trace."""
    print(HEADER)
    rows = quality(
        str(args.trace),
        _selection(args),
        skip_layers=args.skip_layers,
        device="cuda" if torch.cuda.is_available() else "cpu",
        report=lambda row: print(table_line(row), flush=True),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"wrote {args.out / 'quality.json'}")
    return 0


def main(args: argparse.Namespace) -> int:
    """Run the benchmark; returns a process exit status, 1 where a result was wrong, 2 if unable."""
    try:
        if args.quality and args.trace is None:
            raise TwilightError(
                "--quality reads a trace: pass --trace FILE, made with "
                "`python -m twilight_sgl.benchmark record`"
            )
        if args.quality:
            return _compare_quality(args)
        return _measure_all(args)
    except TwilightError as error:
        print(error, file=sys.stderr)
        return 2


def _measure_all(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise TwilightError(
            "twilight_sgl.benchmark kernels needs a CUDA GPU and torch sees none here; "
            "with --quality --trace FILE it needs none"
        )
    baselines = tuple(name for name in args.baselines.split(",") if name)
    if unknown := set(baselines) - set(BASELINES):
        raise TwilightError(f"--baselines: {sorted(unknown)} not among {sorted(BASELINES)}")
    machine = describe_machine()
    if args.commit:
        machine["commit"] = args.commit
    bandwidth = copy_bandwidth()
    print(f"{machine['gpu']}, copy {bandwidth / 1e12:.2f} TB/s, {machine}")
    bounds = BOUNDS[args.bounds]
    rows: list[dict[str, object]] = []

    def add(result: dict[str, object]) -> None:
        rows.append({**result, **machine, "copy_bytes_per_s": bandwidth})
        _print(result, bandwidth)
        torch.cuda.empty_cache()

    selection = _selection(args)
    if args.trace:
        shape, layers = traced_layers(
            str(args.trace),
            batch=args.trace_batch,
            p=args.p,
            bounds_dtype=bounds,
            centred=selection.centred,
            skip_layers=args.skip_layers,
        )
        add(measure(shape, layers, selection, bandwidth, baselines))
    else:
        for shape in SHAPES:
            if args.shapes not in shape.name:
                continue
            layers = planted_layers(
                shape,
                layers=_layers_for(shape),
                p=args.p,
                bounds_dtype=bounds,
                centred=selection.centred,
            )
            if shape.context < DENSE_BELOW_TOKENS:
                layers = dataclasses.replace(layers, plan=_all_dense(layers.plan))
            add(measure(shape, layers, selection, bandwidth, baselines))
            del layers
        if args.shapes in "seal":
            add(measure_seal(bandwidth, SHAPES[0], selection.centred))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "kernels.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"wrote {args.out / 'kernels.json'}")
    try:
        plot(rows, args.out / "kernels.png")
    except Exception as failure:  # the figures are saved; a plotting library may be broken
        print(f"no plot: {type(failure).__name__}: {failure}")
    return int(any("wrong" in row for row in rows))
