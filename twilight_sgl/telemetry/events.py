"""Records of what happened, on a ZMQ PUB socket (--twilight-events).

A message has two frames: the topic, and a msgpack map. Every map holds `version` (1), `type`,
`sequence` (by rank from 0, so a gap is what a reader missed), `time` (seconds since the epoch),
`seconds` that the record covers (0 in the first of a rank, which covers all before it), `tp_rank`,
`pp_rank` and `dp_rank`. Keys may be added within a version.

| topic           | other keys                                                                  |
|-----------------|-----------------------------------------------------------------------------|
| twilight.step   | decode_steps, dense_steps, mixed_rows, sparse_rows; context_tokens,         |
|                 | candidate_tokens, kept_tokens summed over sparse rows, layers and this      |
|                 | rank's KV heads; kept_mass, a mean; layer_ids; kept_fraction [L][HK]        |
| twilight.pages  | sealed, unsealed, reused pages; sealed_now; capacity; sealing_seconds       |
| twilight.audit  | checks, violations                                                          |

A record is sent when something of its kind happened, at most once a second. `kept_mass` and
`kept_fraction` are None where no row was sparse.
"""

import logging
import re
from dataclasses import dataclass

import msgspec
import zmq

from twilight_sgl.config import flag_of
from twilight_sgl.errors import TwilightError
from twilight_sgl.telemetry.snapshot import Snapshot

VERSION = 1
QUEUED_MESSAGES = 64  # for each reader; more are dropped
_LOOPBACK = re.compile(r"tcp://(127\.[\d.]+|localhost|\[::1\]):\d+")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rank:
    """Which scheduler speaks; `index` counts those of a server from 0."""

    tp_rank: int = 0
    pp_rank: int = 0
    dp_rank: int = 0
    index: int = 0


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What all records hold."""

    version: int
    sequence: int
    time: float
    seconds: float
    tp_rank: int
    pp_rank: int
    dp_rank: int


class Step(Record, frozen=True, kw_only=True, tag_field="type", tag="step"):
    """Decode steps, and what their sparse rows kept."""

    decode_steps: int
    dense_steps: int
    mixed_rows: int
    sparse_rows: int
    context_tokens: int
    candidate_tokens: int
    kept_tokens: int
    kept_mass: float | None
    layer_ids: tuple[int, ...]
    kept_fraction: list[list[float]] | None


class Pages(Record, frozen=True, kw_only=True, tag_field="type", tag="pages"):
    """Pages that gained or lost a summary, or were found with one."""

    sealed: int
    unsealed: int
    reused: int
    sealed_now: int
    capacity: int
    sealing_seconds: float


class Audit(Record, frozen=True, kw_only=True, tag_field="type", tag="audit"):
    """Audits run, and summaries that were not their keys'."""

    checks: int
    violations: int


TOPICS: dict[type[Record], bytes] = {
    Step: b"twilight.step",
    Pages: b"twilight.pages",
    Audit: b"twilight.audit",
}


def address_of(address: str, index: int) -> str:
    """The address of a scheduler: its port is the given one plus the scheduler's index."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + index}"


def check_addresses(address: str, schedulers: int) -> None:
    """Try whether all addresses are free; warn if other machines can read them.

    Raises:
        TwilightError: one is not; it names the flag.
    """
    if int(address.rpartition(":")[2]) + schedulers - 1 > 65535:
        raise TwilightError(
            f"{flag_of('events')} {address}: {schedulers} schedulers need a port each, from this "
            f"one on; use one up to {65536 - schedulers}"
        )
    for index in range(schedulers):
        context = zmq.Context()
        try:
            _bind(context, address_of(address, index)).close(0)
        finally:
            context.term()  # the port is free again afterwards
    if not _LOOPBACK.fullmatch(address):
        logger.warning(
            "%s %s: other machines can read the events, which are neither encrypted nor protected "
            "by a key; use tcp://127.0.0.1:PORT to keep them on this one",
            flag_of("events"),
            address,
        )


def _bind(context: zmq.Context, address: str) -> zmq.Socket:
    publisher = context.socket(zmq.PUB)
    publisher.setsockopt(zmq.SNDHWM, QUEUED_MESSAGES)
    publisher.setsockopt(zmq.LINGER, 0)
    if "[" in address:
        publisher.setsockopt(zmq.IPV6, 1)
    try:
        publisher.bind(address)
    except zmq.ZMQError as error:
        publisher.close(0)
        raise TwilightError(
            f"{flag_of('events')}: cannot publish on {address}: {error.strerror}; give an address "
            "of this machine with a free port"
        ) from error
    return publisher


class EventSink:
    """Publishes records, and drops those that nobody takes.

    Args:
        address: of the server; the scheduler's own is `address_of` it.
        rank: of the scheduler.

    Raises:
        TwilightError: the address is taken or not this machine's.
    """

    def __init__(self, address: str, rank: Rank) -> None:
        self._rank = rank
        self._context = zmq.Context()
        try:
            self._socket = _bind(self._context, address_of(address, rank.index))
        except TwilightError:
            self._context.term()
            raise
        self._sequence = 0
        self._previous: Snapshot | None = None

    def publish(self, totals: Snapshot, change: Snapshot) -> None:
        """Send what is new; never blocks."""
        previous, self._previous = self._previous, totals
        for record in self._records(totals, change, previous):
            payload = msgspec.msgpack.encode(record)
            self._socket.send_multipart([TOPICS[type(record)], payload], zmq.NOBLOCK)

    def close(self) -> None:
        """Drop what is not sent yet, and free the port."""
        self._socket.close(0)
        self._context.term()

    def _records(
        self, totals: Snapshot, change: Snapshot, previous: Snapshot | None
    ) -> list[Record]:
        records: list[Record] = []
        if change.decode_steps or change.mixed_rows:
            records.append(self._step(totals, change, previous))
        sealed_before = previous.pages_sealed if previous else 0
        unsealed = sealed_before + change.pages_built - totals.pages_sealed
        if change.pages_built or change.pages_reused or unsealed:
            records.append(
                Pages(
                    **self._common(totals, previous),
                    sealed=change.pages_built,
                    unsealed=unsealed,
                    reused=change.pages_reused,
                    sealed_now=totals.pages_sealed,
                    capacity=totals.pages_capacity,
                    sealing_seconds=change.sealing_seconds,
                )
            )
        if change.audit_checks:
            records.append(
                Audit(
                    **self._common(totals, previous),
                    checks=change.audit_checks,
                    violations=change.audit_violations,
                )
            )
        return records

    def _step(self, totals: Snapshot, change: Snapshot, previous: Snapshot | None) -> Step:
        sparse = change.sparse_rows > 0
        pairs = change.sparse_rows * change.kept_mass.size
        fraction = (change.kept_tokens / change.context_tokens).round(6) if sparse else None
        return Step(
            **self._common(totals, previous),
            decode_steps=change.decode_steps,
            dense_steps=change.dense_steps,
            mixed_rows=change.mixed_rows,
            sparse_rows=change.sparse_rows,
            context_tokens=int(change.context_tokens.sum()),
            candidate_tokens=int(change.candidate_tokens.sum()),
            kept_tokens=int(change.kept_tokens.sum()),
            kept_mass=float(change.kept_mass.sum()) / pairs if sparse else None,
            layer_ids=change.layer_ids,
            kept_fraction=None if fraction is None else fraction.tolist(),
        )

    def _common(self, totals: Snapshot, previous: Snapshot | None) -> dict:
        sequence, self._sequence = self._sequence, self._sequence + 1
        return {
            "version": VERSION,
            "sequence": sequence,
            "time": totals.time,
            "seconds": totals.time - previous.time if previous else 0.0,
            "tp_rank": self._rank.tp_rank,
            "pp_rank": self._rank.pp_rank,
            "dp_rank": self._rank.dp_rank,
        }
