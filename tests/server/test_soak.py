"""The soak against a real server whose cache its load does not fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from client import Server, environment

pytestmark = [pytest.mark.server, pytest.mark.nightly]


def test_a_soak(small_server: Server, tmp_path: Path) -> None:
    flags = ["--minutes", "2", "--concurrency", "3", "--prompt-tokens", "512"]
    flags += ["--output-tokens", "8", "--json", str(tmp_path / "soak.json")]
    command = [sys.executable, "-m", "twilight_sgl.benchmark", "soak", "--url", small_server.url]
    done = subprocess.run(
        [*command, *flags], env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "soak.json").read_text())
    first, last = saved["samples"][0], saved["samples"][-1]
    assert saved["finished"]
    assert last["checks"] > first["checks"]
    assert last["violations"] == 0
    assert last["built"] - last["sealed"] > first["built"] - first["sealed"]  # pages were evicted
    assert last["host_bytes"] > 0
    assert saved["requests"]["last"]["outcomes"]["completed"] >= 1
    assert sum(kind["outcomes"]["failed"] for kind in saved["requests"].values()) == 0
    assert f"audit: {last['checks'] - first['checks']:,} audits, 0 violations" in done.stdout
