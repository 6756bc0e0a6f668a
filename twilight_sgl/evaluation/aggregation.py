"""RULER's tasks beyond retrieval (Hsieh et al., arXiv 2404.06654, section 3 and appendix B):
variable tracking, common words, frequent words.

Counts, frequencies and the Zipf exponent are the published ones, and so is that the first two show
one solved example; the wording is our own.
"""

import math
import random
import string
from collections.abc import Sequence

from twilight_sgl.evaluation import text
from twilight_sgl.evaluation.needles import Build, hide

HOPS = 4
VARIABLE_LETTERS = 5
EXAMPLE_SENTENCES = 20

COMMON_WORDS = 10
COMMON_TIMES, UNCOMMON_TIMES = 30, 3
EXAMPLE_COMMON_TIMES, EXAMPLE_UNCOMMON_TIMES, EXAMPLE_UNCOMMON_WORDS = 10, 1, 20

FREQUENT_WORDS = 3
CODED_LETTERS = 6
ZIPF_EXPONENT = 2.0
_ZETA = math.pi**2 / 6  # Riemann zeta of the exponent
_DOTS = "..."


def variable_tracking(rng: random.Random) -> Build:
    """Draw one chain of `HOPS` assignments; the result hides it among so many noise sentences."""
    names = text.letters(rng, string.ascii_uppercase, VARIABLE_LETTERS).first(2 * (HOPS + 1))
    values = rng.sample(range(10**4, 10**5), 2)
    depths = [sorted(rng.random() for _ in range(HOPS + 1)) for _ in range(2)]
    filler = text.noise(rng)

    def part(chain: int, size: int) -> tuple[str, list[str]]:
        own = names[chain * (HOPS + 1) : (chain + 1) * (HOPS + 1)]
        sources = [str(values[chain]), *(f"VAR {name}" for name in own[:-1])]
        needles = [f"VAR {name} = {source}." for name, source in zip(own, sources, strict=True)]
        hidden = hide(filler.first(size), needles, depths[chain])
        return (
            "Variables are assigned in the text below, directly or from one another. Follow the "
            f"assignments.\n\n{hidden}\n\nQuestion: Which variables have the value "
            f"{values[chain]}?\nAnswer: The {HOPS + 1} variables with the value {values[chain]} "
            "are",
            own,
        )

    def build(size: int) -> tuple[str, list[str]]:
        example, answer = part(0, EXAMPLE_SENTENCES)
        question, references = part(1, size)
        return f"{example} {', '.join(answer)}.\n\n{question}", references

    return build


def common_words(rng: random.Random) -> Build:
    """Draw words; the result lists the common ones among so many uncommon ones."""
    words = text.words(rng)
    example_seed, seed = rng.getrandbits(64), rng.getrandbits(64)
    of_example = COMMON_WORDS + EXAMPLE_UNCOMMON_WORDS

    def part(
        given: Sequence[str], common_times: int, uncommon_times: int, seed: int
    ) -> tuple[str, list[str]]:
        common, uncommon = list(given[:COMMON_WORDS]), list(given[COMMON_WORDS:])
        listed = common * common_times + uncommon * uncommon_times
        random.Random(seed).shuffle(listed)
        lines = " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1))
        return (
            "Some words in the list below occur much more often than the others. Remember "
            f"those.\n\n{lines}\n\nQuestion: Which {COMMON_WORDS} words occur most often in the "
            f"list?\nAnswer: The {COMMON_WORDS} words that occur most often are",
            common,
        )

    def build(size: int) -> tuple[str, list[str]]:
        given = words.first(of_example + COMMON_WORDS + size)
        example, answer = part(
            given[:of_example], EXAMPLE_COMMON_TIMES, EXAMPLE_UNCOMMON_TIMES, example_seed
        )
        question, references = part(given[of_example:], COMMON_TIMES, UNCOMMON_TIMES, seed)
        return f"{example} {', '.join(answer)}.\n\n{question}", references

    return build


def frequent_words(rng: random.Random) -> Build:
    """Draw coded words; the result is a text of so many, their frequencies by Zipf's law.

    The first rank is dots, which do not count; asked for are the next three.
    """
    coded = text.letters(rng, string.ascii_lowercase, CODED_LETTERS)
    seed = rng.getrandbits(64)

    def build(size: int) -> tuple[str, list[str]]:
        ranks = int((size / _ZETA) ** (1 / ZIPF_EXPONENT))  # the last that occurs once
        counts = [int(size / _ZETA * rank**-ZIPF_EXPONENT) for rank in range(1, ranks + 1)]
        vocabulary = [_DOTS, *coded.first(ranks - 1)]
        listed = [
            word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)
        ]
        random.Random(seed).shuffle(listed)
        return (
            "The text below is made of coded words. Count how often each occurs; dots do not "
            f"count.\n\n{' '.join(listed)}\n\nQuestion: Which {FREQUENT_WORDS} coded words occur "
            f"most often in the text?\nAnswer: The {FREQUENT_WORDS} coded words that occur most "
            "often are",
            vocabulary[1 : FREQUENT_WORDS + 1],
        )

    return build
