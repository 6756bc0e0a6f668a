"""Evaluation of a server: what is sent, recorded, gone on with and refused."""

import json
from pathlib import Path

import pytest
from evaluation_client import Evaluate
from evaluation_server import PAIRS, EvaluationServer, solve
from snapshots import HEADS_KV, LAYER_IDS

from twilight_sgl.evaluation import tasks
from twilight_sgl.evaluation.__main__ import main
from twilight_sgl.evaluation.records import read_run

pytest_plugins = "evaluation_client"

TWILIGHT = {"p": 0.95, "selector": "quest", "selector_budget": 0.25, "pruner": "top_p"}


def test_every_sample_is_sent_once_scored_and_recorded(
    model: str, evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with EvaluationServer(model) as server:
        status = evaluate(
            server, "passkey", "niah_single_1", "--context", "400,600", "--samples", "3"
        )
    assert status == 0
    assert len(set(server.prompts)) == len(server.prompts) == 12
    run = read_run(tmp_path / "out.json")
    assert run.settings["method"] == "fa3"
    assert run.settings["dense"] is True
    assert run.budgets == []
    assert sorted(run.samples) == sorted(
        (task, context, 0, index)
        for task in ("passkey", "niah_single_1")
        for context in (400, 600)
        for index in range(3)
    )
    sample = run.samples["niah_single_1", 600, 0, 2]
    assert sample["score"] == 1.0
    assert sample["output"] == f" {sample['references'][0]}."
    assert 600 - 128 - 20 < sample["prompt_tokens"] <= 600 - 128
    assert sample["served_prompt_tokens"] == 7
    assert sample["latency_s"] > 0
    assert {body["sampling_params"]["max_new_tokens"] for body in server.requests} == {32, 128}
    assert {body["sampling_params"]["temperature"] for body in server.requests} == {0}
    assert all("custom_params" not in body["sampling_params"] for body in server.requests)
    assert "passkey              400  100.0% of 3" in capsys.readouterr().out


def test_wrong_answers_score_nothing(model: str, evaluate: Evaluate, tmp_path: Path) -> None:
    with EvaluationServer(model, answer=lambda _: " I do not know.") as server:
        assert evaluate(server, "passkey", "--samples", "2") == 0
    assert [s["score"] for s in read_run(tmp_path / "out.json").samples.values()] == [0.0, 0.0]


def test_requests_run_at_a_time_as_many_as_asked_for(model: str, evaluate: Evaluate) -> None:
    with EvaluationServer(model) as server:
        assert evaluate(server, "passkey", "--samples", "6", "--concurrency", "2") == 0
    assert server.most_at_once <= 2
    assert len(server.requests) == 6


def test_openai_servers_complete_too(model: str, evaluate: Evaluate, tmp_path: Path) -> None:
    with EvaluationServer(model, sglang=False) as server:
        assert evaluate(f"{server.url}/v1", "passkey", "--samples", "2") == 0
    run = read_run(tmp_path / "out.json")
    assert [sample["score"] for sample in run.samples.values()] == [1.0, 1.0]
    assert {body["model"] for body in server.requests} == {"served"}
    assert {body["max_tokens"] for body in server.requests} == {32}


@pytest.mark.parametrize(
    ("flags", "options", "method", "dense"),
    [
        ((), None, "twilight p=0.95", False),
        (("--p", "0.8"), {"p": 0.8}, "twilight p=0.8", False),
        (("--twilight", "off"), {"enabled": False}, "dense", True),
        (("--method", "mine"), None, "mine", False),
    ],
)
def test_twilight_is_asked_for_and_its_budgets_recorded(
    model: str,
    evaluate: Evaluate,
    tmp_path: Path,
    flags: tuple[str, ...],
    options: dict | None,
    method: str,
    dense: bool,
) -> None:
    with EvaluationServer(model, twilight=TWILIGHT) as server:
        assert evaluate(server, "passkey", "--samples", "3", *flags) == 0
    sent = {json.dumps(body["sampling_params"].get("custom_params")) for body in server.requests}
    assert sent == {json.dumps(None if options is None else {"twilight": options})}
    run = read_run(tmp_path / "out.json")
    assert (run.settings["method"], run.settings["dense"]) == (method, dense)
    (spent,) = run.budgets
    assert (spent["task"], spent["context"], spent["samples"]) == ("passkey", 600, 3)
    budget = spent["budget"]
    assert budget["context_tokens"] == 40 * PAIRS * sum(map(len, server.prompts))
    assert budget["kept_share"] == pytest.approx(0.1, abs=1e-4)
    assert (budget["sparse_rows"], budget["kept_mass"]) == (3, pytest.approx(0.9))
    assert budget["heads"] == {
        "layer_ids": list(LAYER_IDS),
        "kept_fraction": [[0.1] * HEADS_KV] * len(LAYER_IDS),
        "kept_mass": [[0.9] * HEADS_KV] * len(LAYER_IDS),
    }


def test_budgets_are_of_all_replicas(model: str, evaluate: Evaluate, tmp_path: Path) -> None:
    with EvaluationServer(model, twilight=TWILIGHT, replicas=2) as server:
        assert evaluate(server, "passkey", "--samples", "3", "--seed", "1") == 0
        assert evaluate(server, "passkey", "--samples", "3") == 0
    budgets = [spent["budget"] for spent in read_run(tmp_path / "out.json").budgets]
    assert [budget["sparse_rows"] for budget in budgets] == [3, 3]
    total = sum(budget["context_tokens"] for budget in budgets)
    assert total == 40 * PAIRS * sum(map(len, server.prompts))


def test_quest_is_named_by_its_budget(model: str, evaluate: Evaluate, tmp_path: Path) -> None:
    quest = {**TWILIGHT, "pruner": "none", "selector_budget": 1024}
    with EvaluationServer(model, twilight=quest) as server:
        assert evaluate(server, "passkey", "--samples", "1") == 0
    assert read_run(tmp_path / "out.json").settings["method"] == "quest B0=1024"


def test_a_run_without_a_sparse_step_says_so(
    model: str, evaluate: Evaluate, capsys: pytest.CaptureFixture
) -> None:
    with EvaluationServer(model, twilight=TWILIGHT, sparse=False) as server:
        assert evaluate(server, "passkey", "--samples", "1") == 0
    assert "no decode step was sparse" in capsys.readouterr().err


def test_a_run_that_was_cut_short_goes_on(
    model: str, evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "out.json"
    with EvaluationServer(model, refuses_after=3) as server:
        assert evaluate(server, "passkey", "--samples", "5", "--concurrency", "1") == 1
    assert "answered 400: " in capsys.readouterr().err
    assert len(read_run(path).samples) == 3
    with path.open("a") as file:
        file.write('{"task": "passkey", "con')  # as a killed process leaves it
    with EvaluationServer(model) as server:
        assert evaluate(server, "passkey", "--samples", "5") == 0
        assert len(server.requests) == 2
        assert evaluate(server, "passkey", "--samples", "5") == 0
        assert len(server.requests) == 2
        assert evaluate(server, "passkey", "--samples", "1", "--seed", "1") == 0
        assert len(server.requests) == 3
    assert len(read_run(path).samples) == 6
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_of_other_settings_is_left_alone(
    model: str, evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with EvaluationServer(model, twilight=TWILIGHT) as server:
        assert evaluate(server, "passkey", "--samples", "1") == 0
        before = (tmp_path / "out.json").read_text()
        assert evaluate(server, "passkey", "--samples", "1", "--p", "0.8") == 1
    assert "was written with other settings (method 'twilight p=0.95', now" in (
        capsys.readouterr().err
    )
    assert (tmp_path / "out.json").read_text() == before
    (tmp_path / "out.json").write_text('{"rows": []}\n')
    with EvaluationServer(model) as server:
        assert evaluate(server, "passkey") == 1
    assert "is no file of results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope",), r"no task 'nope'; tasks: passkey, "),
        (("passkey", "--context", "4k,16k"), "--context 16384 exceeds the 8192 tokens"),
        (("cwe", "--context", "512"), "--context 512 is too small for cwe"),
        (("passkey", "--p", "0.9"), "--p: the server at"),
        (("passkey", "--twilight", "off"), "--twilight off: the server at"),
        (("passkey", "--p", "1.5"), "--p 1.5: custom_params.twilight.p must be"),
        (("passkey", "--p", "0.9", "--twilight", "off"), "pass one of them"),
        (("passkey", "--samples", "0"), "--samples 0: pass at least 1"),
        (("passkey", "--tokenizer", "/not/there"), "the tokenizer /not/there cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_before_a_request(
    model: str,
    evaluate: Evaluate,
    capsys: pytest.CaptureFixture,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    with EvaluationServer(model) as server:
        assert evaluate(server, *arguments) == 1
    assert message in capsys.readouterr().err
    assert server.requests == []


def test_a_server_that_is_not_there_says_so(
    evaluate: Evaluate, capsys: pytest.CaptureFixture
) -> None:
    with EvaluationServer("unused") as server:
        gone = server.url
    assert evaluate(gone, "passkey") == 1
    assert f"--url: {gone}/v1/models does not answer" in capsys.readouterr().err


def test_the_oracle_of_these_tests_knows_uuids() -> None:
    prompt = "The secret uuid of a-b is 12-ab. x\n\nThe secret uuid of a-b given in the text is"
    assert solve(prompt) == " 12-ab."


def test_sizes_of_prompts_are_kept_for_other_runs(
    model: str,
    evaluate: Evaluate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, flags = tmp_path / "sizes" / "prompts.json", ("passkey", "cwe", "--samples", "3")
    flags = (*flags, "--context", "2000", "--prompts", str(sizes))
    with EvaluationServer(model, answer=lambda _: "") as server:
        assert evaluate(server, *flags) == 0
    kept, sent = sizes.read_text(), sorted(server.prompts)
    assert len(kept.splitlines()) == 1 + 6
    (tmp_path / "out.json").unlink()
    with monkeypatch.context() as patch, EvaluationServer(model, answer=lambda _: "") as server:
        patch.setattr(tasks, "_fit", lambda *_: pytest.fail("searched again"))
        assert evaluate(server, *flags) == 0
    assert sorted(server.prompts) == sent
    assert sizes.read_text() == kept

    first, *rows = kept.splitlines()
    off = {**json.loads(rows[0]), "size": 5}  # as another release of the package would keep
    sizes.write_text("\n".join([first, json.dumps(off), *rows[1:], ""]))
    (tmp_path / "out.json").unlink()
    with EvaluationServer(model, answer=lambda _: "") as server:
        assert evaluate(server, *flags) == 0
    assert sorted(server.prompts) == sent

    sizes.write_text(json.dumps({**json.loads(first), "sentence_tokens": [1]}) + "\n")
    with EvaluationServer(model) as server:
        assert evaluate(server, *flags) == 1
        assert "is of another tokenizer or Python" in capsys.readouterr().err
        sizes.write_text("no JSON\n")
        assert evaluate(server, *flags) == 1
        assert "is no file of prompt sizes" in capsys.readouterr().err
    assert server.requests == []


def test_outputs_are_compared_with_a_second_server(
    model: str, evaluate: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with (
        EvaluationServer(model, twilight=TWILIGHT, answer=solve) as server,
        EvaluationServer(model, answer=lambda prompt: f"{solve(prompt)[:-1]} it is") as other,
    ):
        flags = ("passkey", "--samples", "2", "--against", other.url)
        assert evaluate(server, *flags, "--p", "0.9") == 0
        assert "0.0% of outputs are those of fa3" in capsys.readouterr().out
        assert sorted(other.prompts) == sorted(server.prompts)
        assert all("custom_params" not in body["sampling_params"] for body in other.requests)
        assert evaluate(server, "passkey", "--against", server.url) == 1
        assert "is the server of --url" in capsys.readouterr().err
    run = read_run(tmp_path / "out.json")
    assert run.settings["against"] == "fa3"
    # Outputs are " 12345." and " 12345 it is": the first token is the same.
    for sample in run.samples.values():
        figures = {name: sample["against"][name] for name in ("identical", "agreeing_tokens")}
        assert figures == {"identical": False, "agreeing_tokens": 1}
        assert sample["against"]["output"].endswith(" it is")
        assert sample["score"] == 1.0
    assert main(["report", str(tmp_path / "out.json"), "--out", str(tmp_path / "out")]) == 0
    row = "| twilight p=0.9 | fa3 | 600 | 2 | 0.0% | 1.0 | 3.0 |"
    assert row in (tmp_path / "out" / "accuracy.md").read_text()
    with EvaluationServer(model) as server:
        assert evaluate(server, "passkey", "--against", other.url) == 1
    assert f"--against: {other.url}/v1/models does not answer" in capsys.readouterr().err
