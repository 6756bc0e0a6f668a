"""What all unit tests share: one thread, signals that are heeded, nobody's configuration."""

import os
import signal

import pytest

# Before torch is imported: these tests are small, and machines that run them are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where tests run in the background these are ignored, which children inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWILIGHT_CONFIG", "")  # so that what a test leaves there is undone
    monkeypatch.delenv("TWILIGHT_CONFIG")
