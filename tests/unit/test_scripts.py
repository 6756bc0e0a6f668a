"""Set-up and serve scripts, run on a stand-in checkout whose "server" is a few lines of Python."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import is_alive

from twilight_sgl.benchmark.servers import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ["launch/setup.sh", "launch/serve.sh", "tests/run.sh", ".ci/run"]

# Starts one child in its process group and one in a session of its own, both ignoring SIGINT and
# SIGTERM as a stuck worker would, and answers like a ready server. --stuck: it ignores them too.
SERVER = """
import http.server, json, os, signal, subprocess, sys

if "--help" in sys.argv:
    print("every flag")
    sys.exit(0)
if "--crash" in sys.argv:
    sys.exit(7)
sleeper = (
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(120)"
)
children = [
    subprocess.Popen(
        [sys.executable, "-c", sleeper], stdout=subprocess.PIPE, start_new_session=detached
    )
    for detached in (False, True)
]
for child in children:
    child.stdout.readline()
if "--stuck" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()


port = int(sys.argv[sys.argv.index("--port") + 1])
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
pids = [os.getpid(), *(child.pid for child in children)]
print(json.dumps({"pids": pids, "arguments": sys.argv[1:]}), flush=True)
server.serve_forever()
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_parses_and_is_executable(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout with an environment that counts as installed and a stand-in server."""
    root = tmp_path / "a checkout"
    for folder in ("launch", "twilight_sgl", ".venv/bin"):
        (root / folder).mkdir(parents=True)
    for name in ("launch/setup.sh", "launch/serve.sh"):
        (root / name).write_text((ROOT / name).read_text())
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        (root / name).write_text("")
    (root / "twilight_sgl/__init__.py").write_text("")
    (root / "twilight_sgl/launch_server.py").write_text(SERVER)
    python = root / ".venv/bin/python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in *"pip install"*) echo "$*" >>"$(dirname "$0")/installs"; exit "${PIP:-0}";;'
        f' esac\nPYTHONPATH="{root}" exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return root


def _set_up(root: Path, *extras: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(root / "launch/setup.sh"), *extras]
    environment = {**os.environ, **variables}
    environment.pop("SGLANG_VERSION", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def _installs(root: Path) -> list[str]:
    log = root / ".venv/bin/installs"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_second_set_up_installs_nothing(checkout: Path) -> None:
    assert _set_up(checkout, "test").returncode == 0
    installs = _installs(checkout)
    assert len(installs) == 2 and installs[-1].endswith("[test]")
    assert all(f"-c {checkout}/constraints.txt" in line for line in installs)
    assert _set_up(checkout, "test").returncode == 0
    assert _set_up(checkout).returncode == 0
    assert _installs(checkout) == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_install_again(checkout: Path, name: str) -> None:
    _set_up(checkout)
    _installs(checkout)
    (checkout / name).write_text("# changed\n")
    assert _set_up(checkout).returncode == 0
    assert _installs(checkout)


def test_extras_install_over_a_plain_set_up(checkout: Path) -> None:
    _set_up(checkout)
    _installs(checkout)
    assert _set_up(checkout, "test").returncode == 0
    assert _installs(checkout)


def test_failed_install_is_told_and_tried_again(checkout: Path) -> None:
    failed = _set_up(checkout, PIP="1")
    assert failed.returncode == 1
    assert "Check the network" in failed.stderr
    _installs(checkout)
    assert _set_up(checkout).returncode == 0
    assert _installs(checkout)


def test_unfit_python_is_refused_with_a_remedy(checkout: Path) -> None:
    (checkout / ".venv/bin/python").unlink()
    refused = _set_up(checkout, TWILIGHT_PYTHON="/bin/false")
    assert refused.returncode == 1
    assert "TWILIGHT_PYTHON=/bin/false" in refused.stderr
    assert "apt install python3.12" in refused.stderr


def test_a_python_that_exists_and_does_not_run_is_passed_over(checkout: Path) -> None:
    shims = checkout / "shims"
    shims.mkdir()
    for version in ("3.12", "3.13", "3.11", "3.10"):
        (shims / f"python{version}").write_text("#!/bin/sh\nexit 127\n")
        (shims / f"python{version}").chmod(0o755)
    (shims / "python3").symlink_to(sys.executable)
    command = f"source '{checkout}/launch/setup.sh'; _twilight_find_python"
    environment = {"PATH": f"{shims}:/usr/bin:/bin", "HOME": str(checkout)}
    environment["PYENV_ROOT"] = str(checkout / "none")
    found = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60
    )
    assert found.stdout == "python3\n", found.stderr


def _wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


Serve = Callable[..., tuple[subprocess.Popen[str], dict]]


@pytest.fixture
def serve(checkout: Path) -> Iterator[Serve]:
    """Return a function that starts serve.sh and waits for the stand-in's first line."""
    _set_up(checkout)
    started: list[tuple[subprocess.Popen[str], list[int]]] = []

    def start(*flags: str, **variables: str) -> tuple[subprocess.Popen[str], dict]:
        process = subprocess.Popen(
            ["bash", str(checkout / "launch/serve.sh"), *flags],
            env={**os.environ, "TWILIGHT_STOP_SECONDS": "5", **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        report = json.loads(process.stdout.readline())
        started.append((process, report["pids"]))
        return process, report

    yield start
    for process, pids in started:
        for pid in (process.pid, *pids):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_every_process(serve: Serve, number: signal.Signals) -> None:
    process, report = serve("--port", str(free_port()))
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert _wait_for(lambda: not any(map(is_alive, report["pids"])), 5), report
    assert "serve.sh: line" not in errors


def test_stuck_server_is_killed_after_the_grace_time(serve: Serve) -> None:
    process, report = serve("--stuck", "--port", str(free_port()), TWILIGHT_STOP_SECONDS="1")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert _wait_for(lambda: not any(map(is_alive, report["pids"])), 5), report


def test_second_signal_does_not_wait(serve: Serve) -> None:
    process, report = serve("--stuck", "--port", str(free_port()), TWILIGHT_STOP_SECONDS="60")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert _wait_for(lambda: not any(map(is_alive, report["pids"])), 5), report


def test_flags_pass_verbatim_and_readiness_is_announced(serve: Serve) -> None:
    port = str(free_port())
    flags = ["--json", '{"a": "b c"}', "--host", "0.0.0.0", "--port", port]
    process, report = serve(*flags)
    assert report["arguments"] == flags
    assert process.stderr is not None
    lines = ""
    while "/server_info" not in lines:
        line = process.stderr.readline()
        assert line, lines
        lines += line
    assert f"curl -s http://127.0.0.1:{port}/v1/chat/completions" in lines
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)


def test_server_exit_status_is_kept_and_nothing_waits(checkout: Path) -> None:
    _set_up(checkout)
    serve = checkout / "launch/serve.sh"
    crashed = subprocess.run(["bash", serve, "--crash"], capture_output=True, timeout=120)
    assert crashed.returncode == 7
    helped = subprocess.run(["bash", serve, "--help"], capture_output=True, text=True, timeout=120)
    assert (helped.returncode, helped.stdout) == (0, "every flag\n")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "http://127.0.0.1:30000"),
        (["--host=::", "--port=31000"], "http://[::1]:31000"),
        (["--config", "recipe.yaml"], "http://10.0.0.5:32000"),
        (["--config=recipe.yaml", "--port", "31000"], "http://10.0.0.5:31000"),
    ],
)
def test_address_comes_from_flags_then_config(
    checkout: Path, flags: list[str], expected: str
) -> None:
    _set_up(checkout)
    (checkout / "recipe.yaml").write_text('host: "10.0.0.5"\nport: 32000 # not the default\n')
    script = (checkout / "launch/serve.sh").read_text().partition("# Job control")[0]
    (checkout / "launch/serve.sh").write_text(f'{script}\necho "$url"\n')
    printed = subprocess.run(
        ["bash", "launch/serve.sh", *flags], cwd=checkout, capture_output=True, text=True
    )
    assert printed.stdout == f"{expected}\n", printed.stderr
