"""Decoding of whole servers: dense attention, Quest without pruner and Twilight side by side."""

import argparse
import asyncio
import contextlib
import shlex
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from tqdm import tqdm

from twilight_sgl.benchmark.decode_figures import Measured
from twilight_sgl.benchmark.decode_options import (
    add_arguments,
    check_first_tokens,
    check_loads,
    check_radix_cache,
    check_repetitions,
    check_server,
    choose_backends,
    parse_urls,
)
from twilight_sgl.benchmark.decode_report import ROWS, Report
from twilight_sgl.benchmark.floor import Model, gpu_bandwidth
from twilight_sgl.benchmark.model_files import load_model_files
from twilight_sgl.benchmark.prompts import (
    Load,
    cut_prompts,
    encode_tokens,
    read_text,
    tokens_needed,
)
from twilight_sgl.benchmark.servers import (
    Server,
    dense_backend,
    fit_at_once,
    free_memory,
    pool_tokens,
    running,
    server_flags,
    terminations_interrupt,
)
from twilight_sgl.benchmark.streaming import (
    MeasurementError,
    Stream,
    flush_cache,
    generate,
    open_session,
    server_info,
)
from twilight_sgl.embedded_model import EmbeddedModelError, ensure_embedded_model
from twilight_sgl.errors import TwilightError

# A request that starts first decodes alone until the last one starts; it may take so many times
# --output-tokens until all have had theirs together, or so many steps for each that starts, as
# SGLang's HTTP process reads a long prompt in about two steps of a small model.
SLACK = 4
STEPS_A_START = 4
CHUNKS_A_STEP = 4  # more and the server's streaming, not its decoding, is measured
# A first token that is soon there depends on which requests happen to share a batch.
LEAST_ROUNDS = 8
SOON_TOKENS = 1 << 17  # of all prompts of a load together
WARM_UP_TOKENS = 8
# A server is still at work when its answer has come: SGLang decodes a step ahead.
PAUSE_SECONDS = 0.05
ENDING_SECONDS = 5.0  # from a broken connection to the end of the process, if that is why

__all__ = ["add_arguments", "main"]

Prompts = dict[Load, list[list[int]]]
Answer = TypeVar("Answer")


class Benchmark:
    """What one run of the command holds: the options, prompts and what was measured."""

    def __init__(self, args: argparse.Namespace, prompts: Prompts, context_tokens: int) -> None:
        self.args = args
        self.prompts = prompts
        self.context_tokens = context_tokens
        self.start = 0
        self.results: list[Measured] = []
        self.flags: dict[str, tuple[str, ...]] = {}

    def most_tokens(self, load: Load) -> int:
        """Output tokens that a request of the timed pass may take."""
        tokens = self.args.output_tokens
        room = self.context_tokens - load.prompt_tokens - 1
        return min(max(SLACK * tokens, tokens + STEPS_A_START * load.requests), room)

    def repeats(self, load: Load, *, all_cached: bool = False) -> int:
        """How many times more a load is asked for first tokens, in one state of the cache."""
        rounds = -(-self.args.first_tokens // load.requests)
        soon = all_cached or load.requests * load.prompt_tokens <= SOON_TOKENS
        return (max(rounds, LEAST_ROUNDS) if soon else rounds) - 1

    def interval(self, load: Load) -> int:
        """Tokens a chunk."""
        return self.args.stream_interval or max(load.requests // CHUNKS_A_STEP, 1)

    async def measure(
        self, servers: Sequence[Server], progress: tqdm, save: Callable[[], object]
    ) -> None:
        """Measure servers in turn, load by load and pass by pass; `save` what there is of each."""
        self.flags |= {server.name: server.flags for server in servers}
        async with open_session() as session:
            for server in servers:
                info = await _ask(server, server_info(session, server.url))
                most = max(map(self.most_tokens, self.prompts))
                check_server(server, info, list(self.prompts), most, self.args.shared_prefix)
                first = next(iter(self.prompts.values()))[:1]
                progress.set_description(f"{server.name}, warm up")
                url = server.url
                await _ask(server, generate(session, url, first, max_tokens=WARM_UP_TOKENS))
            for load in self.prompts:
                await self._measure_load(session, servers, load, progress, save)

    async def _measure_load(
        self,
        session: aiohttp.ClientSession,
        servers: Sequence[Server],
        load: Load,
        progress: tqdm,
        save: Callable[[], object],
    ) -> None:
        prompts, interval = self.prompts[load], self.interval(load)
        tokens, prefix_tokens = self.args.output_tokens, self.args.shared_prefix
        cold, prefix = {}, {}
        repeats: dict[str, dict[str, list[Stream]]] = {server.name: {} for server in servers}

        async def in_turn(turn: int, what: str) -> AsyncIterator[Server]:
            """Servers one after another, every other turn the other way round."""
            for server in servers[:: -1 if turn % 2 else 1]:
                progress.set_description(f"{load.name} {server.name}, {what}")
                await asyncio.sleep(PAUSE_SECONDS)
                yield server
                progress.update()

        async def first_tokens(server: Server, cached: list[list[int]] | None) -> list[Stream]:
            """Answers of one token, with nothing but `cached` cached; None leaves the cache."""
            if cached is not None:
                await _ask(server, flush_cache(session, server.url))
            if cached:
                await _ask(server, generate(session, server.url, cached, max_tokens=1))
            return await _ask(server, generate(session, server.url, prompts, max_tokens=1))

        async def repeat(name: str, cached: list[list[int]] | None, turn: int = 0) -> int:
            """Ask for first tokens again, from a turn on; returns the next one."""
            last = turn + self.repeats(load, all_cached=cached is None)
            for number in range(turn, last):
                async for server in in_turn(number, f"first tokens, {name}"):
                    answers = await first_tokens(server, cached)
                    repeats[server.name].setdefault(name, []).extend(answers)
            return last

        async for server in in_turn(await repeat("cold", []), "cold"):
            await _ask(server, flush_cache(session, server.url))
            answer = generate(
                session, server.url, prompts, max_tokens=tokens, stream_interval=interval
            )
            cold[server.name] = await _ask(server, answer)
        if prefix_tokens:
            shared = [prompts[0][:prefix_tokens]]
            async for server in in_turn(await repeat("prefix", shared), "prefix cached"):
                prefix[server.name] = await first_tokens(server, shared)
        for turn in range(self.args.passes):
            async for server in in_turn(turn, "timed"):
                name = server.name
                before = await _ask(server, server_info(session, server.url))
                answer = generate(
                    session,
                    server.url,
                    prompts,
                    max_tokens=self.most_tokens(load),
                    stream_interval=interval,
                    phase_tokens=tokens,
                )
                timed = await _ask(server, answer)
                after = await _ask(server, server_info(session, server.url))
                of_start = cold[name], prefix.get(name)
                more = repeats[name], self.start
                self.results.append(Measured(name, load, *of_start, timed, before, after, *more))
        save()
        await repeat("timed", None, turn=self.args.passes)
        save()


async def _ask(server: Server, answer: Awaitable[Answer]) -> Answer:
    """What a server answers.

    Raises:
        MeasurementError: it ended, with the end of its log, or the connection did.
    """
    try:
        return await answer
    except (aiohttp.ClientError, OSError) as error:
        await asyncio.to_thread(server.check, ENDING_SECONDS)
        raise MeasurementError(f"{server.name!r} at {server.url}: {error!r}") from error


def _first_info(urls: dict[str, str]) -> dict[str, Any]:
    """What each URL's server says, by the first; all must answer."""

    async def ask() -> list[dict[str, Any]]:
        async with open_session() as session:
            infos = []
            for name, url in urls.items():
                try:
                    infos.append(await server_info(session, url))
                except (aiohttp.ClientError, OSError) as error:
                    raise TwilightError(f"--urls {name}={url} does not answer: {error}") from error
            return infos

    return asyncio.run(ask())[0]


def _make_prompts(args: argparse.Namespace, tokenizer: Any) -> Prompts:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    need = max(tokens_needed(load, args.shared_prefix) for load in args.loads)
    ids = encode_tokens(encode, read_text(args.text, need), need)
    lead = list(tokenizer("").input_ids)
    return {
        load: cut_prompts(ids, load, shared_prefix=args.shared_prefix, seed=args.seed, lead=lead)
        for load in args.loads
    }


def _groups(
    args: argparse.Namespace,
    names: Sequence[str],
    urls: dict[str, str],
    model: str,
    config: Any,
    most_tokens: int,
    device: str,
) -> list[dict[str, tuple[str, ...]]]:
    """Flags by name of the servers to start, one group after another; none for one that runs."""
    tokens: int | None = pool_tokens(args.loads, most_tokens, args.shared_prefix)
    start = [name for name in names if name not in urls]
    at_once = args.side_by_side
    if at_once is None:
        at_once = len(start) < 2 or fit_at_once(
            [(name, tokens or 0) for name in start],
            Path(model),
            config,
            device,
            free_memory(device),
        )
        if not at_once:
            print("servers run one after another: they may not fit at once", file=sys.stderr)
    if not at_once and device == "cuda":
        tokens = None
    extra = shlex.split(args.server_args)
    flags: dict[str, tuple[str, ...]] = {
        name: server_flags(
            name,
            model=model,
            p=args.p,
            dense=dense_backend(names),
            device=device,
            loads=args.loads,
            max_total_tokens=tokens,
            extra=extra,
        )
        if name in start
        else ()
        for name in names
    }
    return [flags] if at_once else [{name: flags[name]} for name in names]


@contextlib.contextmanager
def _servers(
    group: dict[str, tuple[str, ...]], urls: dict[str, str], args: argparse.Namespace, logs: Path
) -> Iterator[list[Server]]:
    """A group's servers, in order: those that run, and those that are started here."""
    logs.mkdir(exist_ok=True)
    start = {name: flags for name, flags in group.items() if name not in urls}
    bar = tqdm(total=len(start), desc="starting", unit="server", disable=not start)

    def ready(name: str) -> None:
        bar.set_description(f"{name} is ready")
        bar.update()

    with bar, running(start, logs, start_seconds=args.start_timeout, ready=ready) as started:
        bar.close()
        by_name = {server.name: server for server in started}
        yield [by_name.get(name) or Server(name, urls[name]) for name in group]


def _run(args: argparse.Namespace) -> None:
    import torch

    from twilight_sgl.benchmark.timing import describe_machine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    urls = parse_urls(args.urls)
    names = choose_backends(args.backends, urls, device)
    check_repetitions(args.starts, args.passes, urls)
    check_first_tokens(args.first_tokens)
    model = args.model_path
    info = _first_info(urls) if urls else {}
    if model is None and urls:
        model = info.get("tokenizer_path") or info["model_path"]
    if model is None:
        model = str(ensure_embedded_model())
    tokenizer, config, context = load_model_files(model, shlex.split(args.server_args))
    context = info.get("context_length") or context
    check_loads(args.loads, args.output_tokens, args.shared_prefix, context)
    no_cache = "--disable-radix-cache" in shlex.split(args.server_args)
    check_radix_cache(args.shared_prefix, disabled=no_cache)
    args.out.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(args, _make_prompts(args, tokenizer), context)
    most = max(map(benchmark.most_tokens, args.loads))
    groups = _groups(args, names, urls, model, config, most, device)
    shape = Model.read(Path(model), config)
    bandwidth = gpu_bandwidth() if shape else None
    others = 2 if args.shared_prefix else 1  # states of the cache but the one that holds all
    rounds = (
        others * (1 + benchmark.repeats(load))
        + args.passes
        + benchmark.repeats(load, all_cached=True)
        for load in args.loads
    )
    passes = len(names) * sum(rounds)
    about = {
        "model": Path(model).name,
        "shared_prefix_tokens": args.shared_prefix,
        "side_by_side": len(groups) == 1,
        "seed": args.seed,
        "command": shlex.join(["python", "-m", "twilight_sgl.benchmark", *sys.argv[1:]]),
        **describe_machine(),
        **({"commit": args.commit} if args.commit else {}),
    }
    intervals = {load.name: benchmark.interval(load) for load in args.loads}
    report = Report(args.out, names, args.output_tokens, intervals, shape, bandwidth, about)
    report.clear()

    def save() -> list[dict[str, Any]]:
        return report.save(benchmark.results, benchmark.flags)

    back = [dict(reversed(group.items())) for group in reversed(groups)]
    try:
        for start in range(args.starts):
            benchmark.start = start
            logs = args.out / f"start-{start + 1}" if args.starts > 1 else args.out
            for group in back if start % 2 else groups:
                with _servers(group, urls, args, logs) as servers:
                    share = passes * len(group) // len(names)
                    with tqdm(total=share, unit="pass", dynamic_ncols=True) as progress:
                        asyncio.run(benchmark.measure(servers, progress, save))
    except BaseException:
        saved = []
        with contextlib.suppress(MeasurementError):  # of a pass cut short; say what cut it
            saved = save()
        if saved:
            print(f"what was measured until then is in {args.out / ROWS}", file=sys.stderr)
        raise
    report.finish(benchmark.results, benchmark.flags)


def main(args: argparse.Namespace) -> int:
    """Run the benchmark.

    Returns:
        0; 1 where a server failed; 2 for what cannot be run as asked; 130 after Ctrl-C or SIGTERM.
    """
    try:
        with terminations_interrupt():
            _run(args)
    except MeasurementError as error:
        print(f"twilight_sgl.benchmark decode: {error}", file=sys.stderr)
        return 1
    except (TwilightError, EmbeddedModelError) as error:
        print(f"twilight_sgl.benchmark decode: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; all servers that were started are ended", file=sys.stderr)
        return 130
    return 0
