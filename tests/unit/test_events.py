"""Event records, read back through a socket; readers that are slow, dead or absent."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import zmq
from snapshots import LAYER_IDS, totals

from twilight_sgl.errors import TwilightError
from twilight_sgl.telemetry.events import (
    QUEUED_MESSAGES,
    TOPICS,
    Audit,
    EventSink,
    Pages,
    Rank,
    Step,
    address_of,
    check_addresses,
)
from twilight_sgl.telemetry.publisher import difference


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def taken() -> Iterator[str]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield f"tcp://127.0.0.1:{holder.getsockname()[1]}"


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


class Stream:
    """A sink that has a reader, whose subscription has arrived."""

    def __init__(self, context: zmq.Context, rank: Rank, high_water: int = 1000) -> None:
        address = free_address()
        self.sink = EventSink(address, rank)
        self.reader = context.socket(zmq.SUB)
        self.reader.setsockopt(zmq.RCVHWM, high_water)
        self.reader.setsockopt(zmq.RCVTIMEO, 10_000)
        self.reader.connect(address_of(address, rank.index))
        self.reader.subscribe(b"twilight.")
        self.reader.subscribe(b"hello")
        while not self.reader.poll(20):  # until a message gets through
            self.sink._socket.send(b"hello")
        while self.reader.poll(100):
            self.reader.recv()

    def records(self) -> list[tuple[bytes, dict[str, Any]]]:
        found = []
        while self.reader.poll(300):
            topic, payload = self.reader.recv_multipart()
            found.append((topic, msgspec.msgpack.decode(payload)))
        return found


@pytest.fixture
def stream(context: zmq.Context) -> Iterator[Stream]:
    stream = Stream(context, Rank(tp_rank=1, pp_rank=0, dp_rank=2, index=0))
    yield stream
    stream.sink.close()


def test_records_say_what_happened_in_between(stream: Stream) -> None:
    first = totals(2)
    second = totals(5, audit_checks=4, audit_violations=1, mixed_rows=7)
    stream.sink.publish(first, difference(first, None))
    stream.sink.publish(second, difference(second, first))
    records = stream.records()
    assert [topic for topic, _ in records] == [
        b"twilight.step",
        b"twilight.pages",
        b"twilight.step",
        b"twilight.pages",
        b"twilight.audit",
    ]
    assert [record["sequence"] for _, record in records] == [0, 1, 2, 3, 4]
    assert [record["seconds"] for _, record in records] == [0, 0, 3, 3, 3]
    for topic, record in records:
        assert topic == b"twilight." + record["type"].encode()
        assert record["version"] == 1
        assert (record["tp_rank"], record["pp_rank"], record["dp_rank"]) == (1, 0, 2)
    step, pages, audit = (record for _, record in records[2:])
    assert (step["decode_steps"], step["sparse_rows"], step["mixed_rows"]) == (3, 3, 7)
    assert step["context_tokens"] == 3 * 6 * 1000
    assert step["candidate_tokens"] == 3 * 6 * 250
    assert step["kept_tokens"] == 3 * (10 + 11 + 20 + 21 + 30 + 31)
    assert step["kept_mass"] == pytest.approx(0.9)
    assert tuple(step["layer_ids"]) == LAYER_IDS
    assert step["kept_fraction"] == [[0.01, 0.011], [0.02, 0.021], [0.03, 0.031]]
    assert (pages["sealed"], pages["unsealed"], pages["reused"]) == (6, 3, 9)
    assert (pages["sealed_now"], pages["capacity"]) == (5, 512)
    assert pages["sealing_seconds"] == 0.75
    assert (audit["checks"], audit["violations"]) == (4, 1)


def test_payloads_decode_into_their_types(stream: Stream) -> None:
    newest = totals(2, audit_checks=1)
    stream.sink.publish(newest, difference(newest, None))
    decoder = msgspec.msgpack.Decoder(Step | Pages | Audit)
    for kind, topic in TOPICS.items():
        received, payload = stream.reader.recv_multipart()
        assert received == topic
        assert isinstance(decoder.decode(payload), kind)


def test_what_did_not_happen_is_not_sent(stream: Stream) -> None:
    first, dense = totals(2), totals(2, decode_steps=9, dense_steps=7)
    stream.sink.publish(first, difference(first, None))
    assert len(stream.records()) == 2
    stream.sink.publish(first, difference(first, first))
    assert stream.records() == []
    stream.sink.publish(dense, difference(dense, first))
    ((topic, record),) = stream.records()
    assert topic == b"twilight.step"
    assert (record["decode_steps"], record["dense_steps"], record["sparse_rows"]) == (6, 6, 0)
    assert record["kept_mass"] is record["kept_fraction"] is None


def test_freed_pages_are_reported_without_a_step(stream: Stream) -> None:
    first, flushed = totals(5), totals(5, pages_sealed=0)
    stream.sink.publish(first, difference(first, None))
    stream.records()
    stream.sink.publish(flushed, difference(flushed, first))
    ((_, record),) = stream.records()
    assert (record["type"], record["sealed"], record["unsealed"]) == ("pages", 0, 5)


def flood(sink: EventSink, messages: int) -> None:
    previous = None
    for steps in range(messages):
        newest = totals(steps + 1)
        sink.publish(newest, difference(newest, previous))
        previous = newest


def test_nobody_reads() -> None:
    sink = EventSink(free_address(), Rank())
    flood(sink, 4 * QUEUED_MESSAGES)
    sink.close()


def test_a_reader_that_stops_reading_loses_records_and_stops_nothing(
    context: zmq.Context,
) -> None:
    stream = Stream(context, Rank(), high_water=1)
    sent = 200 * QUEUED_MESSAGES  # megabytes: more than queues and socket buffers hold
    flood(stream.sink, sent)
    stream.sink.close()  # drops what is queued; nothing here waited for the reader
    received = stream.records()
    assert 0 < len(received) < 2 * sent
    sequences = [record["sequence"] for _, record in received]
    assert sequences == sorted(sequences)


def test_a_reader_that_dies(context: zmq.Context) -> None:
    stream = Stream(context, Rank())
    stream.reader.close(0)
    flood(stream.sink, 4 * QUEUED_MESSAGES)
    stream.sink.close()


# Addresses.


def test_each_scheduler_has_a_port_of_its_own() -> None:
    assert address_of("tcp://127.0.0.1:5599", 0) == "tcp://127.0.0.1:5599"
    assert address_of("tcp://[::1]:5599", 7) == "tcp://[::1]:5606"


def test_a_port_that_is_taken_is_named_with_its_flag() -> None:
    with taken() as address:
        with pytest.raises(TwilightError, match=f"--twilight-events: .*{address}.*in use"):
            check_addresses(address, 1)
        with pytest.raises(TwilightError, match="--twilight-events"):
            EventSink(address, Rank())


def test_a_port_that_a_later_rank_needs_is_taken() -> None:
    for _ in range(20):
        with taken() as address:
            first = f"tcp://127.0.0.1:{int(address.rpartition(':')[2]) - 1}"
            with pytest.raises(TwilightError) as caught:
                check_addresses(first, 2)
        if first not in str(caught.value):  # else another process happens to hold that one
            break
    assert address in str(caught.value)


@pytest.mark.parametrize("host", ["192.0.2.1", "nosuch.invalid"])
def test_an_address_of_another_machine(host: str) -> None:
    with pytest.raises(TwilightError, match=f"cannot publish on tcp://{host}:5599"):
        check_addresses(f"tcp://{host}:5599", 1)


def test_ports_end() -> None:
    with pytest.raises(TwilightError, match="use one up to 65533"):
        check_addresses("tcp://127.0.0.1:65534", 3)


def test_a_checked_address_is_free_again(caplog: pytest.LogCaptureFixture) -> None:
    address = free_address()
    with caplog.at_level(logging.WARNING):
        check_addresses(address, 1)
    assert not caplog.records
    EventSink(address, Rank()).close()


def test_other_machines_that_can_read_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check_addresses(free_address().replace("127.0.0.1", "*"), 1)
    assert "--twilight-events" in caplog.text
    assert "other machines can read" in caplog.text
