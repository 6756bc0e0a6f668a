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


def average(run: Run, context: int) -> float:
    scores = [sample["score"] for key, sample in run.samples.items() if key[1] == context]
    return sum(scores) / len(scores)


def test_small_suite(server: Server, tmp_path: Path) -> None:
    """Dense and sparse answers to the same prompts, the sparse ones from a tenth of the context."""
    size = ["--context", "2k", "--samples", "2", "--concurrency", "2"]
    tasks = ["passkey", "niah_single_1"]
    dense = evaluate(server, tmp_path / "dense", tasks, *size, "--twilight", "off")
    sparse = evaluate(server, tmp_path / "sparse", tasks, *size)
    assert [run.settings["dense"] for run in (dense, sparse)] == [True, False]
    prompts = [{k: s["prompt_sha256"] for k, s in run.samples.items()} for run in (dense, sparse)]
    assert prompts[0] == prompts[1]
    for run in (dense, sparse):
        assert all(s["served_prompt_tokens"] == s["prompt_tokens"] for s in run.samples.values())
    assert average(dense, 2048) == 1
    assert average(sparse, 2048) == 1
    (needles,) = (b["budget"] for b in sparse.budgets if b["task"] == "niah_single_1")
    assert needles["candidate_share"] == pytest.approx(0.25, abs=0.02)
    assert 0 < needles["kept_share"] < 0.1
    assert (
        main(["report", *(str(tmp_path / n) for n in ("dense", "sparse")), "--out", str(tmp_path)])
        == 0
    )
    assert "| 2048 | average | 4 | 100.0 " in (tmp_path / "accuracy.md").read_text()


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
    assert all(b["budget"]["kept_share"] < 0.1 for b in sparse.budgets if b["context"] == 8192)
