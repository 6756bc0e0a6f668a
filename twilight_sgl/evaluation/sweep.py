"""Methods side by side: starts their servers, gives all the same prompts, and writes the report."""

import argparse
import asyncio
import contextlib
import itertools
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from twilight_sgl.benchmark.prompts import Load
from twilight_sgl.benchmark.servers import (
    OURS,
    Server,
    fit_at_once,
    free_memory,
    pool_tokens,
    running,
    server_flags,
    terminations_interrupt,
)
from twilight_sgl.benchmark.streaming import MeasurementError
from twilight_sgl.embedded_model import EmbeddedModelError, ensure_embedded_model
from twilight_sgl.errors import TwilightError
from twilight_sgl.evaluation import report, run
from twilight_sgl.evaluation.tasks import GROUPS, PERPLEXITY, TASKS, parse_tasks

PROMPTS = "prompts.jsonl"
STOPPED = 130  # exit status after Ctrl-C
USUAL_SPARSE = "quest:1024,twilight:0.85,twilight:0.95"
_PARAMETERS = {"twilight": "p", "quest": "B0"}


@dataclass(frozen=True)
class Method:
    """A way to decode: `fa3`, `quest:1024` (B0) or `twilight:0.95` (p).

    Attributes:
        name: as given, in reports too.
        backend: the part before the colon.
        value: the number behind it; None for a backend of SGLang's.
    """

    name: str
    backend: str
    value: float | None

    @property
    def server(self) -> str:
        """The server that serves it: every p of Twilight has the same."""
        return self.backend if self.backend == "twilight" else self.name.replace(":", "-")


def parse_methods(value: str) -> list[Method]:
    """Read comma-separated methods.

    Raises:
        TwilightError: none, one twice, or a number where none or another belongs.
    """
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise TwilightError(f"--methods {value!r}: name each once, e.g. fa3,twilight:0.95")
    methods = []
    for name in names:
        backend, colon, given = name.partition(":")
        if (backend in OURS) != bool(colon):
            raise TwilightError(
                f"--methods {name}: pass twilight:P, quest:B0 (tokens, or a share of the context "
                "up to 1), or the bare name of a backend of SGLang's"
            )
        number = None
        if colon:
            try:
                number = float(given)
            except ValueError:
                number = 0.0
            if number <= 0 or (backend == "twilight" and number > 1):
                raise TwilightError(
                    f"--methods {name}: {given!r} is no {_PARAMETERS[backend]}: pass a number "
                    f"above 0{', at most 1' if backend == 'twilight' else ''}"
                )
        methods.append(Method(name, backend, number))
    return methods


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = f"{', '.join(TASKS)}; or {' or '.join(GROUPS)} of them; or {PERPLEXITY} of --text"
    parser.add_argument("tasks", nargs="+", metavar="TASK", help=known)
    parser.add_argument("--text", type=Path, metavar="FILE", help=f"prose, for {PERPLEXITY}")
    parser.add_argument("--model-path", help="folder of a model; the embedded model by default")
    parser.add_argument(
        "--methods",
        help="comma-separated: a backend of SGLang's, which is dense, quest:B0 or twilight:P "
        f"(default: fa3, on a CPU torch_native, and {USUAL_SPARSE})",
    )
    run.add_sample_arguments(parser)
    parser.add_argument(
        "--concurrency", type=int, default=8, help="requests at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--server-args", default="", help="flags for every server that is started, as one string"
    )
    parser.add_argument("--start-timeout", type=float, default=900, metavar="SECONDS")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gone on with")


def flags_of(
    method: Method,
    args: argparse.Namespace,
    *,
    model: str,
    dense: str | None,
    device: str,
    tokens: int,
) -> tuple[str, ...]:
    """Flags of a method's server: whatever the load, its steps select.

    Args:
        dense: backend that prefills for Twilight and Quest.
        tokens: size of the KV pool.
    """
    extra = []
    if method.backend in OURS:
        extra = ["--twilight-min-step-mb", "0", "--twilight-min-context-tokens", "0"]
    if method.backend == "quest":
        extra += ["--twilight-selector-budget", f"{method.value:g}"]
    if args.text is not None:
        extra.append("--enable-custom-logit-processor")
    return server_flags(
        method.backend,
        model=model,
        p=0.95,  # each request says its own
        dense=dense,
        device=device,
        loads=[_load(args)],
        max_total_tokens=tokens,
        extra=[*extra, *shlex.split(args.server_args)],
    )


async def evaluate(
    method: Method, url: str, task: str, context: int, args: argparse.Namespace
) -> None:
    """Run one task at one context by a method.

    Raises:
        TwilightError: the run did not end well.
    """
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    results = results_file(method, args)
    given = [task, "--url", url, "--json", str(results), "--method", method.name]
    given += ["--context", str(context), "--samples", str(args.samples)]
    given += ["--seed", str(args.seed), "--concurrency", str(args.concurrency)]
    given += ["--prompts", str(args.out / PROMPTS)]
    if method.backend == "twilight":
        given += ["--p", f"{method.value:g}"]
    if task == PERPLEXITY:
        given += ["--text", str(args.text)]
    try:
        await run.evaluate(parser.parse_args(given))
    except TwilightError as error:
        raise TwilightError(
            f"{method.name} was not evaluated ({error}); logs are in {args.out}"
        ) from error


def results_file(method: Method, args: argparse.Namespace) -> Path:
    return args.out / f"{method.name.replace(':', '-')}.jsonl"


async def _evaluate_all(
    methods: list[Method], servers: dict[str, Server], args: argparse.Namespace
) -> None:
    """All servers at once; methods of one take turns, and share prompts that it still holds."""
    tasks = parse_tasks(args.tasks)
    total = len(methods) * len(args.context) * len(tasks) * args.samples
    with tqdm(total=total, unit="sample", desc="all methods") as bar:

        async def serve(server: Server) -> None:
            for context, task, method in itertools.product(args.context, tasks, methods):
                if method.server == server.name:
                    await evaluate(method, server.url, task, context, args)
                    bar.update(args.samples)

        working = [asyncio.create_task(serve(server)) for server in servers.values()]
        try:
            await asyncio.gather(*working)
        finally:
            for each in working:
                each.cancel()
            await asyncio.gather(*working, return_exceptions=True)


def _load(args: argparse.Namespace) -> Load:
    return Load("evaluation", args.concurrency, max(args.context))


@contextlib.contextmanager
def _started(
    flags: dict[str, tuple[str, ...]], args: argparse.Namespace
) -> Iterator[dict[str, Server]]:
    with tqdm(total=len(flags), desc="starting", unit="server") as bar:

        def ready(name: str) -> None:
            bar.set_description(f"{name} is ready")
            bar.update()

        with running(flags, args.out, start_seconds=args.start_timeout, ready=ready) as servers:
            bar.close()
            yield {server.name: server for server in servers}


def _pools(
    methods: list[Method], args: argparse.Namespace, folder: Path, config: Any, device: str
) -> tuple[dict[str, int], bool]:
    """Tokens of each server's KV pool, and whether the servers fit into memory at once.

    A server of several methods holds a whole task's prompts where it can, so that they are
    prefilled once.
    """
    load = _load(args)
    backends = {method.server: method.backend for method in methods}
    least = dict.fromkeys(backends, pool_tokens([load], 0))
    whole_task = replace(load, requests=max(args.samples, args.concurrency))
    shared = Counter(method.server for method in methods)
    wished = {
        name: pool_tokens([whole_task], 0) if shared[name] > 1 else tokens
        for name, tokens in least.items()
    }

    def fit(pools: dict[str, int]) -> bool:
        each = [(backends[name], tokens) for name, tokens in pools.items()]
        return fit_at_once(each, folder, config, device, free_memory(device))

    if len(least) > 1 and not fit(wished) and fit(least):
        return least, True
    return wished, len(wished) < 2 or fit(wished)


def _sweep(args: argparse.Namespace) -> int:
    import torch
    from transformers import AutoConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    usual = "fa3" if device == "cuda" else "torch_native"
    methods = parse_methods(args.methods or f"{usual},{USUAL_SPARSE}")
    tasks = parse_tasks(args.tasks)  # before servers start
    run.check_arguments(argparse.Namespace(**vars(args), p=None, twilight="on"), tasks)
    model = args.model_path or str(ensure_embedded_model())
    config = AutoConfig.from_pretrained(model)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max(args.context) > longest:
        raise TwilightError(
            f"--context {max(args.context)} exceeds the {longest} tokens of {model}: pass less"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    of_server = {method.server: method for method in methods}
    pools, at_once = _pools(methods, args, Path(model), config, device)
    dense = next((method.name for method in methods if method.backend not in OURS), None)
    flags = {
        name: flags_of(method, args, model=model, dense=dense, device=device, tokens=pools[name])
        for name, method in of_server.items()
    }
    groups = [flags] if at_once else [{name: each} for name, each in flags.items()]
    for group in groups:
        with _started(group, args) as servers:
            mine = [method for method in methods if method.server in servers]
            asyncio.run(_evaluate_all(mine, servers, args))
    about = {"methods": [method.name for method in methods], "server_flags": flags}
    (args.out / "servers.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    runs = [results_file(method, args) for method in methods]
    return report.main(argparse.Namespace(runs=runs, out=args.out))


def main(args: argparse.Namespace) -> int:
    """Evaluate all methods; returns a process exit status, 1 with a message where one fails."""
    try:
        with terminations_interrupt():
            return _sweep(args)
    except (TwilightError, EmbeddedModelError, MeasurementError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"--out {args.out} or --model-path {args.model_path}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {args.out}", file=sys.stderr)
        return STOPPED
