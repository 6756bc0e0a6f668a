"""What a real server counts, as its `/metrics` and its events tell it."""

import time
from typing import Any

import msgspec
import pytest
import zmq
from client import Server, prose

from twilight_sgl.telemetry.events import VERSION

pytestmark = pytest.mark.server


def expected(told: dict[str, Any]) -> dict[str, float]:
    """Series with the totals of a state of `/server_info`."""
    budget, pages, steps, audit = (told[part] for part in ("budget", "pages", "steps", "audit"))
    return {
        "twilight_context_tokens_total": budget["context_tokens"],
        "twilight_candidate_tokens_total": budget["candidate_tokens"],
        "twilight_kept_tokens_total": budget["kept_tokens"],
        "twilight_mixed_rows_total": budget["mixed_rows"],
        "twilight_sparse_rows_total": steps["sparse_rows"],
        "twilight_decode_steps_total": steps["decode"],
        "twilight_dense_steps_total": steps["dense"],
        "twilight_pages_built_total": pages["built"],
        "twilight_pages_reused_total": pages["reused"],
        "twilight_pages_sealed": pages["sealed"],
        "twilight_pages_capacity": pages["capacity"],
        "twilight_audit_checks_total": audit["checks"],
        "twilight_audit_violations_total": audit["violations"],
    }


def wait_for(server: Server, totals: list[dict[str, float]], **labels: str) -> dict[str, float]:
    """Wait until `/metrics` has one of these totals: what was counted last comes a second later."""
    deadline = time.monotonic() + 30
    while True:
        shown = server.metrics(**labels)
        if {name: shown.get(name) for name in totals[0]} in totals:
            return shown
        assert time.monotonic() < deadline, f"{shown} are not {totals}"
        time.sleep(0.2)


def test_metrics_and_events_tell_what_server_info_tells(server: Server) -> None:
    address = server.twilight()["config"]["events"]
    context = zmq.Context()
    reader = context.socket(zmq.SUB)
    reader.connect(address)
    reader.subscribe(b"twilight.step")
    try:
        before = expected(server.twilight())["twilight_sparse_rows_total"]
        server.generate(prose(3000), 8)
        totals = expected(server.twilight())
        assert totals["twilight_sparse_rows_total"] > before
        shown = wait_for(server, [totals], tp_rank="0")
        assert 0 < shown["twilight_kept_fraction"] < 1
        assert reader.poll(30_000)
        _, payload = reader.recv_multipart()
    finally:
        context.destroy(linger=0)
    record = msgspec.msgpack.decode(payload)
    assert record["version"] == VERSION
    assert record["type"] == "step"
    assert record["tp_rank"] == 0


def test_a_flood_and_a_reader_that_never_reads_disturb_nothing(server: Server) -> None:
    """Forty requests at once, a subscriber without room for records, and one that is gone."""
    before = server.twilight()
    context = zmq.Context()
    try:
        for reads_later in (True, False):
            reader = context.socket(zmq.SUB)
            reader.setsockopt(zmq.RCVHWM, 1)
            reader.connect(before["config"]["events"])
            reader.subscribe(b"")
            if not reads_later:
                reader.close(0)
        prompts = [prose(300, start=320000 + 10 * n) for n in range(39)] + [prose(2600)]
        answers = server.generate_all(prompts, 3)
    finally:
        context.destroy(linger=0)
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [3] * 40
    assert answers[-1]["meta_info"]["twilight"]["steps"] == 2
    after = server.twilight()
    assert after["steps"]["sparse_rows"] > before["steps"]["sparse_rows"]
    assert after["audit"]["violations"] == 0
    wait_for(server, [expected(after)], tp_rank="0")
    assert "Twilight telemetry" not in server.log.read_text()
