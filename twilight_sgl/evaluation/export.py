"""Tasks as a folder that lm-eval (`--include_path`) reads: samples, task files and the scoring."""

import argparse
import asyncio
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from twilight_sgl.benchmark.streaming import open_session
from twilight_sgl.errors import TwilightError
from twilight_sgl.evaluation import scoring
from twilight_sgl.evaluation.client import find_server
from twilight_sgl.evaluation.run import add_sample_arguments, load_tokenizer
from twilight_sgl.evaluation.tasks import GROUPS, PERPLEXITY, TASKS, make_sample, parse_tasks

GROUP = "twilight"
_FUNCTION = "!function"  # of the YAML dialect that lm-eval reads
_SCORING = Path(scoring.__file__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tasks",
        nargs="+",
        metavar="TASK",
        help=f"{', '.join(TASKS)}; or {' or '.join(GROUPS)} of them",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", help="path or name; prompts are sized by it")
    source.add_argument("--url", help="a server that says which tokenizer it has")
    add_sample_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


class _Dumper(yaml.SafeDumper):
    """Writes a `_Function` as lm-eval's tag for one."""


class _Function(str):
    """Name of a function in a module of the same folder."""


_Dumper.add_representer(
    _Function, lambda dumper, name: dumper.represent_scalar(_FUNCTION, str(name), style="")
)


def task_file(name: str, samples: Path, output_tokens: int) -> dict[str, Any]:
    """What lm-eval has to know of a task.

    Args:
        samples: JSON lines with `prompt` and `references`.
        output_tokens: room for the answer.
    """
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(samples.resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{references}}",
        "process_results": _Function(f"{_SCORING.stem}.{scoring.process_results.__name__}"),
        "metric_list": [{"metric": "recall", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {
            "until": [],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": output_tokens,
        },
        "metadata": {"version": 1.0},
    }


def export(args: argparse.Namespace, count_tokens: Callable[[str], int]) -> list[str]:
    """Write the folder; returns the names of its tasks.

    Raises:
        TwilightError: a task is unknown or does not fit the context.
    """
    tasks = parse_tasks(args.tasks)
    if PERPLEXITY in tasks:
        raise TwilightError(f"{PERPLEXITY} asks nothing that lm-eval could: leave it out")
    names = []
    args.out.mkdir(parents=True, exist_ok=True)
    total = len(args.context) * len(tasks) * args.samples
    with tqdm(total=total, unit="sample") as progress:
        for context in args.context:
            for task in tasks:
                name = f"{GROUP}_{task}_{context}"
                progress.set_description(f"{task} {context}")
                samples = args.out / f"{name}.jsonl"
                with samples.open("w", encoding="utf-8") as file:
                    for index in range(args.samples):
                        made = make_sample(task, context, args.seed, index, count_tokens)
                        row = {"prompt": made.prompt, "references": made.references}
                        file.write(json.dumps(row) + "\n")
                        progress.update()
                about = task_file(name, samples, TASKS[task].output_tokens)
                _write_yaml(args.out / f"{name}.yaml", about)
                names.append(name)
    shutil.copyfile(_SCORING, args.out / _SCORING.name)
    means = [{"metric": "recall", "weight_by_size": True}]
    group = {"group": GROUP, "task": names, "aggregate_metric_list": means}
    _write_yaml(args.out / f"{GROUP}.yaml", group)
    return names


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False)
    path.write_text(text, encoding="utf-8")


async def _tokenizer_of(url: str) -> str:
    async with open_session() as session:
        return (await find_server(session, url)).tokenizer


def main(args: argparse.Namespace) -> int:
    """Export; returns a process exit status, 1 with a message on bad input."""
    try:
        if args.samples < 1:
            raise TwilightError(f"--samples {args.samples}: pass at least 1")
        tokenize = load_tokenizer(args.tokenizer or asyncio.run(_tokenizer_of(args.url)))
        names = export(args, lambda prompt: len(tokenize(prompt)))
    except TwilightError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"--out {args.out} cannot be written: {error}", file=sys.stderr)
        return 1
    print(f"wrote {', '.join(names)} and the group {GROUP} to {args.out}")
    return 0
