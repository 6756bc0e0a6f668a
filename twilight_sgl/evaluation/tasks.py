"""The tasks by name, and samples of them sized for a context."""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twilight_sgl.errors import TwilightError
from twilight_sgl.evaluation.aggregation import common_words, frequent_words, variable_tracking
from twilight_sgl.evaluation.needles import BRANCHES, Build, Needles, multi_turn, passkey

_ENOUGH = 0.995  # of the room filled
_OTHERS_TOKENS = 32  # by which one question may be longer than another
_STEP = 16  # pieces by which every prompt grows, unless it has run out of different ones


@dataclass(frozen=True)
class Task:
    """How one task's samples are made.

    Attributes:
        prepare: draws what the sample is about; the result builds a prompt of a size, and what
            its answer must hold.
        output_tokens: room for the answer, as published.
        smallest: size below which there is nothing to find it among.
        others: further questions about what `prepare` draws from the same seed; as many samples
            in a row share their text.
    """

    prepare: Callable[[random.Random], Build]
    output_tokens: int
    smallest: int = 1
    others: tuple[Callable[[random.Random], Build], ...] = ()


@dataclass(frozen=True)
class Sample:
    """One prompt and what its answer must hold; `size` is the one it was built with."""

    task: str
    context: int
    seed: int
    index: int
    prompt: str
    references: list[str]
    prompt_tokens: int
    output_tokens: int
    size: int


TASKS = {
    "passkey": Task(passkey, 32),
    "niah_single_1": Task(Needles("noise"), 128),
    "niah_single_2": Task(Needles("essay"), 128),
    "niah_single_3": Task(Needles("essay", value="uuid"), 128),
    "niah_multikey_1": Task(Needles("essay", keys=4), 128),
    "niah_multikey_2": Task(Needles("needles"), 128),
    "niah_multikey_3": Task(Needles("needles", key="uuid", value="uuid"), 128),
    "niah_multivalue": Task(Needles("essay", values=4), 128),
    "niah_multiquery": Task(Needles("essay", keys=4, queries=4), 128),
    "vt": Task(variable_tracking, 30),
    "cwe": Task(common_words, 120),
    "fwe": Task(frequent_words, 50, smallest=100),
    "multi_turn": Task(
        functools.partial(multi_turn, branch=0),
        32,
        others=tuple(functools.partial(multi_turn, branch=n) for n in range(1, BRANCHES)),
    ),
}
PERPLEXITY = "perplexity"  # of a text that the user names: no prompt is made, nothing is answered
OWN = ("passkey", "multi_turn")  # not RULER's
GROUPS = {"all": tuple(TASKS), "ruler": tuple(name for name in TASKS if name not in OWN)}


def parse_tasks(names: Sequence[str]) -> list[str]:
    """Names of tasks, groups spelled out, each once.

    Raises:
        TwilightError: one is neither a task nor a group.
    """
    known = {*TASKS, *GROUPS, PERPLEXITY}
    if unknown := [name for name in names if name not in known]:
        raise TwilightError(
            f"no task {', '.join(map(repr, unknown))}; tasks: {', '.join(TASKS)}, {PERPLEXITY}; "
            f"groups: {', '.join(GROUPS)}"
        )
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))


def make_sample(
    task: str,
    context: int,
    seed: int,
    index: int,
    count_tokens: Callable[[str], int],
    known: tuple[int, int] | None = None,
) -> Sample:
    """The sample of (task, context, seed, index): always the same for one tokenizer and Python.

    Args:
        context: tokens that prompt and output take together, at most.
        count_tokens: tokens of a prompt, with what the tokenizer adds.
        known: size and tokens of the same sample's prompt, as made before; None to find them.
    Raises:
        TwilightError: the context is too small for the task, or too large for its words.
    """
    about = TASKS[task]
    questions = (about.prepare, *about.others)
    text, question = divmod(index, len(questions))
    drawn_from = f"{task} {context} {seed} {text}"
    first = about.prepare(random.Random(drawn_from))
    size, tokens = known or _fit(task, first, context, count_tokens)
    prompt, references = questions[question](random.Random(drawn_from))(size)
    if question and known is None:
        tokens = count_tokens(prompt)  # the text is the first question's, to be shared
    return Sample(task, context, seed, index, prompt, references, tokens, about.output_tokens, size)


def _fit(
    task: str, build: Build, context: int, count_tokens: Callable[[str], int]
) -> tuple[int, int]:
    """The size at which a prompt fills its context, and the prompt's tokens."""
    about = TASKS[task]
    limit = context - about.output_tokens - (_OTHERS_TOKENS if about.others else 0)
    low, low_tokens = about.smallest, count_tokens(build(about.smallest)[0])
    if low_tokens > limit:
        raise TwilightError(
            f"--context {context} is too small for {task}, which takes {low_tokens} tokens and "
            f"{about.output_tokens} of output: pass more, or leave the task out"
        )
    # The prompt grows with the size by nearly as many tokens a piece: interpolate, and bisect
    # where that is off.
    step = _STEP
    high, high_tokens = 0, 0
    while not high:
        tokens = count_tokens(build(low + step)[0])
        if tokens == low_tokens:
            raise TwilightError(
                f"--context {context} is more than {task} has different words for "
                f"({tokens} tokens): pass less, or leave the task out"
            )
        if tokens > limit:
            high, high_tokens = low + step, tokens
        else:
            grown = max((tokens - low_tokens) / step, 1e-9)
            low, low_tokens = low + step, tokens
            step = max(int((limit - tokens) / grown * 1.02), _STEP)
    while high - low > 1 and low_tokens < _ENOUGH * limit:
        share = (limit - low_tokens) / (high_tokens - low_tokens)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        tokens = count_tokens(build(middle)[0])
        if tokens <= limit:
            low, low_tokens = middle, tokens
        else:
            high, high_tokens = middle, tokens
    return low, low_tokens
