"""Options of the decode benchmark, and what is refused before a server starts."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twilight_sgl.benchmark.prompts import Load, parse_loads
from twilight_sgl.benchmark.record import parse_tokens
from twilight_sgl.benchmark.servers import Server, tokens_at_once
from twilight_sgl.errors import TwilightError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", help="folder of a model; the embedded model by default")
    parser.add_argument(
        "--backends",
        help="comma-separated, the first is what others are compared with: twilight, quest (its "
        "selector, no pruner) or a decode backend of SGLang's (default: fa3,quest,twilight; on a "
        "CPU torch_native,quest,twilight; with --urls those)",
    )
    parser.add_argument(
        "--loads",
        type=parse_loads,
        default="1x28k,8x28k,32x28k,64x1k",
        help="comma-separated, requests x prompt tokens (default: %(default)s)",
    )
    parser.add_argument("--output-tokens", type=parse_tokens, default="256", metavar="TOKENS")
    parser.add_argument(
        "--first-tokens",
        type=int,
        default=16,
        metavar="SAMPLES",
        help="samples of the time to first token that a load gets at least: one of fewer requests "
        "is asked again for one token each (default: %(default)s); once all is cached, and where "
        "prompts are short, every load is asked eight times at least",
    )
    parser.add_argument(
        "--shared-prefix",
        type=parse_tokens,
        default=0,
        metavar="TOKENS",
        help="tokens that the prompts of a load have in common; adds time to first token with "
        "that prefix cached",
    )
    parser.add_argument(
        "--urls",
        nargs="+",
        default=[],
        metavar="NAME=URL",
        help="servers that run already; their caches are flushed",
    )
    parser.add_argument(
        "--server-args",
        default="",
        help="flags for every server that is started, as one string; '--page-size 16' gives "
        "SGLang's own backends pages like Twilight's in place of what SGLang chooses",
    )
    parser.add_argument(
        "--side-by-side",
        action=argparse.BooleanOptionalAction,
        help="start all servers at once, with KV pools as large as the loads need, and take turns "
        "(default: if they fit); else one after another",
    )
    parser.add_argument(
        "--starts",
        type=int,
        default=1,
        metavar="N",
        help="start the servers N times, in the opposite order every other time, and report the "
        "medians: where steps are short one process decodes faster than another, whatever its "
        "backend (default: %(default)s)",
    )
    parser.add_argument(
        "--passes",
        type=int,
        default=3,
        metavar="N",
        help="time each load N times a start, servers in turn, and report the medians: where the "
        "host cannot keep up with the GPU, its speed from second to second decides "
        "(default: %(default)s)",
    )
    parser.add_argument("--p", type=float, default=0.95, help="--twilight-p of started servers")
    parser.add_argument("--text", type=Path, help="for the prompts; by default what Python ships")
    parser.add_argument("--seed", type=int, default=0, help="where in the text prompts begin")
    parser.add_argument(
        "--stream-interval",
        type=int,
        metavar="TOKENS",
        help="tokens a chunk (default: a quarter of the requests, at least 1)",
    )
    parser.add_argument("--start-timeout", type=float, default=900, metavar="SECONDS")
    parser.add_argument("--commit", help="recorded with the rows; read from git by default")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("decode-benchmark"),
        help="folder for figures and the servers' logs, those of each of several starts in a "
        "folder of its own (default: %(default)s)",
    )


def parse_urls(values: Sequence[str]) -> dict[str, str]:
    """Read NAME=URL pairs.

    Raises:
        TwilightError: one is no such pair.
    """
    urls = {}
    for value in values:
        name, _, url = value.partition("=")
        if not name or not url.startswith(("http://", "https://")):
            raise TwilightError(f"--urls {value}: pass NAME=URL, e.g. fa3=http://127.0.0.1:30000")
        urls[name] = url.rstrip("/")
    return urls


def choose_backends(given: str | None, urls: dict[str, str], device: str) -> list[str]:
    """Names of the backends to compare, in order.

    Raises:
        TwilightError: none, or one twice, or a URL for one that is not among them.
    """
    if given is None:
        if urls:
            return list(urls)
        return ["fa3" if device == "cuda" else "torch_native", "quest", "twilight"]
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise TwilightError(f"--backends {given!r}: name each backend once, e.g. fa3,twilight")
    if unused := set(urls) - set(names):
        raise TwilightError(
            f"--urls names {', '.join(sorted(unused))}, --backends does not: add it there"
        )
    return names


def check_repetitions(starts: int, passes: int, urls: dict[str, str]) -> None:
    """Raise TwilightError for numbers that cannot be, or for starts of servers that run."""
    if passes < 1:
        raise TwilightError(f"--passes {passes}: time the servers at least once")
    if starts < 1:
        raise TwilightError(f"--starts {starts}: start the servers at least once")
    if starts > 1 and urls:
        raise TwilightError(
            f"--starts {starts} starts servers again, those of --urls run already: drop one of them"
        )


def check_first_tokens(samples: int) -> None:
    """Raise TwilightError for a number of samples that cannot be."""
    if samples < 1:
        raise TwilightError(f"--first-tokens {samples}: pass 1, as many as requests, or more")


def check_loads(
    loads: Sequence[Load], output_tokens: int, shared_prefix: int, context_tokens: int
) -> None:
    """Raise TwilightError for a load that the model or the shared prefix has no room for."""
    for load in loads:
        if load.prompt_tokens + output_tokens >= context_tokens:
            raise TwilightError(
                f"--loads {load.name}: {load.prompt_tokens} + {output_tokens} tokens do not fit "
                f"the model's context of {context_tokens}: pass shorter prompts, or "
                "--server-args '--context-length N' if the model goes further"
            )
        if shared_prefix >= load.prompt_tokens:
            raise TwilightError(
                f"--shared-prefix {shared_prefix} leaves nothing of --loads {load.name}: pass less"
            )


def check_radix_cache(shared_prefix: int, *, disabled: bool) -> None:
    """Raise TwilightError for a shared prefix that a server would not share."""
    if shared_prefix and disabled:
        raise TwilightError(
            f"--shared-prefix {shared_prefix} wants SGLang's radix cache: pass 0, or drop "
            "--disable-radix-cache from the servers' flags"
        )


def check_server(
    server: Server,
    info: dict[str, Any],
    loads: Sequence[Load],
    tokens: int,
    shared_prefix: int,
) -> None:
    """Raise TwilightError for a server that cannot hold all requests of a load at once.

    Args:
        tokens: of output, at most.
        shared_prefix: tokens that all prompts of a load begin with; the radix cache has them once.
    """
    check_radix_cache(shared_prefix, disabled=bool(info.get("disable_radix_cache")))
    capacity = info.get("max_total_num_tokens")
    states = info.get("internal_states") or [{}]
    slots = states[0].get("effective_max_running_requests_per_dp")
    for load in loads:
        need = tokens_at_once(load, tokens, shared_prefix)
        if capacity is not None and need > capacity:
            raise TwilightError(
                f"--loads {load.name} takes {need} KV tokens, the server of {server.name!r} has "
                f"{capacity}: pass a smaller load, --no-side-by-side, or more memory in "
                "--server-args '--mem-fraction-static F'"
            )
        if slots is not None and load.requests > slots:
            raise TwilightError(
                f"--loads {load.name}: the server of {server.name!r} runs {slots} requests at a "
                "time: pass --server-args '--max-running-requests N'"
            )
