"""What all unit tests share: one thread, and no configuration from the caller's environment."""

import os

import pytest

# Before torch is imported: these tests are small, and machines that run them are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWILIGHT_CONFIG", "")  # so that what a test leaves there is undone
    monkeypatch.delenv("TWILIGHT_CONFIG")
