"""The decode benchmark's requests: what is sent, and what streams back."""

import argparse
import asyncio

import pytest
from streaming_server import StreamingServer

from twilight_sgl.benchmark.decode_figures import steady_phase
from twilight_sgl.benchmark.prompts import Load, cut_prompts, encode_tokens, parse_loads
from twilight_sgl.benchmark.streaming import MeasurementError, Stream, generate, open_session
from twilight_sgl.errors import TwilightError

# Prompts


def test_loads_are_requests_times_tokens() -> None:
    loads = parse_loads("1x28k, 64x1k,2x100,1x28k")
    expected = [("1x28k", 1, 28672), ("64x1k", 64, 1024), ("2x100", 2, 100)]
    assert [(load.name, load.requests, load.prompt_tokens) for load in loads] == expected


@pytest.mark.parametrize("text", ["", "28k", "0x1k", "1x", "1x0", "x1k", "-1x1k", "2x1k,", "1x1kk"])
def test_what_is_no_load_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_loads(text)


@pytest.mark.parametrize("lead", [[], [-1]], ids=["plain", "after a first token"])
@pytest.mark.parametrize("shared_prefix", [0, 40])
@pytest.mark.parametrize("length", [80 + 20, 8 * 100, 5000], ids=["overlapping", "exact", "long"])
def test_prompts_share_the_prefix_and_nothing_behind_it(
    length: int, shared_prefix: int, lead: list[int]
) -> None:
    load = Load("8x80", 8, 80)
    ids = list(range(length))
    prompts = cut_prompts(ids, load, shared_prefix=shared_prefix, seed=3, lead=lead)
    shared = shared_prefix or len(lead)
    assert [len(prompt) for prompt in prompts] == [80] * 8
    assert {tuple(prompt[:shared]) for prompt in prompts} == {tuple([*lead, *ids][:shared])}
    assert len({prompt[shared] for prompt in prompts}) == 8
    for prompt in prompts:
        first = prompt[shared]
        assert prompt[shared:] == list(range(first, first + 80 - shared))


def test_seed_moves_prompts() -> None:
    ids, load = list(range(10_000)), Load("4x100", 4, 100)
    one, again, other = (cut_prompts(ids, load, shared_prefix=0, seed=seed) for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("length", [79, 83])
def test_short_text_is_refused(length: int) -> None:
    with pytest.raises(TwilightError, match=rf"--text has {length} tokens.*8x80 needs 8"):
        cut_prompts(list(range(length)), Load("8x80", 8, 80), shared_prefix=0, seed=0)


def test_no_more_text_is_encoded_than_needed() -> None:
    pieces: list[str] = []

    def encode(piece: str) -> list[int]:
        pieces.append(piece)
        return [len(piece)] * 1000

    text = "x" * (5 << 18)
    assert len(encode_tokens(encode, text, 1500)) == 2000
    assert len(encode_tokens(encode, text, 99_999)) == 5000
    assert "".join(pieces[2:]) == text


# Streams


@pytest.mark.parametrize("incremental", [False, True], ids=["cumulative", "incremental"])
@pytest.mark.parametrize("interval", [1, 4])
def test_streams_hold_every_token_once(interval: int, incremental: bool) -> None:
    async def run(url: str) -> list[Stream]:
        async with open_session() as session:
            prompts = [[1, 2, 3], [4]]
            return await generate(session, url, prompts, max_tokens=10, stream_interval=interval)

    with StreamingServer(incremental=incremental) as server:
        streams = asyncio.run(run(server.url))
    for answer, start in zip(streams, (6, 4), strict=True):
        assert answer.token_ids == list(range(start, start + 10))
        times, counts = zip(*answer.chunks, strict=True)
        assert list(times) == sorted(times)
        assert times[0] > answer.sent_s
        expected = range(1, 11) if interval == 1 else (1, 5, 9, 10)
        assert list(counts) == list(expected)
    assert not server.aborted


def test_no_request_waits_on_a_connection_that_the_server_may_close() -> None:
    async def run(url: str) -> None:
        async with open_session() as session:
            for _ in range(3):
                await generate(session, url, [[1]], max_tokens=1)

    with StreamingServer() as server:
        asyncio.run(run(server.url))
    assert len(set(server.clients)) == 3


def test_requests_end_once_all_have_decoded_together() -> None:
    async def run(url: str) -> list[Stream]:
        async with open_session() as session:
            return await generate(
                session, url, [[1], [2], [3]], max_tokens=100_000, phase_tokens=20
            )

    with StreamingServer() as server:
        streams = asyncio.run(run(server.url))
        assert not server.running
    assert len(server.aborted) == 3
    assert all(20 < len(answer.token_ids) < 1000 for answer in streams)
    # A chunk at either end may have come just outside the phase.
    assert steady_phase(streams)["steady_tokens"] >= 3 * (20 - 2)


@pytest.mark.parametrize("status", [200, 503])
def test_refusals_of_a_server_are_shown(status: int) -> None:
    async def run(url: str) -> list[Stream]:
        async with open_session() as session:
            return await generate(session, url, [[1]], max_tokens=4)

    refusing = StreamingServer(refusal="the input is too long", refuse_with=status)
    with refusing as server, pytest.raises(MeasurementError, match="the input is too long"):
        asyncio.run(run(server.url))
