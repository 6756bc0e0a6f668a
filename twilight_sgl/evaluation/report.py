"""Accuracy of several runs side by side: tables in Markdown, and pictures."""

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from twilight_sgl.errors import TwilightError
from twilight_sgl.evaluation.plots import ACCURACY, HEADS, MASS, draw
from twilight_sgl.evaluation.records import TEXT, Key, Run, read_run
from twilight_sgl.evaluation.tables import (
    agreement_table,
    budget_table,
    difference_table,
    perplexity_table,
    score_table,
    scored_keys,
)

TABLE = "accuracy.md"
_PICTURES = (
    (
        ACCURACY,
        "Accuracy against average budget",
        "Accuracy against the average budget of decode steps that select:",
    ),
    (
        HEADS,
        "Kept tokens by layer and KV head",
        "Tokens kept by layer and KV head, over all contexts, each step weighted by its context "
        "(of tensor-parallel servers the KV heads of rank 0):",
    ),
    (
        MASS,
        "Kept mass against p",
        "Kept mass against p: of the candidates' estimated weight, what each query head's own "
        "tokens hold. Those that others of its group or the newest pages add do not count, and "
        "tokens are kept whole, so it is more than p:",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="files of --json")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


def read_runs(paths: Sequence[Path]) -> dict[str, Run]:
    """Runs by method, in the order given; files of the same settings are one run.

    Raises:
        TwilightError: files do not belong in one table: of several models, of one method with
            different settings, or with different prompts for a sample.
    """
    runs: dict[str, Run] = {}
    prompts: dict[Key, tuple[str, Path]] = {}
    for path in dict.fromkeys(paths):
        new = read_run(path)
        if not new.samples:
            raise TwilightError(f"{path} holds no sample: leave it out, or finish the run")
        method = new.settings["method"]
        model = next(iter(runs.values()), new).settings["model"]
        if new.settings["model"] != model:
            raise TwilightError(
                f"{path} is of {new.settings['model']}, others are of {model}: report one model "
                "at a time"
            )
        for key, sample in new.samples.items():
            prompt, first = prompts.setdefault(key, (sample["prompt_sha256"], path))
            if sample["prompt_sha256"] != prompt:
                raise TwilightError(
                    f"{path} and {first} have different prompts for {key}: run both with one "
                    "Python, tokenizer and release of this package"
                )
        run = runs.setdefault(method, Run(new.settings))
        settings = _in_common(run.settings, new.settings)
        if settings is None:
            raise TwilightError(
                f"{path} is of {method!r} with other settings than a file before: name one of "
                "them by --method when you run it"
            )
        run.settings = settings
        run.samples |= new.samples
        run.budgets += new.budgets
    return runs


def _in_common(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """Settings of two files of one run, None where they differ; one of them may be of no text."""
    both = {**one, **other, TEXT: one.get(TEXT) or other.get(TEXT)}
    for settings in (one, other):
        own = {**settings, TEXT: settings.get(TEXT) or both[TEXT]}
        if own != both:
            return None
    return both


def format_report(runs: dict[str, Run], pictures: Collection[str]) -> str:
    """The whole report in Markdown; `pictures` are the files that were drawn for it."""
    scored = {key for run in runs.values() for key in scored_keys(run)}
    settings = next(iter(runs.values())).settings
    dense = next((method for method, run in runs.items() if run.settings["dense"]), None)
    seeds = {seed for run in runs.values() for _, _, seed, _ in run.samples}
    model = settings["model"]
    if Path(model).is_absolute():  # a folder of the server's
        model = Path(model).name
    parts = [
        "# Accuracy",
        f"`{model}`, seed {', '.join(map(str, sorted(seeds)))}, greedy.",
    ]
    if scored:
        parts[-1] += (
            " Each cell: mean score in per cent (95 % interval: Wilson's where every sample is all "
            "right or all wrong, else bootstrap). A sample's score is the share of references that "
            "its output contains. Average: over all samples of a context."
        )
        parts.append(score_table(runs, scored))
    if scored and dense is not None and len(runs) > 1:
        scores = {key: runs[dense].samples[key]["score"] for key in scored_keys(runs[dense])}
        passed = {key for key, score in scores.items() if score == 1}
        parts += [f"## Samples that {dense} passes", score_table(runs, passed)]
        parts += [
            f"## Samples that {dense} fails",
            "In full or in part: what the model itself cannot do.",
            score_table(runs, set(scores) - passed),
        ]
    if perplexity := perplexity_table(runs):
        parts += ["## Perplexity", perplexity]
    if dense is not None and len(runs) > 1:
        parts += [f"## Difference from {dense}", difference_table(runs, dense)]
    if agreement := agreement_table(runs):
        parts += ["## Agreement with a second server", agreement]
    parts += ["## Budgets", budget_table(runs)]
    parts += [
        f"{about}\n\n![{title}]({name})" for name, title, about in _PICTURES if name in pictures
    ]
    return "\n\n".join(parts) + "\n"


def main(args: argparse.Namespace) -> int:
    """Write the report; returns a process exit status, 1 with a message on bad input."""
    try:
        runs = read_runs(args.runs)
        args.out.mkdir(parents=True, exist_ok=True)
        pictures = []
        try:
            pictures = draw(runs, args.out)
        except ImportError as error:
            print(f"no plots ({error}): pip install matplotlib", file=sys.stderr)
        text = format_report(runs, pictures)
        (args.out / TABLE).write_text(text, encoding="utf-8")
    except TwilightError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"--out {args.out} cannot be written: {error}", file=sys.stderr)
        return 1
    print(text)
    print(f"wrote {', '.join(str(args.out / name) for name in (TABLE, *pictures))}")
    return 0
