"""Options of one request, good and bad, on every route that takes them."""

import json
import urllib.error
from typing import Any

import pytest
from client import Server, prose

pytestmark = pytest.mark.server

CHAT = [{"role": "user", "content": "What is the capital of France?"}]
BAD = {
    "unknown key": ({"top_p": 0.5}, "'top_p'"),
    "p above 1": ({"p": 1.5}, "custom_params.twilight.p"),
    "p zero": ({"p": 0}, "custom_params.twilight.p"),
    "p is text": ({"p": "0.5"}, "custom_params.twilight.p"),
    "p is a truth value": ({"p": True}, "custom_params.twilight.p"),
    "enabled is a number": ({"enabled": 1}, "custom_params.twilight.enabled"),
    "not an object": (0.5, "custom_params.twilight"),
}


def bodies(options: Any) -> dict[str, dict[str, Any]]:
    custom = {"custom_params": {"twilight": options}}
    common = {"max_tokens": 8, "temperature": 0, "model": "default"}
    return {
        "/generate": {"text": "Hello", "sampling_params": {"max_new_tokens": 8} | custom},
        "/v1/completions": {"prompt": "Hello"} | common | custom,
        "/v1/chat/completions": {"messages": CHAT} | common | custom,
    }


def test_answers_a_question(server: Server) -> None:
    path = "/v1/chat/completions"
    answer = server.post(path, bodies({"p": 0.9})[path] | {"max_tokens": 32})
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("case", BAD)
def test_bad_options_get_400(server: Server, path: str, case: str) -> None:
    options, named = BAD[case]
    status, text = server.refused(path, bodies(options)[path])
    assert status == 400
    assert named in text


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_bad_options_of_a_stream_yield_no_token(server: Server, path: str) -> None:
    body = bodies({"p": 7})[path] | {"stream": True}
    try:
        text = server.post(path, body)
    except urllib.error.HTTPError as error:
        assert error.code == 400
        return
    events = [line for line in text.splitlines() if line.startswith("data: {")]
    assert len(events) == 1
    assert "custom_params.twilight.p" in json.loads(events[0][6:])["error"]["message"]


def test_other_custom_params_are_left_alone(server: Server) -> None:
    body = bodies({"p": 0.9})["/generate"]
    body["sampling_params"]["custom_params"]["mine"] = {"anything": [1, 2]}
    assert server.post("/generate", body)["meta_info"]["completion_tokens"] > 0


def test_disabled_request_is_dense(server: Server) -> None:
    prompt = prose(3000, start=90000)
    before = server.twilight()["budget"]
    server.generate(prompt, 4, {"enabled": False})
    assert server.twilight()["budget"] == before
    server.generate(prompt, 4)
    assert server.twilight()["budget"]["context_tokens"] > before["context_tokens"]


def test_server_info_shows_the_configuration(server: Server) -> None:
    state = server.twilight()
    assert state["config"]["p"] == 0.95
    assert state["config"]["min_context_tokens"] == 512
    assert state["config"]["skip_layers"] == [0, 1]
    assert state["pages"]["capacity"] >= 65536 // 16
    assert set(state["audit"]) == {"checks", "violations"}
