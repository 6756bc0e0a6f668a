"""What a real server counts, as its `/metrics` and its events tell it."""

import time
import urllib.request

import msgspec
import pytest
import zmq
from client import Server, prose
from prometheus_client.parser import text_string_to_metric_families

from twilight_sgl.telemetry.events import VERSION

pytestmark = pytest.mark.server


def metrics(server: Server) -> dict[str, float]:
    """Our series on `/metrics`, added up over their labels."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    sums: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            if sample.name.startswith("twilight_"):
                assert sample.labels["tp_rank"] == "0"
                assert sample.labels["model_name"]
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


def expected(server: Server) -> dict[str, float]:
    """The same totals from `/server_info`."""
    told = server.twilight()
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


def test_metrics_and_events_tell_what_server_info_tells(server: Server) -> None:
    address = server.twilight()["config"]["events"]
    context = zmq.Context()
    reader = context.socket(zmq.SUB)
    reader.connect(address)
    reader.subscribe(b"twilight.step")
    try:
        before = expected(server)["twilight_sparse_rows_total"]
        server.generate(prose(3000), 8)
        totals = expected(server)
        assert totals["twilight_sparse_rows_total"] > before
        deadline = time.monotonic() + 30
        while True:  # what was counted last is published a second later
            shown = metrics(server)
            if {name: shown.get(name) for name in totals} == totals:
                break
            assert time.monotonic() < deadline, f"{shown} are not {totals}"
            time.sleep(0.2)
        assert 0 < shown["twilight_kept_fraction"] < 1
        assert reader.poll(30_000)
        _, payload = reader.recv_multipart()
    finally:
        context.destroy(linger=0)
    record = msgspec.msgpack.decode(payload)
    assert record["version"] == VERSION
    assert record["type"] == "step"
    assert record["tp_rank"] == 0
