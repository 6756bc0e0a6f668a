"""Tasks against a live server, into a file of results that a later run goes on with."""

import argparse
import asyncio
import functools
import logging
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from tqdm import tqdm

from twilight_sgl import __version__
from twilight_sgl.benchmark.record import parse_tokens
from twilight_sgl.benchmark.streaming import open_session
from twilight_sgl.errors import TwilightError
from twilight_sgl.evaluation import perplexity
from twilight_sgl.evaluation.client import (
    Server,
    complete,
    find_server,
    method_name,
    read_info,
)
from twilight_sgl.evaluation.records import TEXT, Run, Writer
from twilight_sgl.evaluation.scoring import agreeing_tokens, recall
from twilight_sgl.evaluation.sizes import Prompts, prompt_hash
from twilight_sgl.evaluation.tasks import GROUPS, PERPLEXITY, TASKS, Sample, parse_tasks
from twilight_sgl.evaluation.text import text_hash
from twilight_sgl.request import RequestOptions
from twilight_sgl.telemetry.totals import between, twilight_states


def parse_contexts(value: str) -> tuple[int, ...]:
    """Read comma-separated counts of tokens: `4k,16k`."""
    return tuple(dict.fromkeys(parse_tokens(part.strip()) for part in value.split(",")))


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which samples of a task there are."""
    parser.add_argument(
        "--context",
        type=parse_contexts,
        default="4k",
        metavar="TOKENS,...",
        help="prompt and output together (default: %(default)s)",
    )
    parser.add_argument(
        "--samples", type=int, default=50, help="of each task and context (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tasks",
        nargs="+",
        metavar="TASK",
        help=f"{', '.join(TASKS)}; or {' or '.join(GROUPS)} of them; or {PERPLEXITY} of --text",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help=f"prose, for {PERPLEXITY}")
    parser.add_argument("--url", required=True, help="e.g. http://127.0.0.1:30000")
    parser.add_argument(
        "--against",
        metavar="URL",
        help="a second server, e.g. a dense one, whose greedy outputs are compared with",
    )
    add_sample_arguments(parser)
    parser.add_argument("--json", type=Path, required=True, help="results; gone on with if there")
    parser.add_argument(
        "--concurrency", type=int, default=8, help="requests at a time (default: %(default)s)"
    )
    parser.add_argument("--p", type=float, help="of every request; by default the server's")
    parser.add_argument(
        "--twilight", choices=["on", "off"], default="on", help="off: every request is dense"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="sizes of prompts, for runs with the same ones; begun if not there",
    )
    parser.add_argument("--tokenizer", help="path or name; by default what the server says")
    parser.add_argument("--method", help="name in reports; by default what the server decodes with")


def check_arguments(args: argparse.Namespace, tasks: Sequence[str]) -> dict[str, Any] | None:
    """Twilight's options for every request; None for the server's.

    Raises:
        TwilightError: a value that cannot be.
    """
    for name in ("samples", "concurrency"):
        if getattr(args, name) < 1:
            raise TwilightError(f"--{name} {getattr(args, name)}: pass at least 1")
    if PERPLEXITY in tasks and args.text is None:
        raise TwilightError(f"{PERPLEXITY} is of a text of yours: pass --text FILE")
    if PERPLEXITY not in tasks and args.text is not None:
        raise TwilightError(f"--text {args.text} is for the task {PERPLEXITY}: name it too")
    if args.twilight == "off":
        if args.p is not None:
            raise TwilightError(f"--p {args.p} and --twilight off: pass one of them")
        return {"enabled": False}
    if args.p is None:
        return None
    try:
        RequestOptions.from_custom_params({"twilight": {"p": args.p}})
    except TwilightError as error:
        raise TwilightError(f"--p {args.p}: {error}") from error
    return {"p": args.p}


def check_room(server: Server, contexts: Sequence[int]) -> None:
    """Raise TwilightError for a server without room for the contexts."""
    limit = server.context_tokens
    if limit is not None and max(contexts) > limit:
        raise TwilightError(
            f"--context {max(contexts)} exceeds the {limit} tokens that the server at "
            f"{server.url} takes: pass {limit} or less, or start it with a larger "
            "--context-length or --mem-fraction-static"
        )


def check_options(server: Server, twilight: dict[str, Any] | None) -> None:
    """Raise TwilightError for a server that does not know the options."""
    if twilight is not None and not twilight_states(server.info):
        flag = "--p" if "p" in twilight else "--twilight off"
        raise TwilightError(
            f"{flag}: the server at {server.url} does not decode with Twilight: leave it out, or "
            "start the server with python -m twilight_sgl.launch_server"
        )


class Tokenize(Protocol):
    """Gives a text's token ids."""

    def __call__(self, text: str, *, special: bool = True) -> list[int]:
        """With the tokens that the tokenizer adds, or without."""


@functools.cache
def load_tokenizer(name: str) -> Tokenize:
    """The tokenizer of that name.

    Raises:
        TwilightError: there is no such tokenizer here.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise TwilightError(
            f"the tokenizer {name} cannot be read here ({error}): pass --tokenizer, the folder of "
            "the served model's"
        ) from error

    def tokenize(text: str, *, special: bool = True) -> list[int]:
        return tokenizer(text, verbose=False, add_special_tokens=special).input_ids

    return tokenize


class Evaluation:
    """One pass of the command over its tasks and contexts.

    Args:
        other: server that outputs are compared with, if there is one.
        text: of which perplexity is asked for, if it is.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        server: Server,
        session: aiohttp.ClientSession,
        writer: Writer,
        tokenize: Tokenize,
        prompts: Prompts,
        twilight: dict[str, Any] | None,
        other: Server | None,
        text: perplexity.Text | None,
    ) -> None:
        self.args, self.server, self.session, self.writer = args, server, session, writer
        self.tokenize, self.prompts, self.twilight = tokenize, prompts, twilight
        self.other, self.text = other, text
        # Makes prompts while the server answers others; a tokenizer is for one thread at a time.
        self._maker = ThreadPoolExecutor(1)

    async def run(self, tasks: Sequence[str]) -> None:
        """Evaluate what the file does not hold yet."""
        done = self.writer.run.samples
        groups = {
            (task, context): [
                index
                for index in range(self.args.samples)
                if (task, context, self.args.seed, index) not in done
            ]
            for context in self.args.context
            for task in tasks
        }
        total = len(groups) * self.args.samples
        left = sum(map(len, groups.values()))
        name = self.args.method
        # Left on the terminal unless another bar stands above it.
        bar = tqdm(total=total, initial=total - left, unit="sample", leave=None)
        with self._maker, bar as progress:
            for (task, context), indices in groups.items():
                progress.set_description(" ".join(filter(None, (name, task, str(context)))))
                if indices:
                    await self._group(task, context, indices, progress)

    async def _group(self, task: str, context: int, indices: list[int], progress: tqdm) -> None:
        before = await read_info(self.session, self.server)
        waiting = iter(indices)

        async def work() -> None:
            for index in waiting:
                self.writer.add_sample(await self._sample(task, context, index))
                progress.update()

        workers = [asyncio.create_task(work()) for _ in range(self.args.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        spent = between(before, await read_info(self.session, self.server))
        if spent is not None:
            about = {"task": task, "context": context, "seed": self.args.seed}
            budget = {**spent.shares(), "heads": spent.heads()}
            self.writer.add_budget({**about, "samples": len(indices), "budget": budget})

    async def _sample(self, task: str, context: int, index: int) -> dict[str, Any]:
        if self.text is not None and task == PERPLEXITY:
            key = (context, self.args.seed, index)
            return await perplexity.measure(
                self.session, self.server, self.text, key, self.twilight
            )
        loop = asyncio.get_running_loop()
        sample: Sample = await loop.run_in_executor(
            self._maker, self.prompts.make, task, context, self.args.seed, index
        )
        sent = time.perf_counter()
        answer = await complete(
            self.session,
            self.server,
            sample.prompt,
            max_tokens=sample.output_tokens,
            twilight=self.twilight,
        )
        latency_s = time.perf_counter() - sent
        record = {
            "task": task,
            "context": context,
            "seed": self.args.seed,
            "index": index,
            "prompt_sha256": prompt_hash(sample),
            "prompt_tokens": sample.prompt_tokens,
            "served_prompt_tokens": answer.prompt_tokens,
            "output": answer.text,
            "references": sample.references,
            "score": recall(answer.text, sample.references),
            "latency_s": latency_s,
        }
        if self.other is not None:
            compared = await complete(
                self.session,
                self.other,
                sample.prompt,
                max_tokens=sample.output_tokens,
                twilight=None,
            )
            record["against"] = await loop.run_in_executor(
                self._maker, self._agreement, answer.text, compared.text
            )
        return record

    def _agreement(self, output: str, other: str) -> dict[str, Any]:
        own_tokens, other_tokens = (self.tokenize(text, special=False) for text in (output, other))
        return {
            "output": other,
            "identical": output == other,
            "agreeing_tokens": agreeing_tokens(own_tokens, other_tokens),
            "output_tokens": len(other_tokens),
        }


async def evaluate(args: argparse.Namespace) -> Run:
    """Evaluate what the file of results does not hold yet.

    Raises:
        TwilightError: an argument, the server or the file will not do.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tasks = parse_tasks(args.tasks)
    twilight = check_arguments(args, tasks)
    async with open_session() as session:
        server = await find_server(session, args.url)
        check_room(server, args.context)
        check_options(server, twilight)
        other = None
        if args.against is not None:
            other = await find_server(session, args.against, flag="--against")
            if other.url == server.url:
                raise TwilightError(
                    f"--against {args.against} is the server of --url, whose budgets would count "
                    "both outputs: pass another server's"
                )
            check_room(other, args.context)
        tokenizer = args.tokenizer or server.tokenizer
        tokenize = load_tokenizer(tokenizer)
        prompts = Prompts(args.prompts, lambda prompt: len(tokenize(prompt)))
        text = None
        if args.text is not None:
            perplexity.check_server(server)
            text = perplexity.read_text(args.text, tokenize)
            text.check(args.context)
        states = twilight_states(server.info)
        settings = {
            "method": args.method or method_name(server.info, twilight),
            "dense": not states or twilight == {"enabled": False},
            "model": server.model,
            "tokenizer": tokenizer,
            "endpoint": server.endpoint,
            "request": twilight,
            "against": None if other is None else method_name(other.info, None),
            "server": states[0]["config"] if states else None,
            "sglang": server.info.get("version"),
            "version": __version__,
            "text": text_hash(),
            TEXT: None if text is None else text.sha256,
        }
        with Writer(args.json, settings) as writer:
            for task in tasks:  # a context too small for one is better known before an hour's work
                if task in TASKS:
                    prompts.make(task, min(args.context), args.seed, 0)
            evaluation = Evaluation(
                args, server, session, writer, tokenize, prompts, twilight, other, text
            )
            await evaluation.run(tasks)
    return writer.run


def _summarise(run: Run) -> None:
    by_group: dict[tuple[int, str], list[float]] = {}
    for sample in run.samples.values():
        figure = "nll" if sample["task"] == PERPLEXITY else "score"
        by_group.setdefault((sample["context"], sample["task"]), []).append(sample[figure])
    for (context, task), figures in sorted(by_group.items()):
        average, count = sum(figures) / len(figures), len(figures)
        shown = f"{math.exp(average):7.3f}" if task == PERPLEXITY else f"{average:7.1%}"
        print(f"{task:16} {context:7d} {shown} of {count}")
    compared = [sample["against"] for sample in run.samples.values() if "against" in sample]
    if compared:
        identical = sum(each["identical"] for each in compared) / len(compared)
        print(f"{identical:.1%} of outputs are those of {run.settings['against']}")
    if not run.settings["dense"] and not any(b["budget"]["context_tokens"] for b in run.budgets):
        print(
            "no decode step was sparse, so these are figures of dense attention: see the server's "
            "--twilight-min-context-tokens and --twilight-min-step-mb (0 makes small steps sparse)",
            file=sys.stderr,
        )


def main(args: argparse.Namespace) -> int:
    """Evaluate; returns a process exit status, 1 with a message on bad input."""
    try:
        run = asyncio.run(evaluate(args))
    except TwilightError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {args.json}", file=sys.stderr)
        return 130
    _summarise(run)
    return 0
