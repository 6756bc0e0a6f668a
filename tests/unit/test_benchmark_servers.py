"""Servers that the benchmark starts: their life, and their ports."""

import socket
import sys
from pathlib import Path

import pytest
from processes import CHILD, ends

from twilight_sgl.benchmark.servers import free_port, running
from twilight_sgl.benchmark.streaming import MeasurementError
from twilight_sgl.errors import TwilightError

LISTEN = """
import http.server, sys
from http.server import BaseHTTPRequestHandler as Handler
Handler.do_GET = lambda self: (self.send_response(200), self.end_headers())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def run_servers(script: str, logs: Path, name: str = "fa3", start_seconds: float = 60) -> list[str]:
    launcher = (sys.executable, "-c", script)
    ready: list[str] = []
    with running(
        {name: ("--flag",)},
        logs,
        start_seconds=start_seconds,
        ready=ready.append,
        launcher=launcher,
    ) as servers:
        assert [server.is_ready() for server in servers] == [True]
        assert servers[0].process is not None
        servers[0].check()
    assert servers[0].process.poll() is not None
    return ready


def test_server_is_waited_for_and_ended(tmp_path: Path) -> None:
    assert run_servers(LISTEN, tmp_path) == ["fa3"]


def test_ports_that_are_taken_are_passed_over() -> None:
    first, second = free_port(), free_port()
    while second == first:
        second = free_port()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", first))
        assert [free_port([first, second]) for _ in range(8)] == [second] * 8
        with pytest.raises(TwilightError, match=f"no free port among {first}"):
            free_port([first])
    assert free_port([first]) == first


def test_ports_are_below_those_that_linux_gives_connections() -> None:
    assert all(1024 <= free_port() < 32768 for _ in range(32))


def test_server_that_ends_shows_its_last_lines(tmp_path: Path) -> None:
    script = "print('loading' * 999); print('out of memory: lower it'); raise SystemExit(3)"
    with pytest.raises(MeasurementError, match="'fa3' ended with 3") as caught:
        run_servers(script, tmp_path)
    assert "out of memory: lower it" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert str(tmp_path / "fa3.log") in str(caught.value)


def test_server_that_ends_later_is_noticed(tmp_path: Path) -> None:
    launcher = (sys.executable, "-c", LISTEN)
    with running(
        {"fa3": ()}, tmp_path, start_seconds=60, ready=lambda name: None, launcher=launcher
    ) as (server,):
        assert server.process is not None
        server.process.kill()
        with pytest.raises(MeasurementError, match="'fa3' ended with -9"):
            server.check(wait_seconds=30)


def test_backend_that_sglang_does_not_know_is_named(tmp_path: Path) -> None:
    script = "raise SystemExit(\"argument --attention-backend: invalid choice: 'fa9' (choose)\")"
    with pytest.raises(TwilightError, match=r"--backends fa9: .*no such attention backend"):
        run_servers(script, tmp_path, "fa9")


def test_slow_server_is_given_up_with_all_its_processes(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"not ready after .*fa3.*--start-timeout"):
        run_servers(CHILD, tmp_path, start_seconds=3)
    (child,) = [int(line.split()[1]) for line in (tmp_path / "fa3.log").open()]
    assert ends(child)
