"""The ways users reach the server: SGLang's frontend, the OpenAI client, SGLang's benchmark."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from client import Server, environment, prose

pytestmark = pytest.mark.server


def test_frontend_program_with_turns_and_fork(server: Server) -> None:
    import sglang as sgl

    @sgl.function
    def tour(s: Any, city: str) -> Any:
        s += sgl.user(f"{prose(2500, start=40000)}\n\nWhich country is {city} in?")
        s += sgl.assistant(sgl.gen("country", max_tokens=12, temperature=0))
        branches = s.fork(2)
        for index, branch in enumerate(branches):
            branch += sgl.user(f"Name one thing to see there, number {index + 1}.")
            branch += sgl.assistant(sgl.gen("sight", max_tokens=12, temperature=0))
        branches.join()
        s += sgl.user(f"Seen: {branches[0]['sight']} and {branches[1]['sight']}. Say goodbye.")
        s += sgl.assistant(sgl.gen("goodbye", max_tokens=8, temperature=0))

    before = server.twilight()
    state = tour.run(city="Paris", backend=sgl.RuntimeEndpoint(server.url))
    after = server.twilight()
    assert state["country"] and state["goodbye"]
    assert after["budget"]["kept_tokens"] > before["budget"]["kept_tokens"]
    assert after["pages"]["reused"] > before["pages"]["reused"]  # turns and branches share
    assert after["audit"]["violations"] == 0


def test_openai_client_streams_with_options(server: Server) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    options: dict[str, Any] = {"custom_params": {"twilight": {"p": 0.8}}}
    chunks = client.chat.completions.create(
        model="default",
        messages=question,
        max_tokens=16,
        temperature=0,
        stream=True,
        extra_body=options,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Paris" in text
    with pytest.raises(openai.BadRequestError, match=r"custom_params\.twilight\.p"):
        client.chat.completions.create(
            model="default",
            messages=question,
            extra_body={"custom_params": {"twilight": {"p": 2}}},
        )


@pytest.mark.nightly
def test_sglang_serving_benchmark(server: Server, tmp_path: Path) -> None:
    result = tmp_path / "result.jsonl"
    command = [sys.executable, "-m", "sglang.benchmark.serving", "--backend", "sglang"]
    command += ["--base-url", server.url, "--dataset-name", "generated-shared-prefix"]
    command += ["--gsp-num-groups", "2", "--gsp-prompts-per-group", "3"]
    command += ["--gsp-system-prompt-len", "600", "--gsp-question-len", "32"]
    command += ["--gsp-output-len", "8", "--output-file", str(result)]
    before = server.twilight()["pages"]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
        env=environment(),
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert json.loads(result.read_text().splitlines()[-1])["completed"] == 6
    assert server.twilight()["pages"]["reused"] > before["reused"]
