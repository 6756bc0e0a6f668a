"""The decode benchmark's arithmetic and its table."""

from pathlib import Path
from typing import Any

import pytest

from twilight_sgl.benchmark.decode_figures import (
    Measured,
    agreement,
    build_rows,
    format_table,
    gpus,
    percentiles,
    plot,
    steady_phase,
)
from twilight_sgl.benchmark.prompts import Load
from twilight_sgl.benchmark.streaming import MeasurementError, Stream

LOAD = Load("2x1k", 2, 1024)


def stream(*chunks: tuple[float, int], sent_s: float = 0.0, ids: list[int] | None = None) -> Stream:
    return Stream(sent_s, list(chunks), list(range(chunks[-1][1])) if ids is None else ids)


def info(context: int, candidates: int, kept: int) -> dict[str, Any]:
    tokens = {"context_tokens": context, "candidate_tokens": candidates, "kept_tokens": kept}
    heads = {"layer_ids": [0], "kept_fraction": [[kept / max(context, 1)]], "kept_mass": [[0.9]]}
    steps = {"sparse_rows": context // 1000, "decode": context // 250, "dense": context // 1000}
    state = {"twilight": {"config": {"p": 0.9}, "budget": tokens, "heads": heads, "steps": steps}}
    return {"max_total_num_tokens": 4096, "internal_states": [state]}


def test_percentiles_are_milliseconds_and_weighted() -> None:
    values = percentiles([0.001, 0.002, 0.006])
    assert (values["p50"], values["samples"]) == (pytest.approx(2.0), 3)
    assert values["mean"] == pytest.approx(3.0)
    weighted = percentiles([0.001, 0.010], [98, 2])
    assert weighted["mean"] == pytest.approx(1.18)
    assert (weighted["p50"], weighted["p95"]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert weighted["p95"] < percentiles([0.001, 0.010])["p95"]


def test_steady_phase_is_where_all_decode() -> None:
    """What a request did before the last one's first token, or after the first end, is left out."""
    early = stream((1.0, 1), (5.0, 2), (10.0, 3), (10.2, 5), (10.4, 7), (10.8, 9))
    late = stream((10.0, 1), (10.2, 2), (10.6, 4))
    phase = steady_phase([early, late])
    assert phase["steady_s"] == pytest.approx(0.6)
    assert phase["steady_tokens"] == 4 + 3
    assert phase["tokens_per_s"] == pytest.approx(4 / 0.4 + 3 / 0.6)
    # four tokens at 0.1 s, one and two at 0.2 s
    assert phase["tpot_ms"]["p50"] == pytest.approx(100)
    assert phase["tpot_ms"]["p95"] == pytest.approx(200)
    assert phase["tpot_ms"]["samples"] == 4


def test_no_steady_phase_is_an_error() -> None:
    with pytest.raises(MeasurementError, match=r"all 2 requests decode.*--output-tokens"):
        steady_phase([stream((1.0, 1), (2.0, 2)), stream((3.0, 1), (4.0, 2))])


def test_agreement_counts_up_to_the_first_difference() -> None:
    ones = [stream((0.0, 4), ids=ids) for ids in ([1, 2, 3, 4], [1, 2, 3, 4], [9, 2, 3, 4])]
    others = [stream((0.0, 5), ids=ids) for ids in ([1, 2, 3, 4, 5], [1, 2, 9, 4, 5], [1, 2, 3, 4])]
    result = agreement(ones, others, 4)
    assert result == {"equal_share": pytest.approx((1 + 0.5 + 0) / 3), "exact_share": 1 / 3}
    assert agreement(ones, others, 2) == {"equal_share": pytest.approx(2 / 3), "exact_share": 2 / 3}


def test_answers_cut_short_agree_only_as_far_as_they_go() -> None:
    short = [stream((0.0, 2), ids=[1, 2])]
    assert agreement(short, [stream((0.0, 4))], 4)["exact_share"] == 0
    assert agreement(short, short, 4) == {"equal_share": 0.5, "exact_share": 0.0}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """`fa3`, and a Twilight that is twice as fast and differs in one of two answers."""
    slow = [stream((0.1, 1), (1.1, 11), ids=list(range(11))) for _ in range(2)]
    again = [slow[0], stream((0.2, 1), (1.2, 11), ids=[*range(5), *range(6)])]
    fast = [stream((0.1, 1), (0.6, 11), ids=ids) for ids in (list(range(11)), [0] * 11)]
    nothing = {"max_total_num_tokens": 5000}
    results = [
        Measured("fa3", LOAD, again, None, slow, nothing, nothing),
        Measured("twilight", LOAD, fast, None, fast, info(0, 0, 0), info(1000, 250, 20)),
    ]
    return build_rows(results, "fa3", 10)


def test_rows(rows: list[dict[str, Any]]) -> None:
    dense, ours = rows
    assert (dense["load"], dense["requests"], dense["prompt_tokens"]) == ("2x1k", 2, 1024)
    assert dense["tokens_per_s"] == pytest.approx(20)
    assert dense["ttft_cold_ms"]["p50"] == pytest.approx(150)
    assert (dense["throughput_ratio"], dense["budget"], dense["twilight"]) == (1.0, None, None)
    assert dense["agreement_with"] == "fa3, run twice"
    assert dense["agreement"] == {"equal_share": 0.75, "exact_share": 0.5}
    assert ours["throughput_ratio"] == pytest.approx(2)
    assert ours["tpot_ms"]["p95"] == pytest.approx(50)
    assert (ours["kv_tokens"], ours["agreement_with"]) == (4096, "fa3")
    assert ours["agreement"] == {"equal_share": pytest.approx(0.55), "exact_share": 0.5}
    assert ours["budget"]["kept_share"] == 0.02
    assert ours["steps"] == {"decode": 4, "dense": 1}
    assert ours["twilight"] == {"p": 0.9}


def test_table(rows: list[dict[str, Any]]) -> None:
    head, rule, dense, ours = format_table(rows).splitlines()[:4]
    assert head.count("|") == rule.count("|") == dense.count("|") == ours.count("|")
    assert "to fa3" in head
    assert "TTFT prefix" not in head
    assert "| 2x1k | fa3 | 150 / 195 (150) |" in dense
    assert "| 2x1k | twilight | 100 / 100 (100) |" in ours
    assert "| 50.0 / 50.0 | 40.0 | 2.00x | 4096 | 25.0% | 2.0% | 1 of 4 | 55.0% | 50.0% |" in ours
    assert "| 1.00x | 5000 | all | all |  | 75.0% | 50.0% |" in dense
    assert "floor" not in head


def test_floors_stand_beside_the_times(rows: list[dict[str, Any]]) -> None:
    floors = [{"floor_ms": 2.5}, {"floor_ms": None}]
    text = format_table([row | floor for row, floor in zip(rows, floors, strict=True)])
    head, rule, dense, ours = text.splitlines()[:4]
    assert head.count("|") == rule.count("|") == dense.count("|") == ours.count("|")
    assert "| ms a token | floor | tokens/s |" in head
    assert "| 100 / 100 (100) | 100 / 100 | 2.50 | 20.0 |" in dense
    assert "| 50.0 / 50.0 |  | 40.0 |" in ours
    assert "Floor: in which a copy moves" in text


def test_gpus_of_a_server() -> None:
    sizes = {"tp_size": 4, "pp_size": 2, "dp_size": 2}
    assert (gpus({}), gpus(sizes)) == (1, 16)
    assert gpus(sizes | {"enable_dp_attention": True}) == 8


def measured(
    backend: str, seconds: float, start: int = 0, load: Load = LOAD, first_s: float = 0.1
) -> Measured:
    """Ten tokens in so many seconds behind the first."""
    each = [stream((first_s, 1), (first_s + seconds, 11))]
    nothing = {"max_total_num_tokens": 5000}
    return Measured(backend, load, each, None, each, nothing, nothing, start=start)


def test_of_several_passes_the_median_is_shown() -> None:
    seconds = {"fa3": (1.0, 4.0, 2.0), "twilight": (0.5, 1.0, 2.0)}
    results = [measured(name, each) for name, of in seconds.items() for each in of]
    dense, ours = build_rows(results, "fa3", 10)
    assert dense["tokens_per_s_by_pass"] == pytest.approx([10, 2.5, 5])
    assert (dense["tokens_per_s"], dense["throughput_ratio"]) == (pytest.approx(5), 1.0)
    assert ours["throughput_ratio"] == pytest.approx(2)
    assert "| 10.0 (5.00 to 20.0) | 2.00x |" in format_table([dense, ours])
    rows = build_rows([results[0], results[1], results[3], results[4]], "fa3", 10)
    assert [row["tokens_per_s"] for row in rows] == pytest.approx([2.5, 10])  # the lower's
    assert "| 15.0 (10.0 to 20.0) | 2.40x |" in format_table(rows)


def test_of_several_starts_each_has_a_ratio() -> None:
    fa3 = [measured("fa3", seconds, start) for seconds, start in ((1, 0), (2, 0), (2, 1))]
    ours = [measured("twilight", seconds, start) for seconds, start in ((0.5, 0), (1, 0), (2, 1))]
    dense, twilight = build_rows([*fa3, *ours], "fa3", 10)
    assert dense["throughput_ratio_by_start"] == [1.0, 1.0]
    assert twilight["throughput_ratio_by_start"] == pytest.approx([2.0, 1.0])
    text = format_table([dense, twilight])
    assert "| 10.0 (5.00 to 20.0) | 2.00x (1.00 to 2.00) |" in text
    assert "cut short" not in text
    assert "cut short" in format_table([row | {"complete": False} for row in (dense, twilight)])


def test_of_several_starts_each_has_a_mean_to_first_token() -> None:
    samples = ((0, 0.1), (0, 0.2), (1, 0.5))
    fa3 = [measured("fa3", 1, start, first_s=first_s) for start, first_s in samples]
    ours = [measured("twilight", 1, start) for start in (0, 1)]
    dense, twilight = build_rows([*fa3, *ours], "fa3", 10)
    for name in ("ttft_cold_ms", "ttft_cached_ms"):
        assert dense[name]["mean"] == pytest.approx(800 / 3)
        assert dense[name]["mean_by_start"] == pytest.approx([150, 500])
        assert twilight[name]["mean_by_start"] == pytest.approx([100, 100])
    text = format_table([dense, twilight])
    assert "| fa3 | 200 / 470 (267; 150 to 500) | 200 / 470 (267; 150 to 500) |" in text
    assert "several starts the least to most mean of one" in text


def test_of_a_start_that_goes_on_there_is_what_both_were_asked() -> None:
    other = Load("1x2k", 1, 2048)
    fa3 = [measured("fa3", 1)]
    ours = [measured("twilight", 1), measured("twilight", 1, 1), measured("twilight", 1, 1, other)]
    rows = build_rows([*fa3, *ours], "fa3", 10)
    assert [(row["load"], row["backend"]) for row in rows] == [
        ("2x1k", "fa3"),
        ("2x1k", "twilight"),
    ]
    assert [row["throughput_ratio_by_start"] for row in rows] == [[1.0], [1.0]]
    assert build_rows(ours, "fa3", 10) == []


def test_plot(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(rows, tmp_path / "decode.png")
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_several_starts_shows_least_and_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    lines: list[tuple[Any, Any]] = []
    monkeypatch.setattr(axes.Axes, "plot", lambda _, x, y, **__: lines.append((x, y)))
    fa3 = [measured("fa3", seconds, start) for seconds, start in ((1, 0), (2, 1))]
    ours = [measured("twilight", seconds, start) for seconds, start in ((0.5, 0), (2, 1))]
    plot(build_rows([*fa3, *ours], "fa3", 10), tmp_path / "decode.png")
    ((places, ends),) = lines
    assert places[0] == places[1]
    assert ends == pytest.approx((1.0, 2.0))
