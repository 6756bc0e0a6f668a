"""Two servers for all server tests: one as users start it, one under cache pressure."""

import contextlib
from collections.abc import Iterator

import pytest
from client import Server, running

from twilight_sgl.benchmark.servers import free_port

USUAL = [
    *("--twilight-audit-interval", "16", "--twilight-min-context-tokens", "512"),
    "--enable-metrics",
]
SMALL = [
    *("--twilight-selector-budget", "1", "--twilight-min-context-tokens", "0"),
    *("--twilight-audit-interval", "16", "--twilight-skip-layers", "none"),
    *("--max-total-tokens", "4608", "--schedule-conservativeness", "0.1"),
]


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Both servers, started at the same time."""
    logs = tmp_path_factory.mktemp("servers")
    with contextlib.ExitStack() as stack:
        small = stack.enter_context(running(SMALL, logs / "small.log"))
        events = ["--twilight-events", f"tcp://127.0.0.1:{free_port()}"]
        usual = stack.enter_context(running([*USUAL, *events], logs / "usual.log"))
        yield usual, small


@pytest.fixture(scope="session")
def server(servers: tuple[Server, Server]) -> Server:
    """A server with the default configuration but for an audit and shorter sparse contexts."""
    return servers[0].wait()


@pytest.fixture(scope="session")
def small_server(servers: tuple[Server, Server]) -> Server:
    """Candidates are all pages, from the first token on; the cache holds 4608 tokens only."""
    return servers[1].wait()
