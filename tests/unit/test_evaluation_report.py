"""Reports: what the table says of which samples, and which files do not belong together."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twilight_sgl.evaluation import budgets
from twilight_sgl.evaluation.__main__ import main
from twilight_sgl.evaluation.records import Run, Writer
from twilight_sgl.evaluation.report import read_runs

SETTINGS = {"method": "fa3", "dense": True, "model": "m", "request": None}
SERVER = {"p": 0.9, "selector": "quest", "pruner": "top_p"}
SPARSE = {**SETTINGS, "method": "twilight p=0.9", "dense": False, "server": SERVER}


def write(
    path: Path,
    settings: dict[str, Any],
    scores: dict[tuple[str, int], list[float]],
    kept: tuple[float, ...] = (),
) -> str:
    """A file of results; each budget is of twice as many tokens as the one before."""
    with Writer(path, settings) as writer:
        for (task, context), values in scores.items():
            for index, score in enumerate(values):
                about = {"task": task, "context": context, "seed": 0, "index": index}
                prompt = f"{task} {context} {index}"
                writer.add_sample({**about, "prompt_sha256": prompt, "score": score})
        for place, share in enumerate(kept):
            spent = {
                "context_tokens": 1000 * 2**place,
                "sparse_rows": 3 - place,
                "candidate_share": 0.25,
                "kept_share": share,
                "kept_mass": 0.9 + share,
                "heads": {
                    "layer_ids": [1, 3],
                    "kept_fraction": [[share, 0.0], [share, share]],
                    "kept_mass": [[0.9, 0.9], [0.9, 0.9 + 4 * share]],
                },
            }
            writer.add_budget({"task": "vt", "context": 4096, "samples": 4, "budget": spent})
    return str(path)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    dense = {("vt", 4096): [1.0, 1.0, 0.5, 0.0], ("passkey", 4096): [1.0] * 4}
    sparse = {("vt", 4096): [1.0, 0.0, 0.5, 1.0], ("passkey", 4096): [1.0] * 4}
    return [
        write(tmp_path / "dense.json", SETTINGS, dense),
        write(tmp_path / "sparse.json", SPARSE, sparse, (0.04, 0.01)),
    ]


def cells(text: str, heading: str) -> dict[str, list[str]]:
    """Rows of the first table after a heading, by task or method, without intervals."""
    section = text.split(heading + "\n")[1].split("\n#")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    place = 1 if rows[0][0] == "context" else 0
    return {row[place]: [cell.split(" (")[0] for cell in row[2:]] for row in rows[2:]}


def test_scores_by_task_and_method_with_what_dense_fails_apart(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["report", *runs, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "accuracy.md").read_text()
    assert "| context | task | samples | fa3 | twilight p=0.9 |" in text
    assert cells(text, "# Accuracy") == {
        "passkey": ["4", "100.0", "100.0"],
        "vt": ["4", "62.5", "62.5"],
        "average": ["8", "81.2", "81.2"],
    }
    assert cells(text, "## Samples that fa3 passes") == {
        "passkey": ["4", "100.0", "100.0"],
        "vt": ["2", "100.0", "50.0"],
        "average": ["6", "100.0", "83.3"],
    }
    assert cells(text, "## Samples that fa3 fails") == {"vt": ["2", "25.0", "75.0"]}
    assert "100.0 (51.0 to 100.0)" in text  # Wilson's interval of 4 of 4
    assert text in capsys.readouterr().out


def test_the_model_is_named_without_its_folder(tmp_path: Path) -> None:
    settings = {**SETTINGS, "model": "/models/small-one"}
    path = write(tmp_path / "run.json", settings, {("passkey", 4096): [1.0]})
    assert main(["report", path, "--out", str(tmp_path / "out")]) == 0
    assert "`small-one`, seed 0" in (tmp_path / "out" / "accuracy.md").read_text()


def test_budgets_are_weighed_by_their_tokens(runs: list[str], tmp_path: Path) -> None:
    assert main(["report", *runs, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "accuracy.md").read_text()
    assert cells(text, "## Budgets") == {
        "fa3": ["all", "all", "-"],
        "twilight p=0.9": ["25.00%", "2.00%", "92.80%"],  # mass is weighed by rows: 3 and 2
    }


def test_heads_are_weighed_by_their_tokens_and_rows(runs: list[str]) -> None:
    dense, sparse = read_runs([Path(run) for run in runs]).values()
    assert budgets.heads(dense) is None
    heads = budgets.heads(sparse)
    assert heads is not None
    assert heads.layer_ids == [1, 3]
    assert np.allclose(heads.kept_fraction, [[0.02, 0.0], [0.02, 0.02]])
    assert np.allclose(heads.kept_mass, [[0.9, 0.9], [0.9, 0.9 + 4 * 0.028]])


@pytest.mark.parametrize(
    ("settings", "p"),
    [
        (SETTINGS, None),
        (SPARSE, 0.9),
        ({**SPARSE, "request": {"p": 0.5}}, 0.5),
        ({**SPARSE, "request": {"enabled": False}, "dense": True}, None),
        ({**SPARSE, "server": {**SERVER, "pruner": "none"}}, None),
    ],
)
def test_p_is_the_request_s_before_the_server_s(settings: dict[str, Any], p: float | None) -> None:
    assert budgets.p_of(Run(settings)) == p


def test_pictures_are_drawn_of_what_there_is(runs: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for files, names in ((runs, {"accuracy", "heads", "mass"}), (runs[:1], {"accuracy"})):
        out = tmp_path / str(len(files))
        assert main(["report", *files, "--out", str(out)]) == 0
        text = (out / "accuracy.md").read_text()
        drawn = {path.stem for path in out.iterdir() if path.suffix == ".png"}
        assert drawn == names
        for name in names:
            assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
            assert f"({name}.png)" in text
        assert text.count("](") == len(names)


def test_without_matplotlib_the_table_is_written(
    runs: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", *runs, "--out", str(tmp_path / "out")]) == 0
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))
    text = (tmp_path / "out" / "accuracy.md").read_text()
    assert "| 4096 | passkey | 4 |" in text
    assert ".png" not in text


def test_files_of_the_same_settings_are_one_run(tmp_path: Path) -> None:
    one = write(tmp_path / "a.json", SETTINGS, {("vt", 4096): [1.0]})
    two = write(tmp_path / "b.json", SETTINGS, {("vt", 8192): [0.0, 0.0]})
    assert main(["report", one, two, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "accuracy.md").read_text()
    assert "| 4096 | vt | 1 | 100.0 " in text
    assert "| 8192 | vt | 2 | 0.0 " in text
    assert "## Samples that" not in text  # with one method there is nothing to compare


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SPARSE, "model": "n"}, "is of n, others are of m: report one model"),
        ({**SETTINGS, "request": {"p": 1}}, "is of 'fa3' with other settings"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    runs: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    settings: dict[str, Any],
    message: str,
) -> None:
    other = write(tmp_path / "other.json", settings, {("vt", 4096): [1.0]})
    assert main(["report", runs[0], other, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_prompts_for_the_same_sample_are_refused(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "other.json"
    with Writer(other, SPARSE) as writer:
        about = {"task": "vt", "context": 4096, "seed": 0, "index": 0}
        writer.add_sample({**about, "prompt_sha256": "another", "score": 1.0})
    assert main(["report", runs[0], str(other), "--out", str(tmp_path / "out")]) == 1
    assert "have different prompts for ('vt', 4096, 0, 0)" in capsys.readouterr().err


def test_files_that_are_none_or_hold_nothing_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["report", str(tmp_path / "gone"), "--out", str(tmp_path)]) == 1
    assert "gone cannot be read" in capsys.readouterr().err
    empty = write(tmp_path / "empty.json", SETTINGS, {})
    assert main(["report", empty, "--out", str(tmp_path)]) == 1
    assert "empty.json holds no sample" in capsys.readouterr().err


def test_differences_are_between_the_same_samples(tmp_path: Path) -> None:
    dense = write(tmp_path / "dense", SETTINGS, {("vt", 4096): [1.0, 1.0, 0.5, 0.0, 1.0]})
    sparse = write(tmp_path / "sparse", SPARSE, {("vt", 4096): [1.0, 0.0, 0.5, 0.0]})
    for path, settings, nlls in (
        (dense, SETTINGS, [2.0, 3.0]),
        (sparse, SPARSE, [2.1, 3.1, 9.0]),  # the last window is of this run alone
    ):
        with Writer(Path(path), settings) as writer:
            for index, nll in enumerate(nlls):
                about = {"task": "perplexity", "context": 4096, "seed": 0, "index": index}
                about |= {"prompt_sha256": str(index), "scored_tokens": 128}
                writer.add_sample({**about, "nll": nll})
    assert main(["report", dense, sparse, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "accuracy.md").read_text()
    assert "| context | figure | samples | twilight p=0.9 |" in text
    assert cells(text, "## Difference from fa3") == {
        "score, points": ["4", "-25.0"],
        "perplexity, ratio": ["2", f"{np.exp(0.1):.3f}"],
    }
    assert "| -25.0 (-75.0 to +0.0) |" in text
