"""Servers that the benchmark starts: their flags, whether they fit at once, their life."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import Any

from twilight_sgl.benchmark.model_files import attention_shape, weight_bytes
from twilight_sgl.benchmark.prompts import Load, tokens_needed
from twilight_sgl.benchmark.streaming import MeasurementError
from twilight_sgl.errors import TwilightError
from twilight_sgl.pages.pool import summary_bytes_per_token

OURS = {"twilight": "top_p", "quest": "none"}  # and the pruner of each
PAGE_SIZE = 16
LAUNCHER = (sys.executable, "-m", "twilight_sgl.launch_server")
_PORTS = range(20000, 32768)  # Linux gives connections those above, unless told otherwise
_LOG_LINES, _LINE_CHARACTERS = 20, 300
_POLL_SECONDS = 0.5
_STOP_SECONDS = 15
_PROCESS_BYTES = {"cuda": 5 << 30, "cpu": 2 << 30}  # beside weights, KV cache and summaries


@dataclass
class Server:
    """A server under test.

    Attributes:
        name: as in --backends.
        url: where it listens.
        flags: what it was started with; none for one that ran already.
        process, log: of one that was started.
    """

    name: str
    url: str
    flags: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None

    def check(self, wait_seconds: float = 0) -> None:
        """Raise MeasurementError, with the end of its log, if it has ended or does in the wait."""
        if self.process is None or self.log is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(wait_seconds)
        if self.process.returncode is None:
            return
        lines = self.log.read_text(errors="replace").splitlines()
        end = "\n  ".join(line[:_LINE_CHARACTERS] for line in lines[-_LOG_LINES:])
        text = f"the server of {self.name!r} ended with {self.process.returncode}; {self.log} ends"
        if any(f"invalid choice: '{self.name}'" in line for line in lines):
            raise TwilightError(
                f"--backends {self.name}: this SGLang has no such attention backend; {text}:\n"
                f"  {end}"
            )
        raise MeasurementError(f"{text}:\n  {end}")

    def is_ready(self) -> bool:
        """Whether it generates."""
        try:
            with urllib.request.urlopen(f"{self.url}/health_generate", timeout=30):
                return True
        except OSError:
            return False


def dense_backend(names: Sequence[str]) -> str | None:
    """The first of the names that is a backend of SGLang's own."""
    return next((name for name in names if name not in OURS), None)


def server_flags(
    name: str,
    *,
    model: str,
    p: float,
    dense: str | None,
    device: str,
    loads: Sequence[Load],
    max_total_tokens: int | None,
    extra: Sequence[str],
) -> tuple[str, ...]:
    """Flags of one backend's server: alike for all but for what decodes and the page size.

    SGLang's own backends run as they would without Twilight: it mostly gives them pages of one
    token, which cost its scheduler less in each step.

    Args:
        dense: backend that prefills for Twilight; SGLang's choice without one.
        max_total_tokens: size of the KV pool; SGLang's choice without one.
        extra: --server-args, which win.
    """
    flags = ["--model-path", model, "--sleep-on-idle"]
    if name in OURS:
        flags += ["--page-size", str(PAGE_SIZE)]
        flags += ["--decode-attention-backend", "twilight"]
        flags += ["--twilight-p", str(p), "--twilight-pruner", OURS[name]]
        flags += ["--twilight-selector", "quest"] if name == "quest" else []
        if dense:
            flags += ["--attention-backend", dense]
    else:
        flags += ["--attention-backend", name, "--decode-attention-backend", name]
    if device == "cuda":
        flags += ["--cuda-graph-max-bs-decode", str(max(load.requests for load in loads))]
    if max_total_tokens is not None:
        flags += ["--max-total-tokens", str(max_total_tokens)]
    return (*flags, *extra)


def tokens_at_once(load: Load, max_tokens: int, shared_prefix: int) -> int:
    """Tokens of KV cache that all requests of a load take, of a prefix that they share once."""
    return tokens_needed(load, shared_prefix) + load.requests * max_tokens


def pool_tokens(loads: Sequence[Load], max_tokens: int, shared_prefix: int = 0) -> int:
    """Tokens of KV cache that the largest load takes, in whole pages and some to spare.

    A shared prefix is held twice for a while, where two requests come upon it before it is cached.
    """
    ends = 2 * PAGE_SIZE  # of each request
    need = max(tokens_at_once(load, max_tokens + ends, shared_prefix) for load in loads)
    return -(-(need + shared_prefix + 4096) // PAGE_SIZE) * PAGE_SIZE


def fit_at_once(
    pools: Sequence[tuple[str, int]], folder: Path, config: Any, device: str, free_bytes: int
) -> bool:
    """Whether servers fit into the memory that is free.

    Args:
        pools: each one's backend and tokens of its KV pool.
        folder: with the model's weights; what lies elsewhere is not known to fit.
        config: the model's transformers configuration.
    """
    weights = weight_bytes(folder)
    if not weights:
        return False
    element_bytes = 4 if device == "cpu" else 2
    layers, heads_kv, dim = attention_shape(config)
    cache_bytes = layers * 2 * heads_kv * dim * element_bytes  # a token
    page_bytes = layers * summary_bytes_per_token(heads_kv, dim, element_bytes, PAGE_SIZE)
    need = len(pools) * (weights * element_bytes / 2 + _PROCESS_BYTES[device])
    need += sum(
        tokens * (cache_bytes + (page_bytes if name in OURS else 0)) for name, tokens in pools
    )
    return need <= 0.95 * free_bytes


def free_memory(device: str) -> int:
    """Bytes that are free: of the first GPU, or of the machine."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info(0)[0]
    import psutil

    return psutil.virtual_memory().available


@contextlib.contextmanager
def terminations_interrupt() -> Iterator[None]:
    """SIGTERM is as Ctrl-C meanwhile, so that servers which were started are ended."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def running(
    flags_by_name: dict[str, tuple[str, ...]],
    logs: Path,
    *,
    start_seconds: float,
    ready: Callable[[str], None],
    launcher: Sequence[str] = LAUNCHER,
) -> Iterator[list[Server]]:
    """Start servers together, wait until all generate, and end all their processes afterwards.

    Args:
        flags_by_name: flags by backend; the port is added.
        logs: folder for a log each.
        ready: called with the name of each server that is ready.
    Raises:
        MeasurementError: one ended or is not ready in time; with the end of its log.
        TwilightError: SGLang does not know a backend.
    """
    servers: list[Server] = []
    try:
        for name, flags in flags_by_name.items():
            servers.append(_start(name, flags, logs / f"{name}.log", launcher))
        _wait(servers, start_seconds, ready)
        yield servers
    finally:
        _stop(servers)


def free_port(ports: Sequence[int] = _PORTS) -> int:
    """A port of this machine that nobody listens on, nor is likely to before a server starts.

    A server binds its port a minute after it was told; one of those that connections get may be
    gone by then.

    Raises:
        TwilightError: all of them are taken.
    """
    for port in SystemRandom().sample(ports, len(ports)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise TwilightError(f"no free port among {ports[0]} to {ports[-1]} for a server")


def _start(name: str, flags: tuple[str, ...], log: Path, launcher: Sequence[str]) -> Server:
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*launcher, *flags, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A folder called `kernels` in the working directory would shadow SGLang's dependency.
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
    return Server(name, f"http://127.0.0.1:{port}", flags, process, log)


def _wait(servers: Sequence[Server], seconds: float, ready: Callable[[str], None]) -> None:
    deadline = time.monotonic() + seconds
    waiting = list(servers)
    while waiting:
        for server in list(waiting):
            server.check()
            if server.is_ready():
                waiting.remove(server)
                ready(server.name)
        if waiting and time.monotonic() > deadline:
            names = ", ".join(server.name for server in waiting)
            logs = ", ".join(str(server.log) for server in waiting)
            raise MeasurementError(
                f"not ready after {seconds:.0f} s: {names}; see {logs}, or raise --start-timeout"
            )
        time.sleep(_POLL_SECONDS)


def _stop(servers: Sequence[Server]) -> None:
    """End the servers' process groups, whatever else arrives meanwhile."""
    before = {name: signal.signal(name, signal.SIG_IGN) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        processes = [server.process for server in servers if server.process is not None]
        for process in processes:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
            _signal_group(process, signal.SIGKILL)
            process.wait()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
