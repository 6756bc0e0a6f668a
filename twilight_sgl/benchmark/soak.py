"""A mixed load on a live server, for minutes or days: is the seal invariant kept, memory steady?"""

import argparse
import asyncio
import contextlib
import functools
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from twilight_sgl.benchmark.files import write_json
from twilight_sgl.benchmark.prompts import read_text
from twilight_sgl.benchmark.record import parse_tokens
from twilight_sgl.benchmark.servers import terminations_interrupt
from twilight_sgl.benchmark.soak_client import Client
from twilight_sgl.benchmark.soak_figures import Record, format_table, plot
from twilight_sgl.benchmark.soak_load import Item, Plan, Sizes
from twilight_sgl.benchmark.soak_memory import MemoryReader
from twilight_sgl.benchmark.streaming import MeasurementError, open_session
from twilight_sgl.errors import TwilightError
from twilight_sgl.evaluation.client import Server, find_server
from twilight_sgl.evaluation.run import load_tokenizer
from twilight_sgl.telemetry.totals import twilight_states

TEXT_TOKENS = 1 << 16  # at least, of which prompts are slices
_CHARACTERS_PER_TOKEN = 5
_MIB = 1 << 20
_SAVE_SECONDS = 60.0  # between writes of --json, which outlast whatever ends the soak


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:30000",
        help="a server with an audit that nobody else uses; its cache is flushed "
        "(default: %(default)s)",
    )
    parser.add_argument("--minutes", type=_positive, default=10.0)
    parser.add_argument(
        "--concurrency",
        type=int,
        default=8,
        metavar="N",
        help="conversations, requests or bursts at a time; branches and bursts are several "
        "requests each (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=parse_tokens,
        metavar="TOKENS",
        help="longest prompt, by which others are sized (default: a quarter of the KV pool, "
        "within the context)",
    )
    parser.add_argument(
        "--output-tokens",
        type=parse_tokens,
        metavar="TOKENS",
        help="longest answer but for bursts (default: a sixteenth of the longest prompt, "
        "16 to 512)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is sent, and in which order")
    parser.add_argument("--sample-seconds", type=_positive, default=5.0, metavar="SECONDS")
    parser.add_argument(
        "--max-growth-mb",
        type=_positive,
        default=512.0,
        metavar="MB",
        help="fail if the memory of the server's processes, or on its GPUs, is larger by more "
        "at the end than at one fifth of the run (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write all figures and samples, once a minute and at the end",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw memory, sealed pages and violations over time (needs matplotlib)",
    )


def _positive(value: str) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return number


class Soak:
    """One run against one server: the load, and samples of the server beside it.

    Args:
        save: called once a minute, to write what was seen so far.
    """

    def __init__(
        self,
        client: Client,
        plan: Plan,
        args: argparse.Namespace,
        audit_interval: int,
        save: Callable[[], object],
    ) -> None:
        self.client = client
        self.record = client.record
        self._plan = plan
        self._args = args
        self._audit_interval = audit_interval
        self._save = save

    async def run(self) -> None:
        """Send the load, then the last batch; fills the record.

        Raises:
            MeasurementError: the server ended, or requests of it do not.
        """
        await self.client.sample()
        total = self.record.seconds
        with tqdm(total=round(total), unit="s", dynamic_ncols=True, desc="soak") as progress:
            sampling = asyncio.create_task(self._keep_sampling(progress))
            working = asyncio.create_task(self._work())
            try:
                await asyncio.wait({sampling, working}, return_when=asyncio.FIRST_COMPLETED)
                for task in (sampling, working):
                    if task.done():
                        task.result()
            finally:
                for task in (sampling, working):
                    task.cancel()
                await asyncio.gather(sampling, working, return_exceptions=True)

    async def _keep_sampling(self, progress: tqdm) -> None:
        saved = 0.0
        while True:
            await asyncio.sleep(self._args.sample_seconds)
            sample = await self.client.sample()
            if sample.seconds >= saved + _SAVE_SECONDS:
                saved = sample.seconds
                with contextlib.suppress(OSError):  # a disk that is full may not be at the end
                    self._save()
            progress.n = min(round(sample.seconds), progress.total)
            if self._is_over():
                progress.set_description("last requests", refresh=False)
            done = sum(tally.outcomes.total() for tally in self.record.tallies.values())
            memory = "" if sample.host_bytes is None else f", {sample.host_bytes / _MIB:,.0f} MB"
            progress.set_postfix_str(
                f"{done} requests, {len(self.record.failures)} failed, {sample.checks} audits, "
                f"{sample.violations} violations{memory}"
            )

    async def _work(self) -> None:
        number = 0
        while not self._is_over():
            items = iter(self._plan.round(number))
            await self.client.together(
                [self._take(items) for _ in range(max(self._args.concurrency, 1))]
            )
            number += 1
            if number % 2 == 0:  # else it would hardly ever find the server idle
                await self.client.flush_when_idle()
        await self._finish()

    def _is_over(self) -> bool:
        return self.client.seconds() >= self.record.seconds

    async def _take(self, items: Iterator[Item]) -> None:
        for item in items:
            await self.client.send(item, self._is_over)
            if self._is_over():
                return

    async def _finish(self) -> None:
        """Fill a clean cache, and see it audited."""
        await self.client.flush_when_idle()
        before = await self.client.sample()
        steps = self._audit_interval + 2
        tokens = min(steps, self._plan.sizes.output_tokens)
        last = self._plan.last(tokens)
        for _ in range(2 * (steps // tokens + 1)):
            await self.client.send(last, lambda: False)
            if (await self.client.sample()).checks > before.checks:
                self.record.finished = True
                return
        raise MeasurementError(
            f"the last batch was not audited, though it took at least {steps} decode steps"
        )


async def _text_ids(session: aiohttp.ClientSession, server: Server, tokens: int) -> list[int]:
    """About so many token ids of text, or more: from the server, else from its tokenizer's folder.

    SGLang 0.5.17 answers with an error for tokenizers that state no longest input.
    """
    text = read_text(None, tokens)[: tokens * _CHARACTERS_PER_TOKEN]
    body = {"prompt": text, "add_special_tokens": False}
    url = f"{server.url}/v1/tokenize"
    try:
        async with session.post(url, json=body) as response:
            answer = await response.text()
    except (aiohttp.ClientError, OSError) as error:
        raise TwilightError(f"--url {url} does not answer: {error!r}") from error
    try:
        return json.loads(answer)["tokens"]
    except (ValueError, LookupError, TypeError):
        pass
    try:
        return load_tokenizer(server.tokenizer)(text, special=False)
    except TwilightError as error:
        raise TwilightError(
            f"--url {url} answered {response.status}: {answer[:500]}, and the tokenizer "
            f"{server.tokenizer} is not on this machine: run the soak where it is"
        ) from error


def check_server(server: Server) -> dict[str, Any]:
    """Twilight's configuration of a server.

    Raises:
        TwilightError: it decodes otherwise, or has no audit.
    """
    states = twilight_states(server.info)
    if not states:
        raise TwilightError(
            f"--url {server.url} does not decode with Twilight: start it with "
            "python -m twilight_sgl.launch_server --twilight-audit-interval 16"
        )
    config: dict[str, Any] = states[0]["config"]
    if config["audit_interval"] < 1:
        raise TwilightError(
            f"--url {server.url} has no audit: start it with --twilight-audit-interval 16"
        )
    return config


async def _run(args: argparse.Namespace, record: Record, about: dict[str, Any]) -> None:
    async with open_session() as session:
        server = await find_server(session, args.url)
        config = check_server(server)
        pool_tokens = server.info["max_total_num_tokens"]
        sizes = Sizes.fit(
            pool_tokens,
            server.context_tokens or pool_tokens,
            config,
            prompt_tokens=args.prompt_tokens,
            output_tokens=args.output_tokens,
        )
        ids = await _text_ids(session, server, max(TEXT_TOKENS, 4 * sizes.long_tokens))
        about |= {
            "model": Path(server.model).name,
            "kv_tokens": pool_tokens,
            "context_tokens": server.context_tokens,
            "sglang": server.info.get("version"),
            "prompt_tokens": sizes.long_tokens,
            "output_tokens": sizes.output_tokens,
            "twilight": config,
        }
        try:
            _write(args, record, about)
        except OSError as error:
            raise TwilightError(
                f"--json {args.json} cannot be written: {error}; name a file in a folder that is "
                "there and can be written to"
            ) from error
        memory = MemoryReader(server.url)
        about["gpu_memory_of"] = memory.gpu_of
        if not memory.is_local:
            record.notes.append("memory is not known: no process of this machine has that port")
        client = Client(session, server.url, record, memory)
        try:
            refusal = await client.grammar_refusal()
            if refusal:
                record.notes.append(f"no constrained requests, which the server refuses: {refusal}")
            plan = Plan(ids, sizes, args.seed, grammar=not refusal)
            save = functools.partial(_write, args, record, about)
            await Soak(client, plan, args, config["audit_interval"], save).run()
        except MeasurementError as error:
            record.died = str(error)


def _problems(args: argparse.Namespace, record: Record) -> list[str]:
    return list(record.problems(round(args.max_growth_mb * _MIB)))


def _write(args: argparse.Namespace, record: Record, about: dict[str, Any]) -> None:
    """Write --json, if asked for, in place of what was written before.

    Raises:
        OSError: it cannot be written; then it is as it was.
    """
    if args.json is None:
        return
    values = {
        **about,
        "seed": args.seed,
        "concurrency": args.concurrency,
        "max_growth_mb": args.max_growth_mb,
        "problems": _problems(args, record),
        **record.to_dict(),
        "command": shlex.join(["python", "-m", "twilight_sgl.benchmark", *sys.argv[1:]]),
    }
    write_json(args.json, values)


def _report(args: argparse.Namespace, record: Record, about: dict[str, Any]) -> int:
    """Print and write what was seen so far; the exit status."""
    if record.samples:
        print(f"\n{format_table(record)}")
    problems = _problems(args, record)
    if args.json is not None:
        try:
            _write(args, record, about)
            print(f"wrote {args.json}", file=sys.stderr)
        except OSError as error:
            problems.append(f"--json {args.json} is as it last was: {error}")
    if args.plot is not None and record.samples:
        try:
            plot(record, args.plot)
            print(f"wrote {args.plot}", file=sys.stderr)
        except Exception as failure:  # the figures are shown; a plotting library may be broken
            print(f"no plot: {type(failure).__name__}: {failure}", file=sys.stderr)
    for problem in problems:
        print(f"twilight_sgl.benchmark soak: {problem}", file=sys.stderr)
    return 1 if problems else 0


def main(args: argparse.Namespace) -> int:
    """Run the soak.

    Returns:
        0; 1 where the server broke the seal invariant, failed, ended or took more memory; 2 for
        what cannot be run as asked; 130 after Ctrl-C or SIGTERM.
    """
    record = Record(args.minutes * 60)
    about: dict[str, Any] = {}
    try:
        with terminations_interrupt():
            asyncio.run(_run(args, record, about))
            return _report(args, record, about)
    except TwilightError as error:
        print(f"twilight_sgl.benchmark soak: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; its requests are ended", file=sys.stderr)
        _report(args, record, about)
        return 130
