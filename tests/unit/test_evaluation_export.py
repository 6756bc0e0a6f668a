"""Exported tasks: what lm-eval reads of them."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from evaluation_server import EvaluationServer, solve

from twilight_sgl.evaluation.__main__ import main
from twilight_sgl.evaluation.tasks import make_sample

pytest_plugins = "evaluation_client"


def load_yaml(path: Path) -> dict[str, Any]:
    """A task file, with its function by name."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    return yaml.load(path.read_text(), Loader)


def scoring_of(folder: Path, function: str) -> Callable[..., dict[str, float]]:
    """The function that a task file names, from the file in its own folder."""
    module_name, name = function.split(".")
    spec = importlib.util.spec_from_file_location(module_name, folder / f"{module_name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def test_every_task_has_its_samples_and_their_scoring(model: str, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text).input_ids)

    out = tmp_path / "out"
    given = ["passkey", "niah_single_1", "--context", "400,600", "--samples", "2", "--seed", "3"]
    assert main(["export", *given, "--tokenizer", model, "--out", str(out)]) == 0
    group = load_yaml(out / "twilight.yaml")
    assert group["task"] == [
        f"twilight_{task}_{context}"
        for context in (400, 600)
        for task in ("passkey", "niah_single_1")
    ]
    for name in group["task"]:
        about = load_yaml(out / f"{name}.yaml")
        assert about["task"] == name
        task, context = name.removeprefix("twilight_").rsplit("_", 1)
        lines = Path(about["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        for index, row in enumerate(rows):
            made = make_sample(task, int(context), 3, index, count_tokens)
            assert row == {"prompt": made.prompt, "references": made.references}
            score = scoring_of(out, about["process_results"])
            assert score(row, [solve(row["prompt"])]) == {"recall": 1.0}
            assert score(row, ["no idea"]) == {"recall": 0.0}
        assert len(rows) == 2
    assert load_yaml(out / "twilight_passkey_400.yaml")["generation_kwargs"]["max_gen_toks"] == 32


def test_a_server_names_its_tokenizer(model: str, tmp_path: Path) -> None:
    with EvaluationServer(model) as server:
        given = ["--url", server.url, "--context", "400", "--samples", "1"]
        assert main(["export", "passkey", *given, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "twilight_passkey_400.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no task 'nothing'"),
        (["perplexity"], "leave it out"),
        (["passkey", "--samples", "0"], "--samples 0"),
        (["vt", "--context", "64"], "--context 64 is too small for vt"),
    ],
)
def test_bad_input(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    given = ["--tokenizer", model, "--out", str(tmp_path / "out")]
    assert main(["export", *arguments, *given]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "out").write_text("a file")
    given = ["--tokenizer", model, "--out", str(tmp_path / "out")]
    assert main(["export", "passkey", *given, "--context", "400"]) == 1
    assert "cannot be written" in capsys.readouterr().err
