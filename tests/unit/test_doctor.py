"""The doctor: a good environment passes; what is broken fails with the remedy and exit code 1."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from twilight_sgl import doctor, patches, plugin
from twilight_sgl.doctor import FAIL, OK, WARN, Check

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "vocab_size": 128,
    "torch_dtype": "float32",
}
MLA = LLAMA | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
Run = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _no_plugin_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGLANG_PLUGINS", "SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run only the named check: exit code and table."""

    def run(name: str, *argv: str) -> tuple[int, str]:
        checks = [row for row in doctor.CHECKS if row[0] == name]
        assert checks
        monkeypatch.setattr(doctor, "CHECKS", checks)
        code = doctor.main(argv)
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def model(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """Write a config.json, without weights, and return its folder."""

    def write(config: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


def test_good_environment_passes(model: Callable[[dict[str, Any]], str]) -> None:
    command = [sys.executable, "-m", "twilight_sgl.doctor", "--json", "--model-path", model(LLAMA)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, "--twilight-page-size", "32"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    report = json.loads(result.stdout)
    assert result.returncode == 0, report
    assert report["ok"]
    assert result.stderr == ""
    statuses: dict[str, list[str]] = {}
    for check in report["checks"]:
        statuses.setdefault(check["name"], []).append(check["status"])
    assert set().union(*statuses.values()) == {OK}, report
    assert len(statuses["patch"]) == len(patches.all_patches())
    assert {"python", "sglang", "torch", "device", "plugin", "config"} <= statuses.keys()
    details = {check["name"]: check["detail"] for check in report["checks"]}
    assert "page_size 32" in details["config"]
    # 4 layers of 2 heads of 64 in float32, of which 2 layers select: 2 * (2*64*4/32 + 64/2 + 4)
    assert "L=4 (2 selecting), HQ=4, HK=2, D=64" in details["model"]
    assert "KV 4,096, summaries 160 (4%)" in details["model"]
    assert "tokens of context without Twilight" in details["memory"]


@pytest.mark.parametrize(
    ("module", "name", "check"),
    [(plugin, "SUPPORTED_SGLANG", "sglang"), (doctor, "SUPPORTED_PYTHON", "python")],
)
def test_version_out_of_range_fails(
    run: Run, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, check: str
) -> None:
    monkeypatch.setattr(module, name, ">=99")
    code, table = run(check)
    assert code == 1
    assert table.startswith("FAIL")
    assert "outside the supported range >=99" in table
    assert {"sglang": "-> pip install", "python": "-> make the environment"}[check] in table


def test_broken_contract_fails_and_others_are_still_checked(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def patch(target: str, *parameters: str) -> patches.Patch:
        return patches.Patch(target, "before", print, f"needs {target}", parameters)

    broken = [patch("json.gone"), patch("json.loads", "text"), patch("json.dumps", "obj")]
    monkeypatch.setattr(patches, "all_patches", lambda: broken)
    code, table = run("patch")
    rows = [line for line in table.splitlines() if " patch " in line]
    assert code == 1
    assert [row.split()[0] for row in rows] == [FAIL, FAIL, OK]
    assert "json.gone is not in this SGLang" in rows[0]
    assert "needs json.gone" in rows[0]
    assert "begin with ['text']" in rows[1]
    assert table.count("-> pip install --force-reinstall 'sglang") == 2
    assert "3 checks: 2 failed" in table


def test_bad_flag_fails(run: Run) -> None:
    code, table = run("config", "--twilight-p", "1.5")
    assert code == 1
    assert "--twilight-p (p) is 1.5; expected a number in (0, 1]" in table
    assert "-> correct the setting" in table


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("SGLANG_PLUGINS", "other", "set SGLANG_PLUGINS=other,twilight"),
        ("SGLANG_PLATFORM", "other", "unset SGLANG_PLATFORM"),
    ],
)
def test_excluded_plugin_fails(
    run: Run, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, remedy: str
) -> None:
    monkeypatch.setenv(variable, value)
    code, table = run("entry point")
    assert code == 1
    assert f"{variable}={value}" in table.splitlines()[0]
    assert f"-> {remedy}" in table


def test_excluded_platform_warns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "twilight")
    code, table = run("entry point")
    assert code == 0
    assert "warn" in table
    assert "set SGLANG_PLUGINS=twilight,twilight_cpu" in table


def test_mla_model_fails(run: Run, model: Callable[[dict[str, Any]], str]) -> None:
    code, table = run("model", "--model-path", model(MLA))
    assert code == 1
    assert "multi-head latent attention (MLA)" in table
    assert "-> serve another model" in table


def test_model_without_selecting_layers_fails(
    run: Run, model: Callable[[dict[str, Any]], str]
) -> None:
    flags = ["--twilight-skip-layers", "0,1,2,3"]
    code, table = run("model", "--model-path", model(LLAMA), *flags)
    assert code == 1
    assert "--twilight-skip-layers" in table


def test_context_too_short_to_select_warns(
    run: Run, model: Callable[[dict[str, Any]], str]
) -> None:
    flags = ["--twilight-min-context-tokens", "8192"]
    code, table = run("model", "--model-path", model(LLAMA), *flags)
    assert code == 0
    assert "-> lower --twilight-min-context-tokens" in table


def test_embedded_model_not_cached_warns(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TWILIGHT_CACHE", str(tmp_path))
    code, table = run("model")
    assert code == 0
    assert table.startswith(WARN)
    assert "will be downloaded" in table
    assert "-> python -m twilight_sgl.embedded_model" in table


def test_check_that_raises_is_reported_and_the_rest_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(arguments: Any) -> Iterator[Check]:
        print("noise")
        yield Check("first", OK, "fine")
        raise RuntimeError("broken\nbadly")

    def passes(arguments: Any) -> Iterator[Check]:
        yield Check("last", OK, "fine")

    monkeypatch.setattr(doctor, "CHECKS", [("bad", raises, "mend it"), ("last", passes, "")])
    assert doctor.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    rows = [(row["name"], row["status"], row["remedy"]) for row in report["checks"]]
    assert rows == [("first", OK, ""), ("bad", FAIL, "mend it"), ("last", OK, "")]
