"""Retrieval: a pass key (Mohtashami and Jaggi, arXiv 2305.16300, section 4.2) and RULER's eight
needles in a haystack (Hsieh et al., arXiv 2404.06654, section 3 and appendix B).

Key and value types, numbers of needles and queries, and haystacks are the published ones; the
wording is our own, and essays are sentences of Python's manual. And a task of our own: facts that
are planted early in a text and asked for late, in several conversations that share it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twilight_sgl.evaluation import text

Build = Callable[[int], tuple[str, list[str]]]
BRANCHES = 4  # conversations of `multi_turn` about one text
KINDS = {"number": text.numbers, "uuid": text.uuids, "name": text.names}


@dataclass(frozen=True)
class Needles:
    """One variant of needle in a haystack.

    Attributes:
        haystack: `noise`, `essay` or `needles` (of other keys).
        key, value: kinds of keys and values.
        keys: keys in the haystack.
        values: values of each key.
        queries: keys that are asked for.
    """

    haystack: str
    key: str = "name"
    value: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def __call__(self, rng: random.Random) -> Build:
        """Draw the needles; the result builds a prompt around so many filler sentences."""
        keys, values = KINDS[self.key](rng), KINDS[self.value](rng)
        of_key = {
            key: values.first((place + 1) * self.values)[place * self.values :]
            for place, key in enumerate(keys.first(self.keys))
        }
        asked = list(of_key)[: self.queries]
        references = [value for key in asked for value in of_key[key]]
        needles = [self._sentence(key, value) for key in of_key for value in of_key[key]]
        depths = [rng.random() for _ in needles]
        filler = text.noise(rng) if self.haystack == "noise" else text.essay(rng)

        def sentences(count: int) -> list[str]:
            if self.haystack != "needles":
                return filler.first(count)
            used = self.keys * self.values
            others = keys.first(self.keys + count)[self.keys :]
            wrong = values.first(used + count)[used:]
            return [self._sentence(*pair) for pair in zip(others, wrong, strict=False)]

        plural = len(references) > 1
        what = f"secret {self.value}{'s' if plural else ''} of {_listed(asked)}"

        def build(size: int) -> tuple[str, list[str]]:
            hidden = hide(sentences(size), needles, depths)
            return (
                f"Secret {self.value}s are hidden in the text below. Remember them: you will be "
                f"asked for some of them.\n\n{hidden}\n\nQuestion: Which {what} "
                f"{'are' if plural else 'is'} given in the text above?\nAnswer: The {what} given "
                f"in the text {'are' if plural else 'is'}",
                references,
            )

        return build

    def _sentence(self, key: str, value: str) -> str:
        return f"The secret {self.value} of {key} is {value}."


def hide(sentences: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """One text of all sentences, with each needle before the sentence at its depth in [0, 1)."""
    parts = [(float(place), sentence) for place, sentence in enumerate(sentences)]
    parts += [
        (int(depth * (len(sentences) + 1)) - 0.5, needle)
        for depth, needle in zip(depths, needles, strict=True)
    ]
    return " ".join(sentence for _, sentence in sorted(parts, key=lambda part: part[0]))


def passkey(rng: random.Random) -> Build:
    """Draw a pass key of five digits; the result builds a prompt around so many sentences."""
    key, depth = str(rng.randrange(10**4, 10**5)), rng.random()
    filler = text.noise(rng)
    fact = f"The pass key is {key}. Remember it: {key} is the pass key."

    def build(size: int) -> tuple[str, list[str]]:
        hidden = hide(filler.first(size), [fact], [depth])
        return (
            "One important fact is hidden in a lot of text that does not matter. Find it and "
            f"remember it.\n\n{hidden}\n\nWhat is the pass key? The pass key is",
            [key],
        )

    return build


def multi_turn(rng: random.Random, branch: int) -> Build:
    """Draw facts of a text that conversations share; the result builds one of `BRANCHES` of them.

    Facts lie in the first quarter of the text. Each conversation asks for another one, in its
    second turn, after a turn that was asked and answered.
    """
    keys, values = text.names(rng).first(BRANCHES), text.numbers(rng).first(BRANCHES)
    facts = [
        f"The secret number of {key} is {value}." for key, value in zip(keys, values, strict=True)
    ]
    depths = [rng.random() / 4 for _ in facts]
    filler = text.essay(rng)
    before = (branch + 1) % BRANCHES

    def question(place: int) -> str:
        what = f"secret number of {keys[place]}"
        return (
            f"Question: Which {what} is given in the text above?\nAnswer: The {what} given in the "
            "text is"
        )

    def build(size: int) -> tuple[str, list[str]]:
        hidden = hide(filler.first(size), facts, depths)
        return (
            "Secret numbers are hidden in the text below. Remember them: you will be asked for "
            f"each of them.\n\n{hidden}\n\n{question(before)} {values[before]}.\n\n"
            f"{question(branch)}",
            [values[branch]],
        )

    return build


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
