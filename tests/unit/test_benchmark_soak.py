"""The soak: its figures, and runs against a server that breaks when told to."""

import json
import os
import re
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from aiohttp import web
from soaked_server import POOL_TOKENS, SoakedServer

from twilight_sgl.benchmark import __main__ as command
from twilight_sgl.benchmark import soak as benchmark_soak
from twilight_sgl.benchmark import soak_memory
from twilight_sgl.benchmark.soak_figures import Record, Sample, format_table, plot
from twilight_sgl.benchmark.soak_load import ROUND
from twilight_sgl.benchmark.soak_memory import Memory, MemoryReader

MIB = 1 << 20


def soak(monkeypatch: pytest.MonkeyPatch, url: str, *flags: object, minutes: float = 0.02) -> int:
    argv = ["benchmark", "soak", "--url", url, "--minutes", minutes, "--sample-seconds", 0.1]
    monkeypatch.setattr(sys, "argv", list(map(str, [*argv, *flags])))
    return command.main()


# Figures


def sample(seconds: float, mib: int | None = 100, **others: Any) -> Sample:
    counts = dict.fromkeys(
        ("checks", "violations", "capacity", "sealed", "built", "reused", "decode_steps"), 0
    )
    host = None if mib is None else mib * MIB
    values: dict[str, Any] = {"sparse_rows": 0, "host_bytes": host, "gpu_bytes": None, **counts}
    return Sample(seconds, **(values | others))


def test_growth_is_from_one_fifth_of_the_run_on() -> None:
    record = Record(100)
    record.samples = [sample(0, 100), sample(19, 500), sample(21, 510), sample(60, 900)]
    record.samples.append(sample(110, 530))
    assert record.growth("host_bytes") == (510 * MIB, 530 * MIB)
    assert record.growth("gpu_bytes") is None
    assert list(record.problems(20 * MIB)) == []
    (problem,) = record.problems(19 * MIB)
    assert problem.startswith("host memory grew by 20 MB from one fifth of the run on")
    record.samples = [replace(each, host_bytes=None, gpu_bytes=3) for each in record.samples]
    record.samples.append(sample(111, None, gpu_bytes=3 + 20 * MIB))
    (problem,) = record.problems(19 * MIB)
    assert problem.startswith("GPU memory grew by 20 MB")


def test_problems_that_only_a_finished_soak_has() -> None:
    record = Record(100, samples=[sample(0), sample(110)])
    assert not list(record.problems(MIB))
    record.finished = True
    (problem,) = record.problems(MIB)
    assert "no page was sealed" in problem
    record.samples.append(sample(111, built=3))
    assert not list(record.problems(MIB))


def test_many_failures_are_counted_and_few_shown() -> None:
    record = Record(1, samples=[sample(0)], failures=[f"request {n}" for n in range(9)])
    (problem,) = record.problems(MIB)
    assert problem.startswith("9 requests failed:\n  request 0")
    assert problem.endswith("request 4\n  ... and 4 more")


def test_table() -> None:
    record = Record(100)
    record.samples = [
        sample(0, built=5, sealed=5, reused=1, capacity=9),
        sample(100, 130, built=25, sealed=7, reused=4, capacity=9, checks=6),
    ]
    tally = record.tally("cold")
    tally.outcomes.update({"completed": 2, "failed": 1})
    tally.prompt_tokens, tally.retractions, tally.latencies_s = 1234, 3, [1.0, 1.0]
    head, rule, cold, *facts = format_table(record).splitlines()
    assert head.count("|") == rule.count("|") == cold.count("|")
    assert cold.startswith("| cold | 2 |  |  |  | 1 | 1,234 | 0 | 0 | 3 | 1.00 | 1.00 |")
    assert "audit: 6 audits, 0 violations" in facts
    assert "pages: 20 built, 3 reused, 18 unsealed; the pool has 9" in facts
    assert "gpu memory: not known" in "\n".join(facts).lower()


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = Record(100, samples=[sample(0), sample(50, None), sample(100)])
    plot(record, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


# Memory


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, pid: int) -> None:
    script = folder / "nvidia-smi"
    script.write_text(
        f"#!/bin/sh\ncase $1 in *compute-apps*) echo '{pid}, 700'; echo '1, [N/A]';; "
        "*) echo 3000; echo 4000;; esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_memory_is_that_of_the_listening_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(soak_memory.shutil, "which", lambda name: None)
        plain = MemoryReader(url)
        monkeypatch.undo()
        assert plain.is_local
        assert plain.gpu_of is None
        assert (plain.read().host_bytes or 0) > 20 * MIB
        fake_nvidia_smi(tmp_path, monkeypatch, os.getpid())
        reader = MemoryReader(url)
        assert (reader.gpu_of, reader.read().gpu_bytes) == ("processes", 700 * MIB)
        fake_nvidia_smi(tmp_path, monkeypatch, 1 << 22)
        reader = MemoryReader(url)
        assert (reader.gpu_of, reader.read().gpu_bytes) == ("devices", 7000 * MIB)
    assert not MemoryReader(url).is_local


def test_memory_of_another_machine_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, os.getpid())
    reader = MemoryReader("http://192.0.2.1:80")
    assert not reader.is_local
    assert reader.read() == Memory(None, None)


# Runs


def test_a_clean_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with SoakedServer() as server:
        status = soak(monkeypatch, server.url, "--json", tmp_path / "soak.json", minutes=0.05)
    out, err = capsys.readouterr()
    assert status == 0, err
    saved = json.loads((tmp_path / "soak.json").read_text())
    assert saved["finished"]
    assert saved["problems"] == saved["failures"] == []
    assert (saved["model"], saved["kv_tokens"]) == ("m", POOL_TOKENS)
    outcomes = {kind: requests["outcomes"] for kind, requests in saved["requests"].items()}
    assert set(outcomes) == {*ROUND, "last"}
    for kind in set(ROUND) - {"hang up", "abort", "flush"}:
        assert outcomes[kind]["completed"] >= ROUND[kind]
    assert outcomes["hang up"]["hung up"]
    assert outcomes["abort"]["aborted"]
    assert outcomes["flush"]["completed"] == server.flushes >= 1
    assert server.hung_up
    assert len(server.aborted) >= outcomes["abort"]["aborted"]
    assert len(saved["samples"]) > 5
    times = [each["seconds"] for each in saved["samples"]]
    assert times == sorted(times)
    assert saved["requests"]["last"]["latency_ms"]["samples"] == outcomes["last"]["completed"]
    assert saved["requests"]["cold"]["prompt_tokens"] == 1024 * outcomes["cold"]["completed"]
    assert "| conversation |" in out
    audits = saved["samples"][-1]["checks"] - saved["samples"][0]["checks"]
    assert f"audit: {audits:,} audits, 0 violations" in out  # as many as the machine is fast


def test_grammar_is_left_out_where_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with SoakedServer(grammar=False) as server:
        assert soak(monkeypatch, server.url) == 0
    assert "no constrained requests, which the server refuses" in capsys.readouterr().out
    constrained = [b for b in server.requests if "regex" in b["sampling_params"]]
    assert len(constrained) == 1


def no_audit(server: SoakedServer) -> None:
    server.audits = False


@pytest.mark.parametrize(
    ("server", "complaint"),
    [
        (SoakedServer(events={9: SoakedServer.violate}), "1 violations of the seal invariant"),
        (
            SoakedServer(events={9: SoakedServer.break_, 11: SoakedServer.recover}),
            "2 requests failed:",
        ),
        (SoakedServer(events={9: SoakedServer.die}), "ended ("),
        (SoakedServer(dies_at_flush=True), "ended ("),
        (SoakedServer(restarts=True), "was restarted"),
        (SoakedServer(events={1: no_audit}), "the last batch was not audited"),
        (SoakedServer(sealing=False), "no page was sealed"),
    ],
    ids=[
        "violation",
        "error 500",
        "dead",
        "dead at a flush",
        "restarted",
        "no audit",
        "nothing sealed",
    ],
)
def test_what_makes_a_soak_fail(
    server: SoakedServer,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with server:
        status = soak(monkeypatch, server.url)
    out, err = capsys.readouterr()
    assert status == 1
    assert complaint in err
    assert "| requests |" in out
    if complaint.startswith("2 "):
        assert "answered 500: the scheduler is confused" in err


def test_a_server_that_constrained_requests_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with SoakedServer(events={1: SoakedServer.die}) as server:
        assert soak(monkeypatch, server.url) == 1
    out, err = capsys.readouterr()
    assert "ended a constrained request" in err
    assert "--grammar-backend none" in err
    assert not out


def test_growing_memory_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reads = iter(range(10**6))
    monkeypatch.setattr(MemoryReader, "read", lambda self: Memory(next(reads) * 10 * MIB, None))
    with SoakedServer() as server:
        assert soak(monkeypatch, server.url, "--max-growth-mb", 19) == 1
    assert "host memory grew by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("server", "flags", "complaint"),
    [
        (SoakedServer(audit_interval=0), [], "has no audit.*--twilight-audit-interval 16"),
        (SoakedServer(), ["--prompt-tokens", "4k"], "--prompt-tokens 4096 .*do not fit"),
        (SoakedServer(), ["--json", "none/soak.json"], "--json none/soak.json cannot be written"),
    ],
    ids=["no audit", "long prompts", "no folder"],
)
def test_what_cannot_run_is_refused_with_the_flag(
    server: SoakedServer,
    flags: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with server:
        assert soak(monkeypatch, server.url, *flags) == 2
    assert re.search(complaint, capsys.readouterr().err)
    assert not server.requests


class SilentTokenizer(SoakedServer):
    """Fails to tokenize, as SGLang does for a tokenizer without a longest input."""

    def __init__(self, tokenizer: Path) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    async def _tokenize(self, request: Any) -> Any:
        return web.Response(status=500, text="Internal Server Error")

    async def _model_info(self, request: Any) -> Any:
        return web.json_response({"model_path": "m", "tokenizer_path": str(self.tokenizer)})


def test_a_server_that_cannot_tokenize(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with SilentTokenizer(tmp_path / "none") as server:
        assert soak(monkeypatch, server.url) == 2
    assert f"the tokenizer {tmp_path / 'none'} is not on this machine" in capsys.readouterr().err
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(
        tmp_path / "words"
    )
    with SilentTokenizer(tmp_path / "words") as server:
        assert soak(monkeypatch, server.url, minutes=0.02) == 0, capsys.readouterr().err


def test_servers_without_twilight_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dense(SoakedServer):
        async def _info(self, request: Any) -> Any:
            self.info = {"max_total_num_tokens": POOL_TOKENS, "internal_states": [{}]}
            return await super(SoakedServer, self)._info(request)

    with Dense() as server:
        assert soak(monkeypatch, server.url) == 2
    assert "does not decode with Twilight" in capsys.readouterr().err
    assert soak(monkeypatch, "http://127.0.0.1:9") == 2
    assert "--url" in capsys.readouterr().err


def test_what_was_seen_is_written_while_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A soak that is killed, or whose machine is, leaves what it saw until then."""
    path = tmp_path / "soak.json"
    written: list[dict[str, Any]] = []

    def read(_: SoakedServer) -> None:
        if not written or not written[-1]["samples"]:
            written.append(json.loads(path.read_text()))
            if written[-1]["samples"]:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(benchmark_soak, "_SAVE_SECONDS", 0.0)
    with SoakedServer(events=dict.fromkeys(range(1, 100_000), read)) as server:
        assert soak(monkeypatch, server.url, "--json", path, minutes=10) == 130
    assert list(tmp_path.iterdir()) == [path]
    before, meanwhile = written[0], written[-1]
    assert before["samples"] == []
    assert (before["model"], before["kv_tokens"]) == ("m", POOL_TOKENS)
    assert not before["finished"] and not meanwhile["finished"]
    at_end = json.loads(path.read_text())
    assert at_end["samples"][: len(meanwhile["samples"])] == meanwhile["samples"]


def test_a_file_that_can_no_longer_be_written_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    path = folder / "soak.json"
    with SoakedServer(events={9: lambda _: folder.rename(tmp_path / "gone")}) as server:
        assert soak(monkeypatch, server.url, "--json", path) == 1
    out, err = capsys.readouterr()
    assert "| requests |" in out
    assert f"--json {path} is as it last was" in err


def test_interrupt_prints_the_table_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with SoakedServer(events={30: lambda _: os.kill(os.getpid(), signal.SIGINT)}) as server:
        status = soak(monkeypatch, server.url, "--json", tmp_path / "soak.json", minutes=10)
    out, err = capsys.readouterr()
    assert status == 130
    assert "interrupted" in err
    assert "| requests |" in out
    saved = json.loads((tmp_path / "soak.json").read_text())
    assert not saved["finished"]
    assert sum(sum(kind["outcomes"].values()) for kind in saved["requests"].values()) > 5
