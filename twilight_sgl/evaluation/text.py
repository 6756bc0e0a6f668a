"""What prompts are made of: filler sentences, essays, and names, numbers and words to find."""

import functools
import hashlib
import itertools
import pydoc_data.topics
import random
import re
import uuid
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

_SENTENCE_CHARACTERS = range(40, 301)
_NUMBERS = range(10**6, 10**7)

NOISE = (
    "Rain falls on the hills.",
    "A river runs to the sea.",
    "Birds fly south and come back.",
    "The road goes on and on.",
)

_ADJECTIVES = """
    able amber ample ancient arctic autumn bold bitter bright brave brisk broad calm candid
    careful chilly civil clever cloudy coastal cosmic crisp curious daily damp dark deep distant
    dusty eager early eastern elegant empty fair fancy fierce final flat foggy formal fresh frozen
    gentle giant glad golden grand green happy hasty hidden hollow humble icy inner jolly keen kind
    large late lively lonely loud loyal lucky marble mellow merry mighty misty modest narrow noble
    northern odd old orange patient plain polite proud quick quiet rapid rare red ripe robust rocky
    royal rural rusty sandy sharp shy silent silver simple
"""
_NOUNS = """
    acorn anchor apple arrow badge bakery banner barrel basket beacon bell bench bottle bridge
    brook bucket button cabin camera candle canyon carpet castle cavern chair cherry circle clock
    cloud comet compass copper corner cottage crane crown dagger desert dolphin donkey dragon drum
    eagle engine falcon feather fiddle finger forest fountain garden ginger glacier hammer harbor
    helmet heron honey island jacket jungle kettle ladder lantern lemon lizard magnet mango meadow
    mirror monkey mountain needle oasis orchard otter paddle palace panther parrot pebble pepper
    pigeon pillow planet pocket puzzle rabbit ribbon rocket saddle sailor shadow spider statue
    temple
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())

Item = TypeVar("Item")


class Draws(Generic[Item]):
    """Items that are drawn once each, in order, however many are asked for and when."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items, self._drawn = items, list[Item]()

    def first(self, count: int) -> list[Item]:
        """The first items; fewer if there are no more."""
        self._drawn += itertools.islice(self._items, max(count - len(self._drawn), 0))
        return self._drawn[:count]


def fork(rng: random.Random) -> random.Random:
    """A generator of its own, so that what it is asked does not change what others draw."""
    return random.Random(rng.getrandbits(64))


def distinct(rng: random.Random, draw: Callable[[random.Random], str]) -> Draws[str]:
    """Different items, without end: `draw` must know more than are asked for."""
    own = fork(rng)

    def items() -> Iterator[str]:
        seen: set[str] = set()
        while True:
            item = draw(own)
            if item not in seen:
                seen.add(item)
                yield item

    return Draws(items())


def numbers(rng: random.Random) -> Draws[str]:
    """Different numbers of seven digits."""
    return distinct(rng, lambda own: str(own.choice(_NUMBERS)))


def uuids(rng: random.Random) -> Draws[str]:
    """Different UUIDs of version 4."""
    return distinct(rng, lambda own: str(uuid.UUID(int=own.getrandbits(128), version=4)))


def letters(rng: random.Random, alphabet: str, length: int) -> Draws[str]:
    """Different strings of random letters."""
    return distinct(rng, lambda own: "".join(own.choices(alphabet, k=length)))


def names(rng: random.Random) -> Draws[str]:
    """Different pairs of adjective and noun, in random order, each of them once."""
    pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]
    fork(rng).shuffle(pairs)
    return Draws(iter(pairs))


def words(rng: random.Random) -> Draws[str]:
    """Different words in random order: those of Python's manual, then pairs of words."""
    order = list(_vocabulary())
    fork(rng).shuffle(order)
    rest = names(rng)
    return Draws(itertools.chain(order, rest.first(len(ADJECTIVES) * len(NOUNS))))


def noise(_: random.Random) -> Draws[str]:
    """A few sentences, over and over."""
    return Draws(itertools.cycle(NOISE))


def essay(rng: random.Random) -> Draws[str]:
    """Sentences of Python's manual from a random place on, over and over."""
    prose = sentences()
    start = fork(rng).randrange(len(prose))
    return Draws(itertools.cycle(prose[start:] + prose[:start]))


def text_hash() -> str:
    """Identifies the text that ships with this Python, on which prompts depend."""
    return hashlib.sha256(_manual().encode()).hexdigest()[:12]


@functools.cache
def _manual() -> str:
    topics = pydoc_data.topics.topics
    return " ".join(" ".join(topics[name].split()) for name in sorted(topics))


@functools.cache
def sentences() -> tuple[str, ...]:
    """Prose alone: no fragments, no long runs without a full stop, no tables or grammar."""
    return tuple(
        sentence
        for sentence in re.split(r"(?<=[.!?]) ", _manual())
        if len(sentence) in _SENTENCE_CHARACTERS
        and sentence[0].isupper()
        and sentence[-1] in ".!?"
        and not re.search(r"[-=*|+]{3}|::|\| ", sentence)
    )


@functools.cache
def _vocabulary() -> tuple[str, ...]:
    return tuple(sorted(set(re.findall(r"(?<![\w.-])[a-z]{4,12}(?![\w-])", _manual()))))
