"""Perplexity: tokens are forced one a step, scored by what is left of their logits, reported."""

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluation_client import Evaluate
from evaluation_server import EvaluationServer, logits_at
from sglang.srt.layers.sampler import apply_custom_logit_processor
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from twilight_sgl.evaluation.__main__ import main
from twilight_sgl.evaluation.forced_tokens import FORCED, OFFSET, ForcedTokens
from twilight_sgl.evaluation.perplexity import SCORED_TOKENS, Text
from twilight_sgl.evaluation.records import read_run

pytest_plugins = "evaluation_client"

TWILIGHT = {"p": 0.95, "selector": "quest", "selector_budget": 0.25, "pruner": "top_p"}
FLAGS = ("perplexity", "--context", "200", "--samples", "3")
VOCABULARY = 1000


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    """A text of 600 tokens, of which every fifth is another."""
    path = tmp_path / "prose.txt"
    path.write_text("it was what it never " * 120)
    return path


# The processor, as SGLang applies it.


def params(forced: list[int], prompt: int = 10, prefilled: int = 10) -> dict[str, Any]:
    request = SimpleNamespace(
        origin_input_ids=[0] * prompt, get_fill_ids=lambda: [0] * request.prefilled
    )
    request.prefilled = prefilled
    return {FORCED: forced, "__req__": request}


class Batch:
    """What the sampler knows of a batch, in which each request has the processor or has not."""

    def __init__(self, *requests: dict[str, Any] | None) -> None:
        self.requests = list(requests)
        self.custom_params = self.requests
        mask = torch.tensor([request is not None for request in requests])
        processor = CustomLogitProcessor.from_str(ForcedTokens.to_str())
        rows = [row for row, request in enumerate(requests) if request is not None]
        entry = SimpleNamespace(processor=processor, rows=rows, indices=torch.tensor(rows))
        # SGLang 0.5.17 unpacks a processor and its mask, later releases read fields.
        self.custom_logit_processor = {0: _Entry(entry, processor, mask)}

    def __len__(self) -> int:
        return len(self.requests)


class _Entry(tuple):
    def __new__(cls, entry: SimpleNamespace, *pair: Any) -> "_Entry":
        made = super().__new__(cls, pair)
        made.__dict__.update(vars(entry))
        return made


def step(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    left = logits.clone()
    apply_custom_logit_processor(left, batch)
    return left


def test_each_step_forces_its_token_and_tells_its_log_probability() -> None:
    batch = Batch(params([7, 0, 999]), None, params([5, 5, 5]))
    forced = [(7, 5), (0, 5), (999, 5)]
    for place, tokens in enumerate(forced):
        logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(place)) * 4
        left = step(batch, logits)
        assert left.argmax(-1)[[0, 2]].tolist() == list(tokens)
        assert torch.equal(left[1], logits[1])  # has no processor
        told, others = left.log_softmax(-1).topk(2)
        for row, token in zip((0, 2), tokens, strict=True):
            assert told[row, 0] == 0
            assert others[row, 1] != token
            expected = logits[row].log_softmax(-1)[token]
            assert told[row, 1] + OFFSET == pytest.approx(expected.item(), abs=1e-5)


def test_steps_go_on_in_another_batch_and_end_with_the_tokens() -> None:
    first, second = params([3, 4]), params([8, 9])
    logits = torch.zeros(2, VOCABULARY)
    assert step(Batch(first), logits[:1]).argmax(-1).tolist() == [3]
    assert step(Batch(second, first), logits).argmax(-1).tolist() == [8, 4]
    left = step(Batch(first, second), logits)  # the first has no token left
    assert torch.equal(left[0], logits[0])
    assert left[1].argmax() == 9


def test_chunks_of_a_prompt_use_up_no_token() -> None:
    request = params([3, 4], prompt=20, prefilled=16)
    logits = torch.zeros(1, VOCABULARY)
    assert torch.equal(step(Batch(request), logits), logits)
    request["__req__"].prefilled = 20
    assert step(Batch(request), logits).argmax() == 3


def test_requests_without_tokens_are_left_alone() -> None:
    logits = torch.randn(1, VOCABULARY)
    assert torch.equal(ForcedTokens()(logits.clone(), [{"__req__": None}]), logits)
    assert torch.equal(ForcedTokens()(logits.clone(), [None]), logits)
    assert torch.equal(ForcedTokens()(logits.clone(), None), logits)


# Windows.


def test_windows_are_spread_over_the_text_and_do_not_depend_on_their_number() -> None:
    text = Text(Path("t"), "", [1000], list(range(1000)))
    places = [text.window(203, 0, index)[1] for index in range(4)]
    assert places == [0, 400, 200, 600]
    window = text.window(203, 0, 1)
    assert window == [1000, *range(400, 600)]
    last = max(text.window(203, 0, index)[-1] for index in range(1024))
    assert 990 < last <= 999
    assert text.window(203, 1, 0)[1] not in places
    whole = Text(Path("t"), "", [], list(range(200)))
    assert {tuple(whole.window(202, 0, index)) for index in range(9)} == {tuple(range(200))}


# The command.


def expected_nll(window: list[int]) -> float:
    likely = [
        logits_at(place).log_softmax(-1)[0, window[place]].item()
        for place in range(len(window) - SCORED_TOKENS, len(window))
    ]
    return -sum(likely) / len(likely)


@pytest.mark.parametrize(
    ("flags", "options"),
    [((), None), (("--p", "0.8"), {"p": 0.8}), (("--twilight", "off"), {"enabled": False})],
)
def test_decoded_tokens_are_scored_and_recorded(
    model: str,
    evaluate: Evaluate,
    prose: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    flags: tuple[str, ...],
    options: dict | None,
) -> None:
    with EvaluationServer(model, twilight=TWILIGHT) as server:
        assert evaluate(server, *FLAGS, "--text", str(prose), *flags) == 0
        assert evaluate(server, *FLAGS, "--text", str(prose), *flags) == 0  # has all there is
        assert evaluate(server, *FLAGS[:-1], "4", "--text", str(prose), *flags) == 0
    assert len(server.requests) == 4
    run = read_run(tmp_path / "out.json")
    digest = hashlib.sha256(prose.read_bytes()).hexdigest()
    assert run.settings["perplexity_text"] == digest
    by_hash = {}
    for body in server.requests:
        sampling = body["sampling_params"]
        assert sampling["ignore_eos"] is True
        assert sampling["custom_params"].get("twilight") == options
        window = body["input_ids"] + sampling["custom_params"][FORCED]
        assert len(window) == 200 - 2
        assert window[0] == 0  # what the tokenizer puts first
        by_hash[hashlib.sha256(json.dumps(window).encode()).hexdigest()] = window
    nlls = []
    for index in range(4):
        sample = run.samples["perplexity", 200, 0, index]
        window = by_hash[sample["prompt_sha256"]]
        assert sample["nll"] == pytest.approx(expected_nll(window), abs=1e-5)
        assert (sample["scored_tokens"], sample["prompt_tokens"]) == (128, 200 - 2 - 129)
        assert sample["served_prompt_tokens"] == sample["prompt_tokens"]
        assert "score" not in sample
        nlls.append(sample["nll"])
    assert [spent["task"] for spent in run.budgets] == ["perplexity"] * 2
    shown = f"{math.exp(sum(nlls) / 4):.3f} of 4"
    assert shown in capsys.readouterr().out


def test_other_servers_score_the_same_tokens_of_a_prompt(
    model: str,
    evaluate: Evaluate,
    prose: Path,
    tmp_path: Path,
) -> None:
    flags = ("passkey", *FLAGS[:2], "600", *FLAGS[3:], "--text", str(prose))
    with EvaluationServer(model, sglang=False) as server:
        assert evaluate(server, *flags) == 0
    run = read_run(tmp_path / "out.json")
    assert len(run.samples) == 6
    asked = [body for body in server.requests if isinstance(body["prompt"], list)]
    assert {(body["echo"], body["max_tokens"]) for body in asked} == {(True, 0)}
    by_hash = {
        hashlib.sha256(json.dumps(body["prompt"]).encode()).hexdigest(): body["prompt"]
        for body in asked
    }
    for key, sample in run.samples.items():
        if key[0] == "perplexity":
            window = by_hash[sample["prompt_sha256"]]
            assert sample["nll"] == pytest.approx(expected_nll(window), abs=1e-5)
            assert sample["scored_tokens"] == SCORED_TOKENS
        else:
            assert sample["score"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (FLAGS, "perplexity is of a text of yours: pass --text FILE"),
        (("passkey", "--text", "PROSE"), "is for the task perplexity: name it too"),
        ((*FLAGS, "--text", "/not/there"), "--text /not/there cannot be read"),
        ((*FLAGS, "--text", "PROSE", "--context", "1k"), "has 600 tokens, fewer than a window"),
        ((*FLAGS, "--text", "PROSE", "--context", "100"), "is too small for perplexity: pass at"),
    ],
)
def test_what_cannot_be_is_refused_before_a_request(
    model: str,
    evaluate: Evaluate,
    prose: Path,
    capsys: pytest.CaptureFixture,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    given = [str(prose) if argument == "PROSE" else argument for argument in arguments]
    with EvaluationServer(model) as server:
        assert evaluate(server, *given) == 1
    assert message in capsys.readouterr().err
    assert server.requests == []


def test_servers_that_do_not_decode_what_they_are_told_to(
    model: str,
    evaluate: Evaluate,
    prose: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = (*FLAGS, "--text", str(prose))
    with EvaluationServer(model, processors=False) as server:
        assert evaluate(server, *flags) == 1
    assert "start it with --enable-custom-logit-processor" in capsys.readouterr().err
    assert server.requests == []
    with EvaluationServer(model, retractions=1) as server:
        assert evaluate(server, *flags) == 1
    assert "pass a lower --concurrency" in capsys.readouterr().err
    monkeypatch.setattr(ForcedTokens, "__call__", lambda _, logits, params: logits)
    with EvaluationServer(model) as server:
        assert evaluate(server, *flags) == 1
    assert "did not decode the tokens it was given" in capsys.readouterr().err
    assert read_run(tmp_path / "out.json").samples == {}


def test_another_text_is_another_run(
    model: str,
    evaluate: Evaluate,
    prose: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    with EvaluationServer(model) as server:
        assert evaluate(server, *FLAGS, "--text", str(prose)) == 0
        prose.write_text(prose.read_text() + "more")
        assert evaluate(server, *FLAGS, "--text", str(prose)) == 1
    assert "was written with other settings (perplexity_text" in capsys.readouterr().err


def test_reports_put_it_beside_scores_of_other_files(
    model: str,
    evaluate: Evaluate,
    prose: Path,
    tmp_path: Path,
) -> None:
    scores, nlls = tmp_path / "scores.json", tmp_path / "out.json"
    with EvaluationServer(model) as server:
        assert evaluate(server, "passkey", "--samples", "2") == 0
        nlls.rename(scores)
        assert evaluate(server, *FLAGS, "--text", str(prose)) == 0
    values = [sample["nll"] for sample in read_run(nlls).samples.values()]
    for files in ((scores, nlls), (nlls, scores)):
        assert main(["report", *map(str, files), "--out", str(tmp_path / "out")]) == 0
        text = (tmp_path / "out" / "accuracy.md").read_text()
        assert "| 600 | passkey | 2 | 100.0 " in text
        assert "| 200 | perplexity" not in text
        assert f"| 200 | 3 | 384 | {math.exp(sum(values) / 3):.3f} (" in text
    assert main(["report", str(nlls), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "accuracy.md").read_text()
    assert "mean score" not in text
    assert "## Perplexity" in text
