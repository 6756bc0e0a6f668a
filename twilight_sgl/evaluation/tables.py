"""Tables of a report, in Markdown."""

import math
from collections.abc import Collection, Mapping, Sequence

from twilight_sgl.evaluation import budgets
from twilight_sgl.evaluation.records import Key, Run
from twilight_sgl.evaluation.scoring import bootstrap_mean, mean
from twilight_sgl.evaluation.tasks import PERPLEXITY, TASKS


def score_table(runs: Mapping[str, Run], keys: Collection[Key]) -> str:
    """Scores of these samples by context and task, and the average of each context."""
    if not keys:
        return "None."
    lines = [["context", "task", "samples", *runs]]
    for context in contexts_of(keys):
        here = [key for key in keys if key[1] == context]
        by_task = {name: [key for key in here if key[0] == name] for name in TASKS}
        present = {name: of_task for name, of_task in by_task.items() if of_task}
        for task, of_task in present.items():
            lines.append(_row(runs, of_task, context, task))
        if len(present) > 1:
            lines.append(_row(runs, here, context, "average"))
    return _markdown(lines)


def _row(runs: Mapping[str, Run], keys: Sequence[Key], context: int, name: str) -> list[str]:
    groups = [scores_of(run, keys) for run in runs.values()]
    samples = _same([str(len(scores)) for scores in groups])
    cells = []
    for scores in groups:
        got = mean(scores) if scores else None
        cells.append(
            f"{100 * got.value:.1f} ({100 * got.low:.1f} to {100 * got.high:.1f})" if got else "-"
        )
    return [str(context), name, samples, *cells]


def difference_table(runs: Mapping[str, Run], dense: str) -> str:
    """What each method's samples differ by from the same samples of the dense run."""
    others = {method: run for method, run in runs.items() if method != dense}
    lines = [["context", "figure", "samples", *others]]
    for context in contexts_of(runs[dense].samples):
        for figure in ("score", "nll"):
            groups = [_differences(run, runs[dense], context, figure) for run in others.values()]
            if any(groups):
                name = "score, points" if figure == "score" else "perplexity, ratio"
                samples = _same([str(len(group)) for group in groups])
                lines.append([str(context), name, samples, *(_change(g, figure) for g in groups)])
    return (
        f"{_markdown(lines)}\n\nSample by sample (95 % interval by bootstrap over samples), so "
        "what the model cannot do either way, or finds easy, adds no noise."
    )


def _differences(run: Run, dense: Run, context: int, figure: str) -> list[float]:
    return [
        sample[figure] - dense.samples[key][figure]
        for key, sample in sorted(run.samples.items())
        if key[1] == context and figure in sample and key in dense.samples
    ]


def _change(differences: Sequence[float], figure: str) -> str:
    if not differences:
        return "-"
    got = bootstrap_mean(differences)
    if figure == "nll":
        value, low, high = (math.exp(each) for each in (got.value, got.low, got.high))
        return f"{value:.3f} ({low:.3f} to {high:.3f})"
    return f"{100 * got.value:+.1f} ({100 * got.low:+.1f} to {100 * got.high:+.1f})"


def budget_table(runs: Mapping[str, Run]) -> str:
    """Candidates, kept tokens and kept mass by method and context."""
    lines = [["method", "context", "candidates", "kept", "kept mass"]]
    for method, run in runs.items():
        for context in contexts_of(run.samples):
            spent = budgets.spent(run, context)
            shares = [budgets.share(spent, name) for name in ("candidate_share", "kept_share")]
            shown = ["all" if share is None else f"{share:.2%}" for share in shares]
            mass = budgets.kept_mass(spent)
            shown.append("-" if mass is None else f"{mass:.2%}")
            lines.append([method, str(context), *shown])
    return (
        f"{_markdown(lines)}\n\nShares of the context in decode steps and layers that select, from "
        "the server's own counts while it was evaluated; all: no step selected, or the server "
        "has no such counts. Kept mass is what top-p kept of the attention weight that INT4 keys "
        "estimate for the candidates: not of the whole context's, which the selector has cut."
    )


def perplexity_table(runs: Mapping[str, Run]) -> str | None:
    """Perplexity by context and method, None where no run has any."""
    samples = {
        method: [sample for key, sample in run.samples.items() if key[0] == PERPLEXITY]
        for method, run in runs.items()
    }
    contexts = sorted({sample["context"] for own in samples.values() for sample in own})
    if not contexts:
        return None
    lines = [["context", "windows", "tokens", *runs]]
    for context in contexts:
        groups = [[each for each in own if each["context"] == context] for own in samples.values()]
        counts = [
            [str(len(own)), str(sum(each["scored_tokens"] for each in own))] for own in groups
        ]
        lines.append(
            [str(context), *map(_same, zip(*counts, strict=True)), *map(_perplexity, groups)]
        )
    return (
        f"{_markdown(lines)}\n\nExponential of the mean negative log-likelihood of a token (95 % "
        "interval by bootstrap over windows). Scored are the last tokens of each window: tokens "
        "that an SGLang server decoded, one a step, because it was made to; of other servers, "
        "tokens of a prompt."
    )


def _perplexity(samples: Sequence[Mapping[str, float]]) -> str:
    if not samples:
        return "-"
    got = mean([sample["nll"] for sample in samples])
    value, low, high = (math.exp(each) for each in (got.value, got.low, got.high))
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _same(values: Sequence[str]) -> str:
    """What all have in common, else each one's."""
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def agreement_table(runs: Mapping[str, Run]) -> str | None:
    """Outputs compared with a second server's, None where no run has any."""
    lines = [["method", "against", "context", "samples", "identical", "agreeing tokens", "of"]]
    for method, run in runs.items():
        for context in contexts_of(run.samples):
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


def scored_keys(run: Run) -> list[Key]:
    """Keys of samples that have a score."""
    return [key for key in run.samples if key[0] != PERPLEXITY]


def scores_of(run: Run, keys: Collection[Key]) -> list[float]:
    """Scores of those of the samples that the run has."""
    return [run.samples[key]["score"] for key in sorted(keys) if key in run.samples]


def contexts_of(keys: Collection[Key]) -> list[int]:
    """Contexts of samples, the smallest first."""
    return sorted({context for _, context, _, _ in keys})


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in ruled)
