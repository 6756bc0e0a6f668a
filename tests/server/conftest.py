"""Two servers for all server tests: one as users start it, one under cache pressure."""

from collections.abc import Iterator

import pytest
from client import Server, running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the default configuration but for an audit and shorter sparse contexts."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = ["--twilight-audit-interval", "8", "--twilight-min-context-tokens", "512"]
    with running(flags, log) as started:
        yield started


@pytest.fixture(scope="session")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Candidates are all pages, from the first token on; the cache holds 5k tokens only."""
    log = tmp_path_factory.mktemp("small_server") / "server.log"
    flags = [
        *("--twilight-selector-budget", "1", "--twilight-min-context-tokens", "0"),
        *("--twilight-audit-interval", "8", "--twilight-skip-layers", "none"),
        *("--max-total-tokens", "5120", "--schedule-conservativeness", "0.1"),
    ]
    with running(flags, log) as started:
        yield started
