"""What a response says of the budgets it was decoded with."""

import json
from typing import Any

import pytest
from client import Server, prose

pytestmark = pytest.mark.server

TOKENS = 4
PROMPT = prose(2600, start=70000)  # long enough to be sparse, see conftest.py
FIELDS = {
    "p",
    "steps",
    "average_budget",
    "kept_fraction",
    "kept_mass",
    "prefix_pages_reused",
}


def check(report: dict[str, Any], p: float) -> None:
    assert set(report) == FIELDS
    assert report["p"] == p
    assert report["steps"] == TOKENS - 1  # the first token is the prefill's
    assert 0 < report["kept_fraction"] < 1
    assert p <= report["kept_mass"] <= 1
    assert report["average_budget"] >= 64  # the recent window


def wish(**options: Any) -> dict[str, Any]:
    sampling = {"max_tokens": TOKENS, "min_tokens": TOKENS, "temperature": 0}
    return {**sampling, "model": "default", "custom_params": {"twilight": options}}


def test_report_is_the_server_totals_of_its_request(server: Server) -> None:
    before = server.twilight()
    answer = server.generate(PROMPT, TOKENS, {"p": 0.8})
    after = server.twilight()
    report = answer["meta_info"]["twilight"]
    check(report, 0.8)
    spent = {
        name: after["budget"][name] - before["budget"][name]
        for name in ("context_tokens", "kept_tokens")
    }
    # With overlap the server decodes one token more, which it drops.
    pairs = len(after["heads"]["layer_ids"]) * len(after["heads"]["kept_fraction"][0])
    steps = after["steps"]["sparse_rows"] - before["steps"]["sparse_rows"]
    assert TOKENS - 1 <= steps <= TOKENS
    assert report["kept_fraction"] == pytest.approx(
        spent["kept_tokens"] / spent["context_tokens"], rel=0.1
    )
    assert report["average_budget"] == pytest.approx(
        spent["kept_tokens"] / (pairs * steps), rel=0.1
    )
    assert report["prefix_pages_reused"] == 0
    again = server.generate(PROMPT, TOKENS, {"p": 0.8})["meta_info"]["twilight"]
    check(again, 0.8)
    assert again["prefix_pages_reused"] == answer["meta_info"]["prompt_tokens"] // 16
    assert again["kept_fraction"] == pytest.approx(report["kept_fraction"], rel=0.01)


def test_report_of_a_dense_request(server: Server) -> None:
    report = server.generate(PROMPT, 2, {"enabled": False})["meta_info"]["twilight"]
    assert set(report) == FIELDS
    assert (report["p"], report["steps"], report["prefix_pages_reused"]) == (None, 0, 0)
    assert report["average_budget"] is report["kept_fraction"] is report["kept_mass"] is None


def test_last_event_of_a_stream_has_the_report(server: Server) -> None:
    sampling = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "temperature": 0}
    text = server.post("/generate", {"text": PROMPT, "sampling_params": sampling, "stream": True})
    *others, last = (event["meta_info"] for event in events(text))
    check(last["twilight"], 0.95)
    assert others and not any("twilight" in meta_info for meta_info in others)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_openai_responses_report_when_asked(server: Server, path: str) -> None:
    chat = "chat" in path
    given = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
    answer = server.post(path, given | wish(report=True, p=0.9))
    check(answer["twilight"], 0.9)
    assert answer["choices"][0]["finish_reason"] == "length"
    streamed = events(server.post(path, given | wish(report=True, p=0.9) | {"stream": True}))
    *others, last = streamed
    check(last["twilight"], 0.9)
    assert last["choices"] == []
    assert last["id"] == others[-1]["id"] and last["object"] == others[-1]["object"]
    assert not any("twilight" in event for event in others)
    short = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
    assert "twilight" not in server.post(path, short | wish(p=0.9))


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of a stream's events, which `[DONE]` must end."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]
