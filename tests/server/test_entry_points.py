"""SGLang's own entry points find the installed plugin; each start takes a minute or more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from client import environment, prose, running

from twilight_sgl.embedded_model import ensure_embedded_model

pytestmark = [pytest.mark.server, pytest.mark.nightly]

ENGINE = """
import json, sys
import sglang as sgl

if __name__ == "__main__":
    engine = sgl.Engine(
        model_path=sys.argv[1], decode_attention_backend="twilight", max_total_tokens=8192
    )
    text = engine.generate(sys.argv[2], {"max_new_tokens": 8, "temperature": 0})["text"]
    state = engine.get_server_info()["internal_states"][0]["twilight"]
    engine.shutdown()
    print("RESULT", json.dumps([text, state]))
"""


def test_engine_reads_the_environment(tmp_path: Path) -> None:
    settings = tmp_path / "twilight.yaml"
    settings.write_text("p: 0.9\nmin_context_tokens: 64\nskip_layers: none\n")
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    run = subprocess.run(
        [sys.executable, str(script), str(ensure_embedded_model()), prose(1500)],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment() | {"TWILIGHT_CONFIG": str(settings)},
    )
    results = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, run.stdout[-2000:] + run.stderr[-2000:]
    text, state = json.loads(results[0][7:])
    assert text
    assert state["config"]["p"] == 0.9
    assert state["config"]["skip_layers"] == []
    assert 0 < state["budget"]["kept_tokens"] < state["budget"]["context_tokens"]


def test_sglang_serve(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("twilight-p: 0.8\ntwilight-min-context-tokens: 64\n")
    flags = ["--model-path", str(ensure_embedded_model()), "--config", str(recipe)]
    flags += ["--decode-attention-backend", "twilight", "--twilight-p", "0.7"]
    command = [str(Path(sys.executable).with_name("sglang")), "serve"]
    with running(flags, tmp_path / "server.log", command) as server:
        server.wait().generate(prose(1500), 4)
        state = server.twilight()
    assert state["config"]["p"] == 0.7  # the command line wins over the file
    assert state["config"]["min_context_tokens"] == 64
    assert state["budget"]["kept_tokens"] > 0
