"""Reports: what the table says of which samples, and which files do not belong together."""

import sys
from pathlib import Path
from typing import Any

import pytest

from twilight_sgl.evaluation.__main__ import main
from twilight_sgl.evaluation.records import Writer

SETTINGS = {"method": "fa3", "dense": True, "model": "m", "request": None}
SPARSE = {**SETTINGS, "method": "twilight p=0.9", "dense": False}


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
                "candidate_share": 0.25,
                "kept_share": share,
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


def test_budgets_are_weighed_by_their_tokens(runs: list[str], tmp_path: Path) -> None:
    assert main(["report", *runs, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "accuracy.md").read_text()
    assert cells(text, "## Budgets") == {
        "fa3": ["all", "all"],
        "twilight p=0.9": ["25.00%", "2.00%"],
    }


def test_a_plot_is_drawn(runs: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["report", *runs, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert "(accuracy.png)" in (tmp_path / "out" / "accuracy.md").read_text()


def test_without_matplotlib_the_table_is_written(
    runs: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", *runs, "--out", str(tmp_path / "out")]) == 0
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out" / "accuracy.png").exists()
    text = (tmp_path / "out" / "accuracy.md").read_text()
    assert "| 4096 | passkey | 4 |" in text
    assert "accuracy.png" not in text


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
