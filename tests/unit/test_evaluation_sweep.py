"""Methods side by side: which servers are started, what each is asked, and the report of all."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from evaluation_server import EvaluationServer, solve

from twilight_sgl.benchmark.servers import Server
from twilight_sgl.errors import TwilightError
from twilight_sgl.evaluation import sweep
from twilight_sgl.evaluation.__main__ import main
from twilight_sgl.evaluation.records import read_run
from twilight_sgl.evaluation.sweep import Method, parse_methods

pytest_plugins = "evaluation_client"

TWILIGHT = {"p": 0.95, "selector": "quest", "selector_budget": 0.25, "pruner": "top_p"}
METHODS = "torch_native,quest:600,twilight:0.5,twilight:0.9"


class Started:
    """Stands in for servers that start; keeps their flags, in groups that run at a time."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.groups: list[dict[str, tuple[str, ...]]] = []
        self.requests: dict[str, list[dict[str, Any]]] = {}
        self.refuses_after: int | None = None

    @contextlib.contextmanager
    def running(
        self, flags: dict[str, tuple[str, ...]], logs: Path, **_: Any
    ) -> Iterator[list[Server]]:
        self.groups.append(flags)
        with contextlib.ExitStack() as stack:
            servers = []
            for name in flags:
                ours = name.startswith(("quest", "twilight"))
                served = EvaluationServer(
                    self.model,
                    twilight=TWILIGHT if ours else None,
                    answer=solve if ours else lambda prompt: " unknown.",
                    refuses_after=self.refuses_after if name == "torch_native" else None,
                )
                self.requests[name] = served.requests
                servers.append(Server(name, stack.enter_context(served).url))
            yield servers


@pytest.fixture
def started(model: str, monkeypatch: pytest.MonkeyPatch) -> Started:
    config = {"model_type": "llama", "num_hidden_layers": 1, "max_position_embeddings": 8192}
    (Path(model) / "config.json").write_text(json.dumps(config))
    made = Started(model)
    monkeypatch.setattr(sweep, "running", made.running)
    return made


def swept(started: Started, out: Path, *flags: str) -> int:
    given = ["passkey", "--context", "400", "--samples", "2", "--model-path", started.model]
    return main(["sweep", *given, "--methods", METHODS, "--out", str(out), *flags])


@pytest.mark.parametrize("at_once", [True, False])
def test_every_method_gets_the_same_prompts(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    monkeypatch.setattr(sweep, "fit_at_once", lambda *_: at_once)
    assert swept(started, tmp_path) == 0
    names = ["torch_native", "quest-600", "twilight"]
    assert [list(group) for group in started.groups] == (
        [names] if at_once else [[n] for n in names]
    )
    assert {name: len(requests) for name, requests in started.requests.items()} == {
        "torch_native": 2,
        "quest-600": 2,
        "twilight": 4,
    }
    prompts = {r["text"] for requests in started.requests.values() for r in requests}
    assert len(prompts) == 2
    asked = [
        request["sampling_params"].get("custom_params") for request in started.requests["twilight"]
    ]
    assert asked == [{"twilight": {"p": p}} for p in (0.5, 0.5, 0.9, 0.9)]
    runs = {name: read_run(tmp_path / f"{name}.jsonl") for name in (*names[:2], "twilight-0.9")}
    assert [run.settings["dense"] for run in runs.values()] == [True, False, False]
    table = (tmp_path / "accuracy.md").read_text()
    assert f"| context | task | samples | {' | '.join(METHODS.split(','))} |" in table
    assert "| 400 | passkey | 2 | 0.0 " in table


def test_servers_differ_in_what_decodes(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "fit_at_once", lambda *_: True)
    assert swept(started, tmp_path, "--server-args", "--dtype half") == 0
    flags = started.groups[0]

    def value(name: str, flag: str) -> str:
        given: Sequence[str] = flags[name]
        return given[given.index(flag) + 1]

    assert value("torch_native", "--decode-attention-backend") == "torch_native"
    for name, pruner in (("quest-600", "none"), ("twilight", "top_p")):
        assert value(name, "--decode-attention-backend") == "twilight"
        assert value(name, "--attention-backend") == "torch_native"  # prefill as the dense one
        assert value(name, "--twilight-pruner") == pruner
        assert value(name, "--twilight-min-step-mb") == "0"
        assert value(name, "--twilight-min-context-tokens") == "0"
    assert value("quest-600", "--twilight-selector-budget") == "600"
    assert "--twilight-selector-budget" not in flags["twilight"]
    assert all(each[-2:] == ("--dtype", "half") for each in flags.values())
    written = json.loads((tmp_path / "servers.json").read_text())
    assert written["server_flags"] == {name: list(each) for name, each in flags.items()}


def test_a_sweep_that_was_stopped_is_gone_on_with(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sweep, "fit_at_once", lambda *_: True)
    started.refuses_after = 1
    assert swept(started, tmp_path, "--concurrency", "1") == 1
    assert "torch_native was not evaluated (" in capsys.readouterr().err
    started.refuses_after = None
    assert swept(started, tmp_path, "--concurrency", "1") == 0
    assert len(started.requests["torch_native"]) == 1  # the other sample is of the first run


def test_a_server_of_several_methods_holds_a_task(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--samples", "40", "--concurrency", "2"]

    def pools(room: int) -> dict[str, int]:
        monkeypatch.setattr(sweep, "fit_at_once", lambda each, *_: sum(t for _, t in each) <= room)
        started.refuses_after = 0
        swept(started, tmp_path, *given)
        return {
            name: int(flags[flags.index("--max-total-tokens") + 1])
            for group in started.groups
            for name, flags in group.items()
        }

    one = sweep.pool_tokens([sweep.Load("", 2, 400)], 0)
    whole = sweep.pool_tokens([sweep.Load("", 40, 400)], 0)
    assert pools(2 * one + whole) == {"torch_native": one, "quest-600": one, "twilight": whole}
    assert len(started.groups) == 1
    assert set(pools(3 * one).values()) == {one}


def test_methods() -> None:
    assert parse_methods("fa3, quest:0.25,twilight:1") == [
        Method("fa3", "fa3", None),
        Method("quest:0.25", "quest", 0.25),
        Method("twilight:1", "twilight", 1.0),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "name each once"),
        ("fa3,fa3", "name each once"),
        ("twilight", "pass twilight:P"),
        ("fa3:2", "the bare name of a backend"),
        ("twilight:1.5", "'1.5' is no p: pass a number above 0, at most 1"),
        ("quest:many", "'many' is no B0"),
        ("quest:0", "'0' is no B0: pass a number above 0"),
    ],
)
def test_bad_methods(given: str, message: str) -> None:
    with pytest.raises(TwilightError, match=f"--methods .*{message}"):
        parse_methods(given)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "0"], "--samples 0"),
        (["--context", "16k"], "--context 16384 exceeds the 8192 tokens"),
        (["--text", "gone"], "--text gone is for the task perplexity"),
    ],
)
def test_bad_input_starts_no_server(
    started: Started, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    assert swept(started, tmp_path / "out", *flags) == 1
    assert message in capsys.readouterr().err
    assert started.groups == []
