"""A real server in a process of its own, and the few calls the tests make to it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

START_SECONDS = 400
LAUNCHER = (sys.executable, "-m", "twilight_sgl.launch_server")


class Server:
    """A started server: `generate` and `/server_info`, and its log for when something fails."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log

    def post(self, path: str, body: dict[str, Any], timeout: float = 600) -> Any:
        """POST JSON; the answer's JSON, or its text where it is none."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            text = response.read().decode()
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    def refused(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        """POST JSON that must fail: the status and the body."""
        try:
            answer = self.post(path, body)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        raise AssertionError(f"{path} accepted {body}: {answer}")

    def generate(self, text: str, tokens: int, twilight: Any = None, **sampling: Any) -> Any:
        """Generate exactly `tokens` tokens, greedily."""
        sampling |= {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        if twilight is not None:
            sampling["custom_params"] = {"twilight": twilight}
        return self.post("/generate", {"text": text, "sampling_params": sampling})

    def generate_all(self, texts: list[str], tokens: int, twilight: Any = None) -> list[Any]:
        """Generate for all texts at the same time."""
        with ThreadPoolExecutor(len(texts)) as pool:
            return list(pool.map(lambda text: self.generate(text, tokens, twilight), texts))

    def twilight(self) -> dict[str, Any]:
        """Twilight's part of `/server_info`."""
        with urllib.request.urlopen(f"{self.url}/server_info", timeout=60) as response:
            return json.load(response)["internal_states"][0]["twilight"]

    def flush(self) -> None:
        """Empty the radix cache; waits until no request runs, which SGLang needs for it."""
        deadline = time.monotonic() + 60
        while True:
            try:
                self.post("/flush_cache", {})
                return
            except urllib.error.HTTPError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


def environment() -> dict[str, str]:
    """This process's environment for another one, less what the kernel tests set for themselves.

    Threads that wait do not spin: the servers and the tests share few cores.
    """
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return kept | {"PYTHONSAFEPATH": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@contextlib.contextmanager
def running(flags: list[str], log: Path, command: Sequence[str] = LAUNCHER) -> Iterator[Server]:
    """Start a server on a free port, wait until it generates, and end all its processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment(),
        )
        try:
            server = Server(f"http://127.0.0.1:{port}", log)
            _wait(server, process)
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{server.url}/health_generate", timeout=30):
                return
        except OSError:
            time.sleep(1)
    raise RuntimeError("the server did not start:\n" + server.log.read_text()[-4000:])


def prose(characters: int, start: int = 0) -> str:
    """English text of the given length, from Python's own manual."""
    manual = "\n\n".join(topics[name] for name in sorted(topics))
    return manual[start : start + characters]
