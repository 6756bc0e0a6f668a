"""The load of a soak: what is sent, drawn from a seed and sized to the server."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twilight_sgl.errors import TwilightError

# How often each kind comes in a round; a round holds all of them, in an order of its own.
ROUND = {
    "conversation": 4,
    "cold": 4,
    "short": 4,
    "own p": 2,
    "dense": 2,
    "hang up": 3,
    "abort": 3,
    "grammar": 1,
    "flush": 2,
    "burst": 1,
}
TOPICS = 3  # prefixes that conversations share
MOST_AT_ONCE = 512  # requests of a burst
BURST_POOLS = 1.25  # KV pools that a burst's prompts and answers take
LAST_POOLS = 0.8
# Constraints that end by themselves, well before a token limit.
GRAMMARS: tuple[dict[str, str], ...] = (
    {"regex": "[A-Z]{2}[0-9]{3}"},
    {"json_schema": '{"type": "object", "properties": {"a": {"type": "boolean"}}}'},
)
GRAMMAR_TOKENS = 16


@dataclass(frozen=True)
class Sizes:
    """Sizes that fit a server, in tokens.

    Attributes:
        pool_tokens: its KV pool.
        page_tokens: a page.
        long_tokens: the longest prompt, a conversation's last one included.
        output_tokens: the longest answer but for bursts.
        sparse_tokens: shorter contexts attend to everything.
    """

    pool_tokens: int
    page_tokens: int
    long_tokens: int
    output_tokens: int
    sparse_tokens: int

    @classmethod
    def fit(
        cls,
        pool_tokens: int,
        context_tokens: int,
        config: Mapping[str, Any],
        *,
        prompt_tokens: int | None,
        output_tokens: int | None,
    ) -> "Sizes":
        """Choose what is not given: a quarter of the pool for prompts, and a sixteenth of that.

        Args:
            context_tokens: that a prompt and its answer may take.
            config: Twilight's configuration.
        Raises:
            TwilightError: what is given does not fit, or no step would select.
        """
        limit = min(context_tokens, pool_tokens // 2)
        default = min(pool_tokens // 4, limit * 3 // 4)
        long = prompt_tokens or default
        output = output_tokens or max(16, min(long // 16, 512))
        shortest = config["min_context_tokens"]
        if long + output >= limit:
            raise TwilightError(
                f"--prompt-tokens {long} and --output-tokens {output} do not fit: together they "
                f"must be below the context and half the KV pool, {limit} tokens; {default} fits"
            )
        if long < max(shortest, 64):
            raise TwilightError(
                f"--prompt-tokens {long} is too short: contexts of less than "
                f"{max(shortest, 64)} tokens attend to everything; pass more, or start the server "
                "with a lower --twilight-min-context-tokens"
            )
        return cls(pool_tokens, config["page_size"], long, output, shortest)


@dataclass(frozen=True)
class Cut:
    """The client's way to end a request early.

    Attributes:
        hangs_up: it closes the connection; else it calls `/abort_request`.
        tokens: of output that it waits for; 0 for a moment after sending.
    """

    hangs_up: bool
    tokens: int


@dataclass(frozen=True)
class Turn:
    """One request; its prompt is what the turns before it said, and its own tokens.

    Attributes:
        token_ids: what it adds.
        max_tokens: of output.
        min_tokens: of output; the model may end an answer from there on.
        twilight: options for this request, None for the server's.
        grammar: `regex` or `json_schema`.
        cut: None for a request that may end.
    """

    token_ids: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    twilight: Mapping[str, Any] | None = None
    grammar: Mapping[str, str] = field(default_factory=dict)
    cut: Cut | None = None

    def sampling(self) -> dict[str, Any]:
        """SGLang's `sampling_params`: greedy."""
        # `ignore_eos` would make SGLang 0.5.23 reserve all output, and never have to retract.
        sampling: dict[str, Any] = {
            "temperature": 0,
            "max_new_tokens": self.max_tokens,
            "min_new_tokens": self.min_tokens,
            **self.grammar,
        }
        if self.twilight is not None:
            sampling["custom_params"] = {"twilight": dict(self.twilight)}
        return sampling


@dataclass(frozen=True)
class Item:
    """What one worker sends: chains of turns, all chains at once, each turn after the last.

    Attributes:
        kind: a key of `ROUND`, or `last` for the batch that ends a soak.
        chains: none for a flush.
    """

    kind: str
    chains: tuple[tuple[Turn, ...], ...] = ()


class Plan:
    """Items by round; the same seed, text and sizes give the same ones.

    Args:
        token_ids: the text that prompts are cut from.
        grammar: whether the server takes constrained requests.
    """

    def __init__(
        self, token_ids: Sequence[int], sizes: Sizes, seed: int, *, grammar: bool = True
    ) -> None:
        self.sizes = sizes
        self._ids = token_ids
        self._seed = seed
        self._grammar = grammar
        rng = random.Random(f"{seed} topics")
        self._topics = [self._text(rng, sizes.long_tokens // 2) for _ in range(TOPICS)]
        self._makers: dict[str, Callable[[random.Random], tuple[tuple[Turn, ...], ...]]] = {
            "conversation": self._conversation,
            "cold": self._cold,
            "short": self._short,
            "own p": self._own_p,
            "dense": self._dense,
            "hang up": lambda rng: self._cut(rng, hangs_up=True),
            "abort": lambda rng: self._cut(rng, hangs_up=False),
            "grammar": self._constrained,
            "flush": lambda rng: (),
            "burst": self._burst,
        }

    def round(self, number: int) -> list[Item]:
        """The items of a round, in the order in which workers take them."""
        rng = random.Random(f"{self._seed} {number}")
        kinds = [
            kind
            for kind, count in ROUND.items()
            for _ in range(count)
            if self._grammar or kind != "grammar"
        ]
        rng.shuffle(kinds)
        return [Item(kind, self._makers[kind](rng)) for kind in kinds]

    def last(self, output_tokens: int) -> Item:
        """Long prompts of most of the pool, at once: for a cache that was flushed."""
        rng = random.Random(f"{self._seed} last")
        long = self.sizes.long_tokens
        count = int(LAST_POOLS * self.sizes.pool_tokens / (long + output_tokens))
        chains = tuple(
            (Turn(self._text(rng, long), output_tokens, output_tokens),)
            for _ in range(max(1, min(count, MOST_AT_ONCE)))
        )
        return Item("last", chains)

    def _text(self, rng: random.Random, tokens: int) -> tuple[int, ...]:
        """A slice of the text; it goes round where the text is short."""
        first = rng.randrange(len(self._ids))
        text = tuple(self._ids[first : first + tokens])
        while len(text) < tokens:
            text += tuple(self._ids[: tokens - len(text)])
        return text

    def _long(self, rng: random.Random) -> tuple[int, ...]:
        """A prompt that selects: half of them begin with a topic, in whole pages or not."""
        tokens = rng.randint(max(self.sizes.sparse_tokens, 64), self.sizes.long_tokens)
        if rng.random() < 0.5:
            return self._text(rng, tokens)
        shared = rng.choice(self._topics)[: tokens - 1]
        return shared + self._text(rng, tokens - len(shared))

    def _output(self, rng: random.Random) -> int:
        return rng.randint(max(self.sizes.output_tokens // 4, 1), self.sizes.output_tokens)

    def _conversation(self, rng: random.Random) -> tuple[tuple[Turn, ...], ...]:
        """Branches that share a topic and then differ, in a few turns each."""
        topic = rng.choice(self._topics)
        branches = []
        for _ in range(rng.randint(2, 3)):
            turns = rng.randint(1, 3)
            own = (self.sizes.long_tokens - len(topic)) // turns - self.sizes.output_tokens
            branches.append(
                tuple(
                    Turn(
                        (() if place else topic) + self._text(rng, rng.randint(1, max(own, 1))),
                        self._output(rng),
                    )
                    for place in range(turns)
                )
            )
        return tuple(branches)

    def _cold(self, rng: random.Random) -> tuple[tuple[Turn, ...], ...]:
        """Nothing that a cache could know: it has to evict."""
        return ((Turn(self._text(rng, self.sizes.long_tokens), self._output(rng)),),)

    def _short(self, rng: random.Random) -> tuple[tuple[Turn, ...], ...]:
        """Beside a page boundary, or anywhere up to a sixteenth of the longest."""
        page = self.sizes.page_tokens
        tokens = rng.choice(
            (1, page - 1, page, page + 1, rng.randint(1, max(self.sizes.long_tokens // 16, 1)))
        )
        return ((Turn(self._text(rng, tokens), self._output(rng)),),)

    def _own_p(self, rng: random.Random) -> tuple[tuple[Turn, ...], ...]:
        options = {"p": rng.choice((0.5, 0.8, 0.9, 0.99, 1.0))}
        return ((Turn(self._long(rng), self._output(rng), twilight=options),),)

    def _dense(self, rng: random.Random) -> tuple[tuple[Turn, ...], ...]:
        return ((Turn(self._long(rng), self._output(rng), twilight={"enabled": False}),),)

    def _cut(self, rng: random.Random, *, hangs_up: bool) -> tuple[tuple[Turn, ...], ...]:
        most = self.sizes.output_tokens
        cut = Cut(hangs_up, rng.choice((0, 1, rng.randint(1, max(most // 2, 1)))))
        return ((Turn(self._long(rng), most, most, cut=cut),),)

    def _constrained(self, rng: random.Random) -> tuple[tuple[Turn, ...], ...]:
        grammar = rng.choice(GRAMMARS)
        return ((Turn(self._long(rng), GRAMMAR_TOKENS, grammar=grammar),),)

    def _burst(self, rng: random.Random) -> tuple[tuple[Turn, ...], ...]:
        """More than the pool holds, and answers as long as was said: SGLang has to retract."""
        sizes = self.sizes
        prompt = max(min(sizes.pool_tokens // 16, sizes.long_tokens), 1)
        output = max(min(prompt // 6, sizes.long_tokens + sizes.output_tokens - prompt), 1)
        count = -(-int(BURST_POOLS * sizes.pool_tokens) // (prompt + output))
        return tuple(
            (Turn(self._text(rng, prompt), output, output),)
            for _ in range(min(count, MOST_AT_ONCE))
        )
