"""Timing on the device by CUDA-graph replay, and what a result row says about its machine."""

import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, 20th and 80th percentile."""

    p50_us: float
    p20_us: float
    p80_us: float


def time_calls(calls: Sequence[Callable[[], object]], *, replays: int = 30) -> Timing:
    """Time a round of calls captured in one CUDA graph, per call.

    Pass one call a layer, on memory of its own, so that a round reads more than the L2 cache
    holds, as a model's layers do.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(replays):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            times.append((start, end))
        stream.synchronize()
    taken = sorted(start.elapsed_time(end) * 1000 / len(calls) for start, end in times)
    return Timing(
        statistics.median(taken), taken[len(taken) // 5], taken[len(taken) - 1 - len(taken) // 5]
    )


def copy_bandwidth(device: str = "cuda", size_bytes: int = 1 << 31) -> float:
    """Bytes a second, read plus written, of a large copy on the device."""
    source = torch.randn(size_bytes // 4, device=device)
    target = torch.empty_like(source)
    # A kernel: on an H100 the driver's own copy, which `copy_` calls, is a fifth slower.
    timing = time_calls([lambda: torch.neg(source, out=target)], replays=20)
    return 2 * size_bytes / (timing.p50_us * 1e-6)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine() -> dict[str, str | None]:
    """GPU (None without one), processor, versions and the commit of the source tree."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "sglang": _version("sglang"),
        "flashinfer": _version("flashinfer-python"),
        "commit": commit,
    }
