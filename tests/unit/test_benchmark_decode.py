"""The decode benchmark's command: runs against servers that stream scripted tokens."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import CHILD, ends, is_alive
from streaming_server import StreamingServer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from twilight_sgl.benchmark import __main__ as command
from twilight_sgl.benchmark import decode
from twilight_sgl.benchmark.servers import Server
from twilight_sgl.benchmark.streaming import generate


@pytest.mark.nightly  # starts three processes that import SGLang
def test_interrupt_ends_all_processes(tmp_path: Path, model: Path) -> None:
    """The launcher is replaced by a script that never listens; the benchmark waits for it."""
    script = tmp_path / "run.py"
    script.write_text(
        "import functools, sys\n"
        "from twilight_sgl.benchmark import __main__ as command, decode, servers\n"
        f"launcher = (sys.executable, '-c', {CHILD!r})\n"
        "decode.running = functools.partial(servers.running, launcher=launcher)\n"
        "sys.exit(command.main())\n"
    )
    out = tmp_path / "out"
    flags = ["--backends", "torch_native,twilight", "--loads", "2x64", "--output-tokens", "8"]
    flags += ["--text", str(model / "text"), "--side-by-side"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, script, "decode", "--model-path", model, "--out", out, *flags],
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        try:
            logs = [out / "torch_native.log", out / "twilight.log"]
            deadline = time.monotonic() + 120
            while not all(path.exists() and "\n" in path.read_text() for path in logs):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            children = [int(path.read_text().split()[1]) for path in logs]
            assert all(map(is_alive, children))
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
    assert all(map(ends, children))
    assert "interrupted" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_termination_is_an_interrupt(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(decode, "_run", lambda args: signal.raise_signal(number))
    assert benchmark(monkeypatch) == 130
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and configuration of a model with 4096 tokens of context; no weights."""
    folder = tmp_path_factory.mktemp("model")
    words = {str(number): number for number in range(2000)} | {"[UNK]": 2000}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    LlamaConfig(max_position_embeddings=4096).save_pretrained(folder)
    (folder / "text").write_text(" ".join(map(str, range(2000))))
    return folder


def benchmark(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark", "decode", *map(str, argv)])
    return command.main()


def test_a_run(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(decode, "SOON_TOKENS", 0)
    with StreamingServer() as dense, StreamingServer(sparse=True, wrong_from=4) as ours:
        status = benchmark(
            monkeypatch,
            *("--model-path", model, "--text", model / "text", "--out", tmp_path),
            *("--urls", f"dense={dense.url}", f"twilight={ours.url}"),
            *("--loads", "1x200,3x100", "--output-tokens", "16", "--shared-prefix", "32"),
            *("--commit", "abc", "--first-tokens", "1"),
        )
    assert status == 0
    table = capsys.readouterr().out
    rows = json.loads((tmp_path / "decode.json").read_text())
    assert [(row["load"], row["backend"]) for row in rows] == [
        (load, name) for load in ("1x200", "3x100") for name in ("dense", "twilight")
    ]
    for row in rows:
        assert row["commit"] == "abc"
        assert row["complete"]
        assert row["model"] == model.name
        assert row["command"].startswith("python -m twilight_sgl.benchmark decode --model-path")
        assert row["kv_tokens"] == 100_000
        assert row["tokens_per_s"] > 0
        samples = [row[f"ttft_{name}_ms"]["samples"] for name in ("cold", "prefix", "cached")]
        assert samples == [row["requests"] * rounds for rounds in (1, 1, 10)]
        assert row["sglang"] and row["torch"]
        differs = row["backend"] == "twilight"
        assert row["agreement"] == {
            "equal_share": 4 / 16 if differs else 1.0,
            "exact_share": 0.0 if differs else 1.0,
        }
        shares = (
            (row["budget"] or {}).get("candidate_share"),
            (row["budget"] or {}).get("kept_share"),
        )
        assert shares == ((pytest.approx(0.25), pytest.approx(0.1)) if differs else (None, None))
    assert (tmp_path / "decode.md").read_text() in table
    for server in (dense, ours):
        assert server.flushes == 2 * 2  # before the cold and the prefix pass of each load
        sizes = [len(body["input_ids"]) for body in server.requests]
        assert sizes == [200, 200, 32, 200, *[200] * 10, *[100] * 3, 32, *[100] * 33]
        limits = [body["sampling_params"]["max_new_tokens"] for body in server.requests]
        once = [8, 16, 1, 1, *[64] * 3, *[1] * 7]
        assert limits == [*once, *[16] * 3, 1, *[1] * 3, *[64] * 9, *[1] * 21]
    assert [body["input_ids"] for body in dense.requests[:5]] == [
        body["input_ids"] for body in ours.requests[:5]
    ]


def test_few_requests_are_asked_again_for_their_first_token(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "SOON_TOKENS", 250)
    with StreamingServer() as dense:
        status = benchmark(
            monkeypatch,
            *("--model-path", model, "--text", model / "text", "--out", tmp_path),
            *("--urls", f"dense={dense.url}", "--loads", "1x200,3x100"),
            *("--output-tokens", "16", "--shared-prefix", "32", "--first-tokens", "4"),
        )
    assert status == 0
    one, three = json.loads((tmp_path / "decode.json").read_text())
    for name in ("ttft_cold_ms", "ttft_prefix_ms"):
        assert (one[name]["samples"], three[name]["samples"]) == (8, 6)
    assert (one["ttft_cached_ms"]["samples"], three["ttft_cached_ms"]["samples"]) == (10, 30)
    assert dense.flushes == 2 * 8 + 2 * 2  # cold and prefix passes; the cached ones keep the cache
    assert one["steady_tokens"] > 0


@pytest.mark.parametrize("at_once", [True, False], ids=["side by side", "one after another"])
def test_every_other_start_and_pass_turns_the_order_round(
    at_once: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    folders: list[Path] = []
    timed: list[str] = []
    with StreamingServer() as dense, StreamingServer(sparse=True) as ours:
        urls = {"torch_native": dense.url, "twilight": ours.url}

        @contextlib.contextmanager
        def start(
            flags: dict[str, tuple[str, ...]], logs: Path, **_: object
        ) -> Iterator[list[Server]]:
            started.append(list(flags))
            folders.append(logs)
            yield [Server(name, urls[name]) for name in flags]

        def noted(session: Any, url: str, *args: Any, **options: Any) -> Any:
            if "phase_tokens" in options:
                timed.append("ours" if url == ours.url else "dense")
            return generate(session, url, *args, **options)

        monkeypatch.setattr(decode, "running", start)
        monkeypatch.setattr(decode, "generate", noted)
        status = benchmark(
            monkeypatch,
            *("--model-path", model, "--text", model / "text", "--out", tmp_path),
            *("--backends", "torch_native,twilight", "--loads", "1x100", "--output-tokens", "16"),
            *("--side-by-side" if at_once else "--no-side-by-side", "--starts", "2"),
            *("--passes", "2"),
        )
    assert status == 0
    order = ["torch_native", "twilight", "twilight", "torch_native"]
    assert [name for names in started for name in names] == order
    assert len(started) == (2 if at_once else 4)
    starts = [tmp_path / "start-1", tmp_path / "start-2"]
    assert folders == (starts if at_once else [folder for folder in starts for _ in range(2)])
    assert all(folder.is_dir() for folder in starts)
    there = ["dense", "ours", "ours", "dense"] if at_once else ["dense", "dense", "ours", "ours"]
    back = ["ours", "dense", "dense", "ours"] if at_once else ["ours", "ours", "dense", "dense"]
    assert timed == there + back
    rows = json.loads((tmp_path / "decode.json").read_text())
    assert [row["backend"] for row in rows] == ["torch_native", "twilight"]
    assert [len(row["tokens_per_s_by_pass"]) for row in rows] == [4, 4]
    assert [len(row["throughput_ratio_by_start"]) for row in rows] == [2, 2]


@pytest.mark.parametrize("during", ["cold", "first tokens"])
def test_a_run_cut_short_leaves_what_it_measured(
    during: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the first load all is there; of the second nothing yet, or all but more first tokens."""
    was_timed: list[bool] = []

    def interrupting(session: Any, url: str, prompts: list, **options: Any) -> Any:
        if len(prompts) == 3:
            if during == "cold" or (was_timed and "phase_tokens" not in options):
                signal.raise_signal(signal.SIGINT)
            was_timed.extend([True] if "phase_tokens" in options else [])
        return generate(session, url, prompts, **options)

    monkeypatch.setattr(decode, "generate", interrupting)
    earlier = [tmp_path / "decode.png", tmp_path / "dense.log", tmp_path / "start-3/dense.log"]
    earlier[2].parent.mkdir()
    for path in earlier:
        path.write_text("of an earlier run")
    with StreamingServer() as dense, StreamingServer(sparse=True) as ours:
        status = benchmark(
            monkeypatch,
            *("--model-path", model, "--text", model / "text", "--out", tmp_path),
            *("--urls", f"dense={dense.url}", f"twilight={ours.url}"),
            *("--loads", "1x200,3x100", "--output-tokens", "16", "--first-tokens", "1"),
        )
    assert status == 130
    assert f"until then is in {tmp_path / 'decode.json'}" in capsys.readouterr().err
    rows = json.loads((tmp_path / "decode.json").read_text())
    loads = ["1x200", "1x200", *(["3x100", "3x100"] if during == "first tokens" else [])]
    assert [row["load"] for row in rows] == loads
    assert [row["ttft_cached_ms"]["samples"] for row in rows] == [10, 10, 9, 9][: len(rows)]
    assert not any(row["complete"] for row in rows)
    assert "cut short" in (tmp_path / "decode.md").read_text()
    assert not any(path.exists() for path in earlier)


@pytest.mark.parametrize(
    ("flags", "known", "complaint"),
    [
        (["--loads", "1x4k"], {}, "--loads 1x4k: 4096 + 16 tokens do not fit"),
        (["--loads", "1x100"], {"context_length": 110}, "context of 110"),
        (["--loads", "2x1k"], {"max_total_num_tokens": 999}, "has 999"),
        (
            ["--loads", "3x100"],
            {"internal_states": [{"effective_max_running_requests_per_dp": 2}]},
            "--max-running-requests",
        ),
        (["--loads", "1x1999"], {}, None),
        (["--loads", "3x1999"], {}, "--text has 2000 tokens"),
        (["--loads", "1x100", "--text", "nowhere"], {}, "--text nowhere cannot be read"),
        (["--loads", "1x100", "--model-path", "/not/there"], {}, "--model-path /not/there"),
        (["--loads", "1x100", "--urls", "dense=http://127.0.0.1:9"], {}, "does not answer"),
        (["--loads", "1x100", "--starts", "0"], {}, "--starts 0: start the servers at least once"),
        (["--loads", "1x100", "--starts", "2"], {}, "those of --urls run already"),
        (["--loads", "1x100", "--passes", "0"], {}, "--passes 0: time the servers at least once"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if value else "nothing",
)
def test_what_cannot_run_is_refused_with_the_flag(
    flags: list[str],
    known: dict[str, Any],
    complaint: str | None,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with StreamingServer(info=known) as server:
        status = benchmark(
            monkeypatch,
            *("--model-path", model, "--text", model / "text", "--out", tmp_path / "out"),
            *("--urls", f"dense={server.url}", "--output-tokens", "16", *flags),
        )
    assert status == (2 if complaint else 0)
    if complaint:
        assert complaint in capsys.readouterr().err
        assert not server.requests


@pytest.mark.parametrize(
    ("failing", "complaint"),
    [
        (StreamingServer(refusal="the scheduler died"), "the scheduler died"),
        (StreamingServer(drops=True), "'dense' at http://127.0.0.1"),
    ],
    ids=["refuses", "drops"],
)
def test_server_that_fails_is_exit_status_1(
    failing: StreamingServer,
    complaint: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with failing as server:
        status = benchmark(
            monkeypatch,
            *("--model-path", model, "--text", model / "text", "--out", tmp_path),
            *("--urls", f"dense={server.url}", "--loads", "1x100"),
        )
    assert status == 1
    assert complaint in capsys.readouterr().err
