"""Series as SGLang's `/metrics` would show them: written by several processes, read by one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from prometheus_client.parser import text_string_to_metric_families
from snapshots import totals

from twilight_sgl.telemetry.prometheus import series

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "launch" / "grafana" / "twilight.json"

# One scheduler: publishes totals after 2, then after `steps` steps.
SCHEDULER = """
import sys
sys.path.insert(0, sys.argv[1])
from snapshots import totals
from twilight_sgl.telemetry.prometheus import PrometheusSink
from twilight_sgl.telemetry.publisher import difference
tp_rank, dp_rank, steps = map(int, sys.argv[2:])
labels = {"model_name": "m", "engine_type": "unified", "tp_rank": tp_rank, "dp_rank": dp_rank}
sink = PrometheusSink(labels)
first, last = totals(2), totals(steps, audit_checks=1)
sink.publish(first, difference(first, None))
sink.publish(last, difference(last, first))
"""

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """What /metrics holds after a scheduler of rank (TP 0, DP 0) and one of (TP 1, DP 1)."""
    folder = tmp_path_factory.mktemp("prometheus")
    for tp_rank, dp_rank, steps in ((0, 0, 5), (1, 1, 7)):
        subprocess.run(
            [
                *(sys.executable, "-c", SCHEDULER, str(Path(__file__).parent)),
                *map(str, (tp_rank, dp_rank, steps)),
            ],
            check=True,
            env={"PROMETHEUS_MULTIPROC_DIR": str(folder), "PYTHONSAFEPATH": "1"},
        )
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(folder))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, rank: int, **labels: str) -> float:
    of_rank = {"model_name": "m", "engine_type": "unified"}
    of_rank |= {"tp_rank": str(rank), "dp_rank": str(rank)}
    return samples[name, tuple(sorted((of_rank | labels).items()))]


def test_all_series_are_there_and_no_other(samples: Samples) -> None:
    assert {name for name, _ in samples} == series()
    assert all(name.startswith("twilight_") for name in series())


@pytest.mark.parametrize(("rank", "steps"), [(0, 5), (1, 7)])
def test_counters_are_the_totals_of_their_rank(samples: Samples, rank: int, steps: int) -> None:
    expected = totals(steps, audit_checks=1)
    for name in (
        *("sparse_rows", "decode_steps", "dense_steps", "mixed_rows"),
        *("pages_built", "pages_reused", "sealing_seconds", "audit_checks", "audit_violations"),
    ):
        found = value(samples, f"twilight_{name}_total", rank)
        assert found == pytest.approx(getattr(expected, name)), name
    for place, layer_id in enumerate(expected.layer_ids):
        for name in ("context_tokens", "candidate_tokens", "kept_tokens"):
            found = value(samples, f"twilight_{name}_total", rank, layer=str(layer_id))
            assert found == getattr(expected, name)[place].sum()
        mass = value(samples, "twilight_kept_mass_total", rank, layer=str(layer_id))
        assert mass == pytest.approx(0.9 * steps)


@pytest.mark.parametrize(("rank", "steps"), [(0, 5), (1, 7)])
def test_gauges(samples: Samples, rank: int, steps: int) -> None:
    assert value(samples, "twilight_pages_capacity", rank) == 512
    assert value(samples, "twilight_pages_sealed", rank) == steps
    kept = (10 + 11 + 20 + 21 + 30 + 31) / 6
    assert value(samples, "twilight_average_budget_tokens", rank) == pytest.approx(kept)
    assert value(samples, "twilight_kept_fraction", rank) == pytest.approx(kept / 1000)
    assert value(samples, "twilight_kept_mass_mean", rank) == pytest.approx(0.9)


# The dashboard.


def test_dashboard_is_one_that_grafana_imports() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["uid"]
    assert dashboard["title"]
    assert dashboard["schemaVersion"] >= 36
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["title"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, f"{panel['title']} overlaps another panel"
        taken |= cells
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"]


def test_dashboard_asks_for_series_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    ] + [
        variable["query"]["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]
    named = {name for text in expressions for name in re.findall(r"\btwilight_\w+", text)}
    assert named <= series()
    assert all("twilight_" in text for text in expressions)
    unused = series() - named
    assert not unused, f"no panel shows {unused}"
