"""Several schedulers, and several HTTP workers; each server takes minutes on a small machine."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from client import START_SECONDS, Server, prose, running
from test_served_telemetry import expected, wait_for

from twilight_sgl.benchmark.servers import free_port

pytestmark = [pytest.mark.server, pytest.mark.nightly]

USUAL = [
    *("--twilight-audit-interval", "4", "--twilight-min-context-tokens", "512"),
    *("--max-total-tokens", "8192", "--enable-metrics"),
]
PROMPTS = [prose(2600, start=90000 * n) for n in range(4)]
TOKENS = 8


# On a CPU SGLang wants to know the cores of each rank, and takes NCCL for usable where it is there.
RANKS = 3
CORES = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(RANKS))
TENSOR_PARALLEL = {"SGLANG_CPU_OMP_THREADS_BIND": CORES, "SGLANG_NCCL_SO_PATH": "none"}


@contextlib.contextmanager
def served(tmp_path: Path, *flags: str, **variables: str) -> Iterator[Server]:
    with running([*USUAL, *flags], tmp_path / "server.log", **variables) as server:
        yield server.wait(2 * START_SECONDS)


@contextlib.contextmanager
def reading(first_port: int, schedulers: int) -> Iterator[zmq.Socket]:
    """A socket that gets the records of all schedulers."""
    context = zmq.Context()
    reader = context.socket(zmq.SUB)
    reader.subscribe(b"twilight.step")
    for index in range(schedulers):
        reader.connect(f"tcp://127.0.0.1:{first_port + index}")
    try:
        yield reader
    finally:
        context.destroy(linger=0)


def ranks_heard(reader: zmq.Socket, name: str) -> set[int]:
    heard = set()
    while reader.poll(3000):
        _, payload = reader.recv_multipart()
        heard.add(msgspec.msgpack.decode(payload)[name])
    return heard


def test_data_parallel_replicas_are_told_apart(tmp_path: Path) -> None:
    port = free_port()
    flags = ["--dp-size", "2", "--twilight-events", f"tcp://127.0.0.1:{port}"]
    with served(tmp_path, *flags) as server, reading(port, 2) as reader:
        server.generate_all(PROMPTS, TOKENS)
        states = server.twilights()
        assert all(state["steps"]["sparse_rows"] > 0 for state in states)
        assert all(state["audit"]["violations"] == 0 for state in states)
        totals = [expected(state) for state in states]
        shown = [wait_for(server, totals, dp_rank=str(rank)) for rank in range(2)]
        assert shown[0] != shown[1] or totals[0] == totals[1]
        assert ranks_heard(reader, "dp_rank") == {0, 1}


def test_tensor_parallel_ranks_select_for_their_own_heads(server: Server, tmp_path: Path) -> None:
    """The embedded model has three KV heads; greedy tokens are those of one rank."""
    port = free_port()
    flags = ["--tp-size", str(RANKS), "--twilight-events", f"tcp://127.0.0.1:{port}"]
    with (
        served(tmp_path, *flags, **TENSOR_PARALLEL) as parallel,
        reading(port, RANKS) as reader,
    ):
        for options in ({"enabled": False}, {"p": 1.0}, {"p": 0.8}):
            for prompt in PROMPTS[:2]:
                alone = server.generate(prompt, TOKENS, options)
                together = parallel.generate(prompt, TOKENS, options)
                assert together["text"] == alone["text"], options
        told = parallel.twilight()
        assert told["steps"]["sparse_rows"] > 0
        assert told["audit"]["violations"] == 0
        assert len(told["heads"]["kept_fraction"][0]) == 1  # of rank 0
        wait_for(parallel, [expected(told)], tp_rank="0")
        shown = [parallel.metrics(tp_rank=str(rank)) for rank in range(RANKS)]
        for name in ("sparse_rows", "pages_built", "pages_reused", "context_tokens"):
            assert len({rank[f"twilight_{name}_total"] for rank in shown}) == 1, name
        assert len({rank["twilight_kept_tokens_total"] for rank in shown}) == RANKS
        assert all(rank["twilight_audit_violations_total"] == 0 for rank in shown)
        assert ranks_heard(reader, "tp_rank") == set(range(RANKS))


def test_http_workers_refuse_bad_options_and_send_no_lists(tmp_path: Path) -> None:
    with served(tmp_path, "--tokenizer-worker-num", "2") as server:
        for _ in range(4):  # whichever worker answers
            body = {"text": "a", "sampling_params": {"custom_params": {"twilight": {"p": 2}}}}
            status, message = server.refused("/generate", body)
            assert status == 400
            assert "custom_params.twilight.p" in message
            answer = server.generate(PROMPTS[0], 3, {"p": 0.9})
            assert "twilight" not in answer["meta_info"]
        assert server.twilight()["steps"]["sparse_rows"] > 0
