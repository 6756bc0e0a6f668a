"""Loads of the decode benchmark, and real text for their prompts."""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twilight_sgl.benchmark.record import parse_tokens, python_text
from twilight_sgl.errors import TwilightError

_PIECE_CHARACTERS = 1 << 18
_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer makes of prose or source


@dataclass(frozen=True)
class Load:
    """Requests that are sent at once, each with a prompt of so many tokens."""

    name: str
    requests: int
    prompt_tokens: int


def parse_loads(value: str) -> tuple[Load, ...]:
    """Read comma-separated loads: `32x28k` is 32 requests of 28 * 1024 tokens each."""
    loads = []
    for name in value.split(","):
        requests, _, tokens = name.strip().partition("x")
        if not requests.isdecimal() or int(requests) < 1 or not tokens:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no load: pass requests x prompt tokens, e.g. 8x28k"
            )
        loads.append(Load(name.strip(), int(requests), parse_tokens(tokens)))
    return tuple(dict.fromkeys(loads))


def read_text(path: Path | None, tokens: int) -> str:
    """The text that prompts are cut from: a file, or as much as needed of what Python ships.

    Raises:
        TwilightError: the file cannot be read.
    """
    if path is None:
        return python_text(tokens * _CHARACTERS_PER_TOKEN)
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise TwilightError(f"--text {path} cannot be read: {error}") from error


def encode_tokens(encode: Callable[[str], list[int]], text: str, tokens: int) -> list[int]:
    """Token ids of the text's beginning: at least so many, or of all of it."""
    ids: list[int] = []
    for start in range(0, len(text), _PIECE_CHARACTERS):
        if len(ids) >= tokens:
            break
        ids += encode(text[start : start + _PIECE_CHARACTERS])
    return ids


def tokens_needed(load: Load, shared_prefix: int) -> int:
    """Tokens of all prompts, what they share once: each has a slice of its own of the text."""
    return shared_prefix + load.requests * (load.prompt_tokens - shared_prefix)


def cut_prompts(
    ids: Sequence[int], load: Load, *, shared_prefix: int, seed: int, lead: Sequence[int] = ()
) -> list[list[int]]:
    """Prompts of exactly `load.prompt_tokens` token ids.

    They share their first `shared_prefix` tokens and then differ from the first token on, so the
    radix cache shares no more. Slices are apart where the text is long enough, else they overlap.

    Args:
        ids: the text.
        seed: where slices begin.
        lead: what the tokenizer puts before every text.
    Raises:
        TwilightError: the text is too short.
    """
    prefix = [*lead, *ids][:shared_prefix] if shared_prefix else list(lead)
    own = load.prompt_tokens - len(prefix)
    body = ids[max(shared_prefix - len(lead), 0) :]
    room = len(body) - own
    rng = random.Random(f"{seed} {load.name}")
    taken: set[int] = set()
    prompts: list[list[int]] = []
    for index in range(load.requests):
        first = int((index + rng.random()) * max(room, 0) / load.requests)
        while first <= room and body[first] in taken:
            first += 1
        if first > room:
            break
        taken.add(body[first])
        prompts.append([*prefix, *body[first : first + own]])
    if len(prompts) < load.requests:
        raise TwilightError(
            f"--text has {len(ids)} tokens, which give {len(prompts)} prompts that begin "
            f"differently, --loads {load.name} needs {load.requests}: pass a longer --text or "
            "smaller --loads"
        )
    return prompts
