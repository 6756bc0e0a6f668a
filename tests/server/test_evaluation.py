"""The evaluation command against a real model: what it can do, and what sparsity costs it."""

from pathlib import Path

import pytest
from client import Server

from twilight_sgl.evaluation.__main__ import main
from twilight_sgl.evaluation.records import Run, read_run

pytestmark = pytest.mark.server


def evaluate(server: Server, out: Path, tasks: list[str], *flags: str) -> Run:
    given = ["--url", server.url, "--json", str(out), "--prompts", str(out.parent / "prompts")]
    assert main([*tasks, *given, *flags]) == 0
    return read_run(out)


def test_small_suite(server: Server, tmp_path: Path) -> None:
    """Dense and sparse answers to the same prompts, and a report of both."""
    size = ["--context", "2k", "--samples", "2", "--concurrency", "2"]
    dense = evaluate(server, tmp_path / "dense", ["niah_single_1"], *size, "--twilight", "off")
    sparse = evaluate(server, tmp_path / "sparse", ["niah_single_1"], *size)
    assert [run.settings["dense"] for run in (dense, sparse)] == [True, False]
    for run in (dense, sparse):
        assert [sample["score"] for sample in run.samples.values()] == [1, 1]
        assert all(s["served_prompt_tokens"] == s["prompt_tokens"] for s in run.samples.values())
    assert {k: s["prompt_sha256"] for k, s in dense.samples.items()} == {
        k: s["prompt_sha256"] for k, s in sparse.samples.items()
    }
    (spent,) = (each["budget"] for each in sparse.budgets)
    assert 0.05 < spent["kept_share"] < 0.2
    assert spent["kept_mass"] >= 0.95
    report = [str(tmp_path / name) for name in ("dense", "sparse")]
    assert main(["report", *report, "--out", str(tmp_path / "report")]) == 0
    assert "| 2048 | niah_single_1 | 2 | 100.0 " in (tmp_path / "report/accuracy.md").read_text()
    assert (tmp_path / "report/heads.png").exists()


@pytest.mark.nightly
def test_up_to_the_whole_context(server: Server, tmp_path: Path) -> None:
    """At 4k and 8k tokens sparse answers are as good as dense ones where those are right."""
    size = ["--context", "4k,8k", "--samples", "4", "--concurrency", "2"]
    tasks = ["passkey", "niah_single_1", "niah_single_2", "multi_turn"]
    dense = evaluate(server, tmp_path / "dense", tasks, *size, "--twilight", "off")
    sparse = evaluate(server, tmp_path / "sparse", tasks, *size)
    passed = [key for key, sample in dense.samples.items() if sample["score"] == 1]
    assert len(passed) > len(dense.samples) / 2
    kept = [sparse.samples[key]["score"] for key in passed]
    assert sum(kept) / len(kept) >= 0.9
    assert all(b["budget"]["kept_share"] < 0.15 for b in sparse.budgets)
