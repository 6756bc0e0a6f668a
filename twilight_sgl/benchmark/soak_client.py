"""The client of a soak: sends items, cuts requests short, and notes what became of each."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import aiohttp

from twilight_sgl.benchmark.soak_figures import Record, Sample
from twilight_sgl.benchmark.soak_load import GRAMMAR_TOKENS, GRAMMARS, Item, Turn
from twilight_sgl.benchmark.soak_memory import MemoryReader
from twilight_sgl.benchmark.streaming import (
    MeasurementError,
    RefusedError,
    Stream,
    flush_cache,
    read_stream,
    server_info,
)
from twilight_sgl.telemetry.totals import twilight_states

EARLY_SECONDS = 0.3  # until a cut that waits for no token
STREAM_INTERVAL = 16  # tokens a chunk of requests that are not cut
BUSY = (429, 503)  # HTTP status of a server that has no room for a request
Answer = TypeVar("Answer")


class Client:
    """Sends a soak's requests to one server and keeps its record.

    Args:
        session: without kept connections.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, record: Record, memory: MemoryReader
    ) -> None:
        self.session = session
        self.url = url
        self.record = record
        self._memory = memory
        self._start: float | None = None
        self._sampling = asyncio.Lock()  # counts are compared with those of the sample before

    def seconds(self) -> float:
        """Since this was first asked."""
        if self._start is None:
            self._start = time.monotonic()
        return time.monotonic() - self._start

    async def sample(self) -> Sample:
        """Read the server's counts and memory, and record them.

        Raises:
            MeasurementError: it ended or was restarted.
        """
        self.seconds()
        async with self._sampling:
            info = await self.alive(server_info(self.session, self.url))
            memory = await asyncio.to_thread(self._memory.read)
            states = twilight_states(info)
            if not states:
                raise MeasurementError(
                    f"{self.url}/server_info no longer tells of Twilight: {str(info)[:500]}"
                )
            sample = Sample.of(self.seconds(), states, memory)
            samples = self.record.samples
            if samples and sample.decode_steps < samples[-1].decode_steps:
                raise MeasurementError(
                    f"the server at {self.url} was restarted: its counts went down"
                )
            samples.append(sample)
            return sample

    async def alive(self, answer: Awaitable[Answer]) -> Answer:
        """What the server answers.

        Raises:
            MeasurementError: it does not.
        """
        try:
            return await answer
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            raise MeasurementError(
                f"the server at {self.url} ended ({error!r}): see its log"
            ) from error

    async def flush_when_idle(self) -> None:
        """Empty the cache, once no request runs.

        Raises:
            MeasurementError: requests still run a minute after all were answered or cut, or the
                server ended.
        """
        await self.alive(flush_cache(self.session, self.url))
        self.record.tally("flush").outcomes["completed"] += 1

    async def grammar_refusal(self) -> str | None:
        """Why the server takes no constrained requests, None if it does."""
        turn = Turn((1,), GRAMMAR_TOKENS, grammar=GRAMMARS[0])
        try:
            meta = await self._read(self._body(turn, [1], uuid.uuid4().hex), Stream())
        except RefusedError as error:
            return str(error)
        except (aiohttp.ClientError, OSError) as error:
            raise MeasurementError(
                f"the server at {self.url} ended a constrained request with {error!r}: see its "
                "log, or start it with --grammar-backend none"
            ) from error
        reason = meta.get("finish_reason") or {}
        return reason.get("message") if reason.get("type") == "abort" else None

    async def send(self, item: Item, is_over: Callable[[], bool]) -> None:
        """Send an item and wait for its end; no new turn begins once `is_over`.

        Raises:
            MeasurementError: the server ended.
        """
        if item.kind == "flush":
            await self._flush()
        await self.together([self._converse(item.kind, chain, is_over) for chain in item.chains])

    async def together(self, work: Sequence[Coroutine[Any, Any, None]]) -> None:
        """Run all at once; if one fails, end the others."""
        tasks = [asyncio.create_task(each) for each in work]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _flush(self) -> None:
        """Ask for a flush now, which SGLang refuses while requests run."""
        outcomes = self.record.tally("flush").outcomes
        try:
            async with self.session.post(f"{self.url}/flush_cache") as response:
                outcomes["completed" if response.status == 200 else "refused"] += 1
        except (aiohttp.ClientError, OSError) as error:
            outcomes["failed"] += 1
            self.record.failures.append(f"flush: {error!r}")
            await self.sample()

    async def _converse(
        self, kind: str, chain: Sequence[Turn], is_over: Callable[[], bool]
    ) -> None:
        said: list[int] = []
        for place, turn in enumerate(chain):
            if place and is_over():
                return
            said += turn.token_ids
            answer = await self._ask(kind, turn, said)
            if answer is None:
                return
            said += answer

    async def _ask(self, kind: str, turn: Turn, prompt: list[int]) -> list[int] | None:
        """Send one request and note its outcome; the answer's token ids if it completed."""
        tally, stream = self.record.tally(kind), Stream()
        rid = f"soak-{uuid.uuid4().hex}"
        meta: dict[str, Any] = {}
        failure, lost = "", False
        try:
            outcome, failure = await self._outcome(turn, prompt, rid, stream, meta)
        except RefusedError as error:
            outcome = "refused" if error.status in BUSY else "failed"
            failure = str(error)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            outcome, failure, lost = "failed", repr(error), True
        tally.outcomes[outcome] += 1
        tally.prompt_tokens += meta.get("prompt_tokens") or 0
        tally.cached_tokens += meta.get("cached_tokens") or 0
        tally.output_tokens += meta.get("completion_tokens") or 0
        tally.retractions += meta.get("num_retractions") or 0
        if outcome == "failed":
            self.record.failures.append(f"{kind}, {len(prompt)} tokens, {rid}: {failure}")
        if lost:
            await self.sample()  # raises if the server has ended
        if outcome != "completed":
            return None
        tally.latencies_s.append(time.perf_counter() - stream.sent_s)
        return stream.token_ids

    async def _outcome(
        self, turn: Turn, prompt: list[int], rid: str, stream: Stream, meta: dict[str, Any]
    ) -> tuple[str, str]:
        """The outcome of a request that was taken, and what is wrong with it if it failed."""
        body, cut = self._body(turn, prompt, rid), turn.cut
        aborting: asyncio.Task[None] | None = None
        if cut is None:
            await self._read(body, stream, meta)
        elif cut.hangs_up:
            reading = self._read(body, stream, meta, until=cut.tokens or None)
            try:
                await asyncio.wait_for(reading, None if cut.tokens else EARLY_SECONDS)
            except asyncio.TimeoutError:
                return "hung up", ""
            if not meta.get("finish_reason"):
                return "hung up", ""
        else:
            reached = asyncio.Event()
            aborting = asyncio.create_task(self._abort(rid, reached if cut.tokens else None))
            try:
                await self._read(body, stream, meta, at=cut.tokens, reached=reached)
            finally:
                aborting.cancel()
                await asyncio.gather(aborting, return_exceptions=True)
        reason = meta.get("finish_reason") or {}
        if reason.get("type") == "abort":
            if aborting is not None:
                return "aborted", ""
            status = reason.get("status_code")
            return "refused" if status in BUSY else "failed", f"aborted: {reason.get('message')}"
        if not reason:
            return "failed", "the stream ended without a reason"
        if stream.tokens < max(turn.min_tokens, 1):
            return "failed", f"it ended after {stream.tokens} of {turn.min_tokens} tokens: {reason}"
        return "completed", ""

    def _body(self, turn: Turn, prompt: Sequence[int], rid: str) -> str:
        interval = STREAM_INTERVAL if turn.cut is None else 1
        sampling = turn.sampling() | {"stream_interval": interval}
        return json.dumps(
            {"rid": rid, "input_ids": list(prompt), "stream": True, "sampling_params": sampling}
        )

    async def _read(
        self,
        body: str,
        stream: Stream,
        meta: dict[str, Any] | None = None,
        *,
        until: int | None = None,
        at: int = 0,
        reached: asyncio.Event | None = None,
    ) -> dict[str, Any]:
        """Read a stream to its end, or close it after so many tokens; the newest `meta_info`.

        Args:
            meta: where that is kept too, for a reader that is cancelled.
            at, reached: the event is set once there are so many tokens.
        """
        newest = {} if meta is None else meta
        stream.sent_s = time.perf_counter()
        async with contextlib.aclosing(read_stream(self.session, self.url, body)) as answers:
            async for now, answer in answers:
                newest.update(answer["meta_info"])
                if "completion_tokens" in newest:
                    stream.add(now, answer)
                if reached is not None and stream.tokens >= at:
                    reached.set()
                if until is not None and stream.tokens >= until:
                    break
        return newest

    async def _abort(self, rid: str, reached: asyncio.Event | None) -> None:
        """Call `/abort_request`, once it is time."""
        await (reached.wait() if reached is not None else asyncio.sleep(EARLY_SECONDS))
        with contextlib.suppress(aiohttp.ClientError, OSError):  # then the request fails too
            async with self.session.post(f"{self.url}/abort_request", json={"rid": rid}):
                pass
