"""Streams from a server's `/generate`: when tokens came, and which."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from twilight_sgl.errors import TwilightError

_LINE_BYTES = 1 << 22  # a chunk repeats all output so far
_SILENCE_SECONDS = 600
_FLUSH_SECONDS = 60


class MeasurementError(TwilightError):
    """A server ended or answered what cannot be measured."""


class RefusedError(MeasurementError):
    """A server refused a request.

    Attributes:
        status: of HTTP; of a stream that ends in an error, the one it would have had.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Stream:
    """One request's answer.

    Attributes:
        sent_s: when it was sent, in seconds of the client's clock.
        chunks: (seconds of that clock, output tokens so far) of each chunk that came.
        token_ids: all output tokens.
    """

    sent_s: float = 0.0
    chunks: list[tuple[float, int]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Output tokens so far."""
        return self.chunks[-1][1] if self.chunks else 0

    @property
    def first_token_s(self) -> float:
        """Seconds from sending to the first token."""
        return self.chunks[0][0] - self.sent_s

    def add(self, now: float, answer: dict[str, Any]) -> None:
        """Take a chunk of `/generate`, whether it repeats earlier tokens or not."""
        ids = answer.get("output_ids") or []
        count = answer["meta_info"]["completion_tokens"]
        if len(ids) == count:
            self.token_ids = ids
        else:  # --incremental-streaming-output
            self.token_ids += ids
        if count > self.tokens:
            self.chunks.append((now, count))


def open_session() -> aiohttp.ClientSession:
    """A session without a limit on requests at a time, each on a connection of its own.

    A server closes connections that are idle for some seconds, SGLang's after five, and may do so
    just when the next request is sent, which then fails.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=_SILENCE_SECONDS),
        read_bufsize=_LINE_BYTES,
    )


async def read_stream(
    session: aiohttp.ClientSession, url: str, body: str
) -> AsyncGenerator[tuple[float, dict[str, Any]], None]:
    """Send a streaming request to `/generate`; yield (seconds of the client's clock, chunk).

    Closing the generator early closes the connection.

    Args:
        body: the request as JSON.
    Raises:
        RefusedError: the server refused the request.
    """
    headers = {"Content-Type": "application/json"}
    async with session.post(f"{url}/generate", data=body, headers=headers) as response:
        if response.status != 200:
            text = await response.text()
            raise RefusedError(
                f"{url}/generate answered {response.status}: {text}", response.status
            )
        async for line in response.content:
            now = time.perf_counter()
            if not line.startswith(b"data: {"):
                continue
            answer = json.loads(line[len(b"data: ") :])
            if "error" in answer:
                error = answer["error"]
                message = f"{url}/generate: {error.get('message')}"
                raise RefusedError(message, error.get("code") or 400)
            yield now, answer


async def generate(
    session: aiohttp.ClientSession,
    url: str,
    prompts: Sequence[list[int]],
    *,
    max_tokens: int,
    stream_interval: int = 1,
    phase_tokens: int | None = None,
) -> list[Stream]:
    """Send all prompts at once and read their greedy answers.

    Args:
        prompts: token ids.
        max_tokens: of output a request.
        stream_interval: tokens a chunk; the first comes alone.
        phase_tokens: end all requests once each has so many tokens since the last one's first.
    Raises:
        MeasurementError: a request was refused, or gave nothing.
    """
    name = uuid.uuid4().hex
    sampling = {
        "temperature": 0,
        "ignore_eos": True,
        "max_new_tokens": max_tokens,
        "stream_interval": stream_interval,
    }
    names = [f"{name}-{index:05d}" for index in range(len(prompts))]
    bodies = [
        json.dumps({"rid": rid, "input_ids": ids, "stream": True, "sampling_params": sampling})
        for rid, ids in zip(names, prompts, strict=True)
    ]
    streams = [Stream() for _ in prompts]
    done = asyncio.Event()
    at_start: list[int] = []

    def count() -> None:
        """See whether the phase in which all decode has begun, and whether it is long enough."""
        if phase_tokens is None or not all(stream.chunks for stream in streams):
            return
        if not at_start:
            at_start.extend(stream.tokens for stream in streams)
        tokens = (stream.tokens - start for stream, start in zip(streams, at_start, strict=True))
        if min(tokens) >= phase_tokens:
            done.set()

    async def read(stream: Stream, body: str) -> None:
        stream.sent_s = time.perf_counter()
        async with contextlib.aclosing(read_stream(session, url, body)) as answers:
            async for now, answer in answers:
                if done.is_set():
                    continue
                reason = answer["meta_info"].get("finish_reason") or {}
                if reason.get("type") == "abort":
                    raise MeasurementError(f"{url}/generate aborted: {reason.get('message')}")
                stream.add(now, answer)
                count()
        if not stream.chunks:
            raise MeasurementError(f"{url}/generate streamed no token")

    async def end() -> None:
        await done.wait()
        for rid in names:
            async with session.post(f"{url}/abort_request", json={"rid": rid}):
                pass

    ending = asyncio.create_task(end())
    tasks = [
        asyncio.create_task(read(stream, body))
        for stream, body in zip(streams, bodies, strict=True)
    ]
    try:
        await asyncio.gather(*tasks)
    finally:
        if not done.is_set():
            ending.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(ending, *tasks, return_exceptions=True)
    return streams


async def flush_cache(session: aiohttp.ClientSession, url: str) -> None:
    """Empty the radix cache, once no request runs.

    Raises:
        MeasurementError: requests of others still run after a minute.
    """
    deadline = time.monotonic() + _FLUSH_SECONDS
    while True:
        async with session.post(f"{url}/flush_cache") as response:
            if response.status == 200:
                return
            text = await response.text()
        if time.monotonic() > deadline:
            raise MeasurementError(f"{url}/flush_cache: {text}")
        await asyncio.sleep(0.1)


async def server_info(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """What `/server_info` says.

    Raises:
        MeasurementError: it answers no JSON object.
    """
    async with session.get(f"{url}/server_info") as response:
        text = await response.text()
    try:
        info = json.loads(text)
    except json.JSONDecodeError:
        info = None
    if not isinstance(info, dict):
        raise MeasurementError(f"{url}/server_info answered {response.status}: {text[:500]}")
    return info
