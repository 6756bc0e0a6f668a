"""A real server in a process of its own, and the few calls the tests make to it."""

import contextlib
import json
import os
import signal
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

from prometheus_client.parser import text_string_to_metric_families

from twilight_sgl.benchmark.servers import free_port

START_SECONDS = 400
Prompt = str | list[int]  # text or token ids
LAUNCHER = (sys.executable, "-m", "twilight_sgl.launch_server")


class Server:
    """A started server: `generate` and `/server_info`, and its log for when something fails."""

    def __init__(self, url: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self.log = log
        self._process = process

    def wait(self, seconds: float = START_SECONDS) -> "Server":
        """Wait until the server generates.

        Raises:
            RuntimeError: it ended or took too long; with the end of its log.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health_generate", timeout=30):
                    return self
            except OSError:
                time.sleep(1)
        raise RuntimeError("the server did not start:\n" + self.log.read_text()[-4000:])

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

    def generate(self, prompt: Prompt, tokens: int, twilight: Any = None) -> Any:
        """Generate exactly `tokens` tokens, greedily."""
        # With `ignore_eos` SGLang 0.5.23 would reserve them all, and never have to retract.
        sampling = {"max_new_tokens": tokens, "min_new_tokens": tokens, "temperature": 0}
        if twilight is not None:
            sampling["custom_params"] = {"twilight": twilight}
        given = {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
        return self.post("/generate", {**given, "sampling_params": sampling})

    def generate_all(self, prompts: Sequence[Prompt], tokens: int) -> list[Any]:
        """Generate for all prompts at the same time."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, tokens), prompts))

    def twilights(self) -> list[dict[str, Any]]:
        """Twilight's part of `/server_info`, by data-parallel rank in no order."""
        with urllib.request.urlopen(f"{self.url}/server_info", timeout=60) as response:
            return [state["twilight"] for state in json.load(response)["internal_states"]]

    def twilight(self) -> dict[str, Any]:
        """The same of a server without data parallelism."""
        (state,) = self.twilights()
        return state

    def metrics(self, **labels: str) -> dict[str, float]:
        """Our series on `/metrics` with these labels, added up over the others."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
        sums: dict[str, float] = {}
        for sample in (sample for family in families for sample in family.samples):
            if sample.name.startswith("twilight_") and sample.labels.items() >= labels.items():
                assert sample.labels["model_name"]
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
        return sums

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

    One thread a process: threads that wait for each other are slow where cores are shared.
    """
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return kept | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def running(
    flags: list[str], log: Path, command: Sequence[str] = LAUNCHER, **variables: str
) -> Iterator[Server]:
    """Start a server on a free port, and end all its processes afterwards.

    It is not ready yet: `Server.wait` is for whoever uses it first, so that two can start at once.

    Args:
        variables: of the environment, beside this process's.
    """
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment() | variables,
        )
        try:
            yield Server(f"http://127.0.0.1:{port}", log, process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def prose(characters: int, start: int = 0) -> str:
    """English text of the given length, from Python's own manual."""
    manual = "\n\n".join(topics[name] for name in sorted(topics))
    return manual[start : start + characters]
