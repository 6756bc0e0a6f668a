"""Accuracy of several runs side by side: a table in Markdown and a plot against the budget."""

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from twilight_sgl.benchmark.decode_figures import COLOURS
from twilight_sgl.errors import TwilightError
from twilight_sgl.evaluation.records import Key, Run, read_run
from twilight_sgl.evaluation.scoring import mean
from twilight_sgl.evaluation.tasks import TASKS

TABLE, PLOT = "accuracy.md", "accuracy.png"
_MARKERS = "osD^vP*X"


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
        if run.settings != new.settings:
            raise TwilightError(
                f"{path} is of {method!r} with other settings than a file before: name one of "
                "them by --method when you run it"
            )
        run.samples |= new.samples
        run.budgets += new.budgets
    return runs


def kept_share(run: Run, context: int, name: str = "kept_share") -> float | None:
    """Tokens attended to in sparse decode steps, of their context; None if none was sparse."""
    spent = [b["budget"] for b in run.budgets if b["context"] == context]
    total = sum(each["context_tokens"] for each in spent)
    if not total:
        return None
    return sum(each["context_tokens"] * (each[name] or 0) for each in spent) / total


def format_report(runs: dict[str, Run], *, with_plot: bool) -> str:
    """The whole report in Markdown."""
    every = {key for run in runs.values() for key in run.samples}
    settings = next(iter(runs.values())).settings
    dense = next((method for method, run in runs.items() if run.settings["dense"]), None)
    seeds = ", ".join(str(seed) for seed in sorted({seed for _, _, seed, _ in every}))
    parts = [
        "# Accuracy",
        f"`{settings['model']}`, seed {seeds}, greedy. Each cell: mean score in per cent (95 % "
        "interval: Wilson's where every sample is all right or all wrong, else bootstrap). A "
        "sample's score is the share of references that its output contains. Average: over all "
        "samples of a context.",
        _table(runs, every),
    ]
    if dense is not None and len(runs) > 1:
        scores = {key: sample["score"] for key, sample in runs[dense].samples.items()}
        passed = {key for key, score in scores.items() if score == 1}
        parts += [f"## Samples that {dense} passes", _table(runs, passed)]
        parts += [
            f"## Samples that {dense} fails",
            "In full or in part: what the model itself cannot do.",
            _table(runs, set(scores) - passed),
        ]
    if agreement := _agreement(runs):
        parts += ["## Agreement with a second server", agreement]
    parts += ["## Budgets", _budgets(runs)]
    if with_plot:
        parts.append(f"![Accuracy against average budget]({PLOT})")
    return "\n\n".join(parts) + "\n"


def plot(runs: dict[str, Run], path: Path) -> None:
    """Draw accuracy against the average budget, a mark for each method and context.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    contexts = _contexts({key for run in runs.values() for key in run.samples})
    for colour, (method, run) in enumerate(runs.items()):
        for marker, context in enumerate(contexts):
            scores = _scores(run, [key for key in run.samples if key[1] == context])
            if not scores:
                continue
            got, share = mean(scores), kept_share(run, context)
            axes.errorbar(
                1.0 if share is None else share,
                100 * got.value,
                yerr=[[100 * (got.value - got.low)], [100 * (got.high - got.value)]],
                color=COLOURS[colour % len(COLOURS)],
                marker=_MARKERS[marker % len(_MARKERS)],
                capsize=2,
                linestyle="none",
            )
        axes.plot([], [], color=COLOURS[colour % len(COLOURS)], linewidth=4, label=method)
    for marker, context in enumerate(contexts):
        axes.plot(
            [], [], _MARKERS[marker % len(_MARKERS)], color="black", label=f"{context} tokens"
        )
    axes.set_xscale("log")
    axes.set_xlabel("tokens attended to in sparse decode steps, of the context")
    axes.set_ylabel("average score, % (95 % interval)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _table(runs: dict[str, Run], keys: Collection[Key]) -> str:
    """Scores of these samples by context and task, and the average of each context."""
    if not keys:
        return "None."
    lines = [["context", "task", "samples", *runs]]
    for context in _contexts(keys):
        here = [key for key in keys if key[1] == context]
        by_task = {name: [key for key in here if key[0] == name] for name in TASKS}
        present = {name: of_task for name, of_task in by_task.items() if of_task}
        for task, of_task in present.items():
            lines.append(_row(runs, of_task, context, task))
        if len(present) > 1:
            lines.append(_row(runs, here, context, "average"))
    return _markdown(lines)


def _row(runs: dict[str, Run], keys: Sequence[Key], context: int, name: str) -> list[str]:
    groups = [_scores(run, keys) for run in runs.values()]
    counts = [str(len(scores)) for scores in groups]
    samples = counts[0] if len(set(counts)) == 1 else " / ".join(counts)
    cells = []
    for scores in groups:
        got = mean(scores) if scores else None
        cells.append(
            f"{100 * got.value:.1f} ({100 * got.low:.1f} to {100 * got.high:.1f})" if got else "-"
        )
    return [str(context), name, samples, *cells]


def _budgets(runs: dict[str, Run]) -> str:
    lines = [["method", "context", "candidates", "kept"]]
    for method, run in runs.items():
        for context in _contexts(run.samples):
            shares = [kept_share(run, context, name) for name in ("candidate_share", "kept_share")]
            shown = ["all" if share is None else f"{share:.2%}" for share in shares]
            lines.append([method, str(context), *shown])
    return (
        f"{_markdown(lines)}\n\nShares of the context in decode steps and layers that select, from "
        "the server's own counts while it was evaluated; all: no step selected, or the server "
        "has no such counts."
    )


def _agreement(runs: dict[str, Run]) -> str | None:
    """Outputs compared with a second server's, None where no run has any."""
    lines = [["method", "against", "context", "samples", "identical", "agreeing tokens", "of"]]
    for method, run in runs.items():
        for context in _contexts(run.samples):
            pairs = [
                sample["against"]
                for key, sample in run.samples.items()
                if key[1] == context and "against" in sample
            ]
            if pairs:
                names = ("identical", "agreeing_tokens", "output_tokens")
                same, agreed, of = (sum(p[name] for p in pairs) / len(pairs) for name in names)
                shown = [f"{same:.1%}", f"{agreed:.1f}", f"{of:.1f}"]
                about = [method, str(run.settings["against"]), str(context), str(len(pairs))]
                lines.append([*about, *shown])
    if len(lines) == 1:
        return None
    return (
        f"{_markdown(lines)}\n\nGreedy outputs of the same prompts: share that is the same to the "
        "last character; tokens before the first difference, and of the second server's output, "
        "on average."
    )


def _scores(run: Run, keys: Sequence[Key]) -> list[float]:
    return [run.samples[key]["score"] for key in sorted(keys) if key in run.samples]


def _contexts(keys: Collection[Key]) -> list[int]:
    return sorted({context for _, context, _, _ in keys})


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in ruled)


def main(args: argparse.Namespace) -> int:
    """Write the report; returns a process exit status, 1 with a message on bad input."""
    try:
        runs = read_runs(args.runs)
        args.out.mkdir(parents=True, exist_ok=True)
        drawn = True
        try:
            plot(runs, args.out / PLOT)
        except ImportError as error:
            drawn = False
            print(f"no plot ({error}): pip install matplotlib", file=sys.stderr)
        text = format_report(runs, with_plot=drawn)
        (args.out / TABLE).write_text(text, encoding="utf-8")
    except TwilightError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"--out {args.out} cannot be written: {error}", file=sys.stderr)
        return 1
    print(text)
    print(f"wrote {args.out / TABLE}{f' and {args.out / PLOT}' if drawn else ''}")
    return 0
