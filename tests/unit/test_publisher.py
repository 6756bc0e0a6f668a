"""When totals are published, and that what fails there fails nothing else."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from snapshots import totals

from twilight_sgl.config import TwilightConfig
from twilight_sgl.errors import TwilightError
from twilight_sgl.patches import compat, telemetry
from twilight_sgl.telemetry.events import address_of
from twilight_sgl.telemetry.publisher import Publisher, difference
from twilight_sgl.telemetry.report import Reports
from twilight_sgl.telemetry.snapshot import Snapshot


class Sink:
    """Keeps what it is given; raises if told to."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.given: list[tuple[Snapshot, Snapshot]] = []

    def publish(self, totals: Snapshot, change: Snapshot) -> None:
        self.given.append((totals, change))
        if self.fails:
            raise OSError("broken")


class Polls:
    """Answers polls in turn, and counts them; the last answer stays."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.count = 0

    def poll(self) -> Snapshot | None:
        self.count += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def publisher_at(times: list[float], polls: Polls, *sinks: Sink) -> Publisher:
    moments = iter(times)
    return Publisher(polls.poll, sinks, clock=lambda: next(moments))


def test_difference_is_what_was_added() -> None:
    change = difference(totals(5), totals(2))
    assert np.array_equal(change.context_tokens, totals(3).context_tokens)
    assert np.array_equal(change.kept_tokens, totals(3).kept_tokens)
    assert change.sparse_rows == change.decode_steps == 3
    assert change.dense_steps == 0
    assert change.pages_built == 6
    assert (change.pages_sealed, change.pages_capacity, change.time) == (5, 512, 105.0)


def test_at_most_once_a_second_with_changes_since_the_last() -> None:
    sink, polls = Sink(), Polls(totals(2), totals(5))
    publisher = publisher_at([0, 0.5, 0.99, 1.0, 1.5], polls, sink)
    for _ in range(5):
        publisher.tick()
    assert polls.count == 2
    assert [all_.sparse_rows for all_, _ in sink.given] == [2, 5]
    assert [change.sparse_rows for _, change in sink.given] == [2, 3]


def test_nothing_new_is_not_published() -> None:
    sink, polls = Sink(), Polls(None, totals(2))
    publisher = publisher_at([0, 1, 2, 3], polls, sink)
    for _ in range(4):
        publisher.tick()
    assert polls.count == 4
    assert len(sink.given) == 1


def test_without_sinks_nothing_is_polled() -> None:
    polls = Polls(totals(1))
    publisher = publisher_at([0, 10], polls)
    publisher.tick()
    publisher.tick()
    assert polls.count == 0


def test_a_sink_that_fails_is_logged_once_and_stops_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken, whole, polls = Sink(fails=True), Sink(), Polls(totals(1), totals(2))
    publisher = publisher_at([0, 1], polls, broken, whole)
    publisher.tick()
    publisher.tick()
    assert [change.sparse_rows for _, change in whole.given] == [1, 1]
    assert len(broken.given) == 2
    assert sum("telemetry" in record.message for record in caplog.records) == 1


def test_a_poll_that_fails_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    sink, polls = Sink(), Polls(RuntimeError("gone"), RuntimeError("gone"), totals(3))
    publisher = publisher_at([0, 1, 2], polls, sink)
    for _ in range(3):
        publisher.tick()
    assert len(sink.given) == 1
    assert sum("telemetry" in record.message for record in caplog.records) == 1


# The hooks.


def fake_scheduler(runtime: Any, labels: dict[str, Any] | None = None) -> Any:
    server_args = SimpleNamespace(enable_dp_attention=False, dp_size=4)
    return SimpleNamespace(
        tp_worker=SimpleNamespace(
            model_runner=SimpleNamespace(twilight=runtime, server_args=server_args)
        ),
        metrics_collector=None if labels is None else SimpleNamespace(labels=labels),
        ps=SimpleNamespace(tp_rank=1, tp_size=2, pp_rank=0, pp_size=1, dp_rank=3),
    )


def hooks() -> tuple[Any, Any]:
    before_result, on_idle = (patch.hook for patch in telemetry.PATCHES[1:])
    return before_result, on_idle


@pytest.mark.parametrize("config", [None, TwilightConfig(telemetry=False), TwilightConfig()])
def test_without_a_runtime_or_a_sink_the_hooks_do_nothing(config: TwilightConfig | None) -> None:
    polls = Polls(totals(1))
    runtime = config and SimpleNamespace(config=config, poll_snapshot=polls.poll, reports=Reports())
    scheduler = fake_scheduler(runtime)
    before_result, on_idle = hooks()
    on_idle(scheduler)
    assert before_result(scheduler, "batch", "result") is None
    assert polls.count == 0


def test_busy_and_idle_loops_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    sink, polls = Sink(), Polls(totals(1))
    monkeypatch.setattr(telemetry, "_metrics", lambda scheduler: sink)
    runtime = SimpleNamespace(config=TwilightConfig(), poll_snapshot=polls.poll, reports=Reports())
    before_result, on_idle = hooks()
    scheduler = fake_scheduler(runtime)
    assert before_result(scheduler, "batch", "result") is None
    assert polls.count == 1
    idle = fake_scheduler(runtime)
    on_idle(idle)
    assert polls.count == 2
    assert len(sink.given) == 2


def test_sinks_that_cannot_be_made_stop_no_scheduler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = SimpleNamespace(
        config=TwilightConfig(events="tcp://nosuch.invalid:5599"),
        poll_snapshot=Polls(totals(1)).poll,
    )
    scheduler = fake_scheduler(runtime)
    _, on_idle = hooks()
    on_idle(scheduler)
    on_idle(scheduler)
    assert "cannot publish on tcp://nosuch.invalid:5606" in caplog.text


# Arguments.


def fake_args(monkeypatch: pytest.MonkeyPatch, **values: Any) -> Any:
    usual = {"tp_size": 1, "pp_size": 1, "dp_size": 1, "enable_dp_attention": False, "nnodes": 1}
    monkeypatch.setattr(telemetry, "uses_twilight", lambda args: True)
    monkeypatch.setattr(telemetry, "resolved", lambda args: args)
    monkeypatch.setattr(compat, "resolved", lambda args: args)
    return SimpleNamespace(**(usual | values))


def test_events_without_telemetry_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    TwilightConfig(events="tcp://127.0.0.1:5599", telemetry=False).to_environment()
    with pytest.raises(TwilightError, match=r"--twilight-events .* --twilight-telemetry false"):
        telemetry.PATCHES[0].hook(fake_args(monkeypatch))


@pytest.mark.parametrize(
    ("sizes", "schedulers"),
    [
        ({"tp_size": 4}, 4),
        ({"tp_size": 2, "pp_size": 2, "dp_size": 3}, 12),
        ({"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}, 4),
        ({"tp_size": 4, "attn_dp_size": 2}, 4),  # as 0.5.23 says the same
        ({"tp_size": 4, "attn_dp_size": 2, "dp_size": 3}, 12),
    ],
)
def test_every_scheduler_needs_a_port(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any], schedulers: int
) -> None:
    checked = []
    monkeypatch.setattr(
        "twilight_sgl.telemetry.events.check_addresses", lambda *given: checked.append(given)
    )
    TwilightConfig(events="tcp://127.0.0.1:5599").to_environment()
    telemetry.PATCHES[0].hook(fake_args(monkeypatch, **sizes))
    assert checked == [("tcp://127.0.0.1:5599", schedulers)]


def test_ports_of_other_nodes_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twilight_sgl.telemetry.events.check_addresses", pytest.fail)
    TwilightConfig(events="tcp://192.0.2.1:5599").to_environment()
    telemetry.PATCHES[0].hook(fake_args(monkeypatch, nnodes=2, tp_size=16))


@pytest.mark.parametrize(
    ("layout", "dp_rank", "port"),
    [
        ({"dp_size": 4, "enable_dp_attention": False}, 3, 5599 + 3 * 2 + 1),
        ({"dp_size": 2, "enable_dp_attention": True}, 1, 5599 + 1),
        ({"dp_size": 1, "attn_dp_size": 2}, 1, 5599 + 1),
        ({"dp_size": 2, "attn_dp_size": 2}, 3, 5599 + 2 + 1),
    ],
)
def test_a_scheduler_binds_the_port_of_its_rank(
    monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], dp_rank: int, port: int
) -> None:
    bound = []
    monkeypatch.setattr(
        "twilight_sgl.telemetry.events.EventSink",
        lambda address, rank: bound.append(address_of(address, rank.index)),
    )
    scheduler = fake_scheduler(None)
    scheduler.tp_worker.model_runner.server_args = fake_args(monkeypatch, **layout)
    scheduler.ps.dp_rank = dp_rank  # of TP rank 1 of 2
    telemetry._events(scheduler, "tcp://127.0.0.1:5599")
    assert bound == [f"tcp://127.0.0.1:{port}"]
