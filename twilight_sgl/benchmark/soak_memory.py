"""Memory of a running server: of its processes on this machine, and on the GPU."""

import contextlib
import ipaddress
import shutil
import socket
import subprocess
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

_NVIDIA_SMI_SECONDS = 20
_MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Bytes that a server takes now; None for what cannot be read.

    Attributes:
        host_bytes: resident, added up over its processes; pages that several share count in each.
        gpu_bytes: of its processes, or of whole devices where those are not told apart.
    """

    host_bytes: int | None
    gpu_bytes: int | None


class MemoryReader:
    """Reads the memory of the server that listens on a URL's port, if it runs on this machine.

    Attributes:
        gpu_of: `processes`, or `devices` where nvidia-smi does not name the server's processes,
            as in a container; None without GPU memory.
    """

    def __init__(self, url: str) -> None:
        self._server = _listener(url)
        self.gpu_of: str | None = None
        if self._server is not None and shutil.which("nvidia-smi"):
            for name in ("processes", "devices"):
                self.gpu_of = name
                if self._gpu_bytes():
                    return
            self.gpu_of = None

    @property
    def is_local(self) -> bool:
        """Whether the server's processes were found."""
        return self._server is not None

    def read(self) -> Memory:
        """Memory now; takes a moment."""
        return Memory(self._host_bytes(), self._gpu_bytes())

    def _processes(self) -> list[psutil.Process]:
        if self._server is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self._server, *self._server.children(recursive=True)]
        return []

    def _host_bytes(self) -> int | None:
        total = 0
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_info().rss
        return total or None

    def _gpu_bytes(self) -> int | None:
        if self.gpu_of == "devices":
            rows = _nvidia_smi("--query-gpu=memory.used")
            return sum(row[0] for row in rows) * _MIB or None
        if self.gpu_of == "processes":
            pids = {process.pid for process in self._processes()}
            rows = _nvidia_smi("--query-compute-apps=pid,used_memory")
            return sum(mib for pid, mib in rows if pid in pids) * _MIB or None
        return None


def _nvidia_smi(query: str) -> list[list[int]]:
    """Rows of whole numbers; rows with what is not available are left out."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_NVIDIA_SMI_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = []
    for line in answer.stdout.splitlines() if answer.returncode == 0 else ():
        with contextlib.suppress(ValueError):
            rows.append([int(field) for field in line.split(",")])
    return rows


def _listener(url: str) -> psutil.Process | None:
    """The topmost process that listens on the URL's port; None for another machine's."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not _is_this_machine(parts.hostname or ""):
        return None
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.AccessDenied, OSError):
        return None
    pids = {
        connection.pid
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr.port == port
        and connection.pid is not None
    }
    for pid in sorted(pids):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if not pids & {parent.pid for parent in process.parents()}:
                return process
    return None


def _is_this_machine(host: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        address = socket.gethostbyname(host)
        if ipaddress.ip_address(address).is_loopback:
            return True
        own = (item for items in psutil.net_if_addrs().values() for item in items)
        return any(item.address == address for item in own)
    return False
