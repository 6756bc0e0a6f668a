"""Perplexity of a text whose tokens are decoded, one a step, so that sparse decoding shows in it.

On SGLang servers each window's last tokens are forced upon the server. Log-probabilities of a
prompt would be those of prefill, which is dense. Other servers cannot be told what to decode: there
the same tokens are scored as part of the prompt, which is right for dense servers.
"""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from twilight_sgl.errors import TwilightError
from twilight_sgl.evaluation.client import COMPLETIONS, GENERATE, Server, no_completion, post
from twilight_sgl.evaluation.tasks import PERPLEXITY

SCORED_TOKENS = 128  # of each window
# The logits of the first token that is forced come from prefill: it is not scored.
_FORCED_TOKENS = SCORED_TOKENS + 1
_UNUSED_TOKENS = 2  # that SGLang leaves of a model's context
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Text:
    """A text of which windows are scored.

    Attributes:
        path: for messages.
        sha256: of the file, in hex.
        start: ids that the tokenizer puts before every text.
        ids: the text's own.
    """

    path: Path
    sha256: str
    start: list[int]
    ids: list[int]

    def check(self, contexts: Sequence[int]) -> None:
        """Raise TwilightError for contexts that are too small, or larger than the text."""
        least = len(self.start) + 1 + _FORCED_TOKENS + _UNUSED_TOKENS
        if min(contexts) < least:
            raise TwilightError(
                f"--context {min(contexts)} is too small for {PERPLEXITY}: pass at least {least}"
            )
        if max(contexts) > len(self.ids) + len(self.start) + _UNUSED_TOKENS:
            raise TwilightError(
                f"--text {self.path} has {len(self.ids)} tokens, fewer than a window of --context "
                f"{max(contexts)}: pass a longer text, or a smaller context"
            )

    def window(self, context: int, seed: int, index: int) -> list[int]:
        """Ids of one window, the scored ones last.

        Windows are spread evenly over the text however many there are: their places are the van
        der Corput sequence (Indagationes Math. 38, 1935), which another seed shifts.
        """
        tokens = context - _UNUSED_TOKENS - len(self.start)
        place = (_van_der_corput(index) + seed * _GOLDEN) % 1
        first = int(place * (len(self.ids) - tokens + 1))
        return self.start + self.ids[first : first + tokens]


def read_text(path: Path, tokenize: Callable[[str], list[int]]) -> Text:
    """Read a text file in UTF-8.

    Raises:
        TwilightError: it cannot be read.
    """
    try:
        content = path.read_bytes()
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise TwilightError(f"--text {path} cannot be read: {error}") from error
    start = tokenize("")
    return Text(path, hashlib.sha256(content).hexdigest(), start, tokenize(text)[len(start) :])


def check_server(server: Server) -> None:
    """Raise TwilightError for an SGLang server that takes no tokens to decode."""
    if server.endpoint != GENERATE:
        return
    if not server.info.get("enable_custom_logit_processor", True):
        raise TwilightError(
            f"{PERPLEXITY}: the server at {server.url} cannot be told what to decode: start it "
            "with --enable-custom-logit-processor"
        )
    _processor()  # importing takes seconds, in which a request's connection would time out


@functools.cache
def _processor() -> str:
    """What requests name the logit processor by."""
    from twilight_sgl.evaluation.forced_tokens import ForcedTokens

    return ForcedTokens.to_str()


async def measure(
    session: aiohttp.ClientSession,
    server: Server,
    text: Text,
    key: tuple[int, int, int],
    twilight: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The record of the window of (context, seed, index).

    Raises:
        TwilightError: the server did not answer, or decoded other tokens.
    """
    context, seed, index = key
    window = text.window(context, seed, index)
    sent = time.perf_counter()
    if server.endpoint == COMPLETIONS:
        logprobs, prompt_tokens = await _of_prompt(session, server, window)
    else:
        logprobs, prompt_tokens = await _of_decoding(session, server, window, twilight)
    return {
        "task": PERPLEXITY,
        "context": context,
        "seed": seed,
        "index": index,
        "prompt_sha256": hashlib.sha256(json.dumps(window).encode()).hexdigest(),
        "prompt_tokens": len(window) - _FORCED_TOKENS,
        "served_prompt_tokens": prompt_tokens,
        "nll": -sum(logprobs) / len(logprobs),
        "scored_tokens": len(logprobs),
        "latency_s": time.perf_counter() - sent,
    }


async def _of_decoding(
    session: aiohttp.ClientSession,
    server: Server,
    window: list[int],
    twilight: Mapping[str, Any] | None,
) -> tuple[list[float], int | None]:
    """Log-probabilities of the window's last tokens, which the server is made to decode."""
    from twilight_sgl.evaluation.forced_tokens import FORCED, OFFSET

    forced = window[-_FORCED_TOKENS:]
    options = {} if twilight is None else {"twilight": dict(twilight)}
    body = {
        "input_ids": window[:-_FORCED_TOKENS],
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": len(forced),
            "ignore_eos": True,
            "custom_params": {FORCED: forced, **options},
        },
        "custom_logit_processor": _processor(),
        "return_logprob": True,
        "top_logprobs_num": 2,
    }
    answer = await post(
        session,
        server,
        body,
        if_ended=f". {PERPLEXITY} needs this package in the server's Python too: it is imported "
        "for --enable-custom-logit-processor",
    )
    try:
        meta = answer["meta_info"]
        decoded = [token for _, token, *_ in meta["output_token_logprobs"]]
        # The second of each pair is the one that is not the forced token.
        likely = [top[1][0] + OFFSET for top in meta["output_top_logprobs"]]
        retracted, prompt_tokens = meta.get("num_retractions") or 0, meta.get("prompt_tokens")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise no_completion(server, answer) from error
    if decoded != forced or len(likely) != len(forced) or retracted:
        raise TwilightError(
            f"{server.url} did not decode the tokens it was given, one a step: if its log tells of "
            "retracted requests, pass a lower --concurrency; if it decodes speculatively, start it "
            "without"
        )
    return likely[1:], prompt_tokens


async def _of_prompt(
    session: aiohttp.ClientSession, server: Server, window: list[int]
) -> tuple[list[float], int | None]:
    """Log-probabilities of the same tokens as part of a prompt."""
    body = {"model": server.model, "prompt": window, "temperature": 0, "max_tokens": 0}
    answer = await post(session, server, {**body, "echo": True, "logprobs": 1})
    try:
        logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
        scored = [float(each) for each in logprobs[len(window) - SCORED_TOKENS : len(window)]]
        prompt_tokens = (answer.get("usage") or {}).get("prompt_tokens")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise no_completion(server, answer) from error
    if len(scored) != SCORED_TOKENS:
        raise TwilightError(
            f"{server.url} gave log-probabilities of {len(logprobs)} of {len(window)} tokens of a "
            f"prompt: {PERPLEXITY} needs a server whose /v1/completions knows echo with logprobs"
        )
    return scored, prompt_tokens


def _van_der_corput(index: int) -> float:
    """The index's binary digits mirrored at the point: 0, 1/2, 1/4, 3/4, ..."""
    value, weight = 0.0, 0.5
    while index:
        value += weight * (index & 1)
        index, weight = index >> 1, weight / 2
    return value
