"""The monitor beside servers that answer, restart, refuse, or are not there."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from monitored_server import MonitoredServer, state
from rich.console import Console
from snapshots import totals

from twilight_sgl.errors import TwilightError
from twilight_sgl.monitor.__main__ import main, refreshed
from twilight_sgl.monitor.figures import Source
from twilight_sgl.monitor.view import BARS, HeatMap

KEPT = (10 + 11 + 20 + 21 + 30 + 31) / 6  # tokens of a KV head, of 1000
NOWHERE = "http://127.0.0.1:9"


def shown(source: Source, width: int = 80) -> str:
    """What the terminal shows, as text."""
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(refreshed(source))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# Figures.


def test_figures_since_the_start_and_since_the_last_refresh() -> None:
    with MonitoredServer(state(2)) as server:
        source = Source(server.url)
        first = source.read()
        assert first.now is None
        assert first.total is not None
        assert first.total.rows == 2
        assert first.total.kept_tokens == pytest.approx(KEPT)
        assert first.total.kept_fraction == pytest.approx(KEPT / 1000)
        assert first.total.candidate_tokens == 250
        assert first.total.kept_mass == pytest.approx(0.9)
        # Three more steps, of twice the context and half the mass.
        now = totals(5, context_tokens=totals(8).context_tokens, kept_mass=totals(2).kept_mass)
        server.states = [state(5, **{k: getattr(now, k) for k in ("context_tokens", "kept_mass")})]
        second = source.read()
    assert second.now is not None
    assert second.now.rows == 3
    assert second.now.context_tokens == pytest.approx(2000)
    assert second.now.kept_mass == pytest.approx(0)
    assert second.total is not None
    assert second.total.kept_mass == pytest.approx(0.9 * 2 / 5)
    assert (second.running, second.waiting, second.tokens_per_second) == (3, 1, 12.5)


def test_throughput_is_zero_while_no_step_runs() -> None:
    with MonitoredServer(state(2)) as server:
        source = Source(server.url)
        source.read()
        idle = source.read()
        server.loads = [{"num_running_reqs": 0, "num_waiting_reqs": 0}]
        first = Source(server.url).read()
    assert idle.tokens_per_second == first.tokens_per_second == 0
    assert idle.now is None


def test_replicas_are_added_and_their_heads_weighted_by_context() -> None:
    other = totals(1).kept_tokens * 0 + 500 * 6
    with MonitoredServer(state(2), state(6, kept_tokens=other)) as server:
        server.loads = server.loads * 2
        figures = Source(server.url).read()
    assert figures.tokens_per_second == 25
    assert (figures.running, figures.waiting) == (6, 2)
    assert figures.pages["built"] == 4 + 12
    assert figures.total is not None
    assert figures.total.rows == 8
    assert figures.total.kept_tokens == pytest.approx((2 * KEPT + 6 * 500) / 8)
    assert figures.total.kept_mass == pytest.approx(0.9)
    assert figures.kept_fraction is not None
    assert figures.kept_fraction[0][0] == pytest.approx((2 * 0.010 + 6 * 0.5) / 8)


def test_counts_that_fall_are_a_restarted_server_s() -> None:
    with MonitoredServer(state(9)) as server:
        source = Source(server.url)
        source.read()
        server.states = [state(2)]
        assert source.read().now is None
        server.states = [state(3)]
        now = source.read().now
    assert now is not None
    assert now.rows == 1


def test_a_server_without_loads() -> None:
    with MonitoredServer(state(2)) as server:
        server.loads = [{}]
        figures = Source(server.url).read()
    assert figures.running is None
    assert figures.total is not None


def test_api_key() -> None:
    with MonitoredServer(state(2), api_key="secret") as server:
        with pytest.raises(TwilightError, match="--api-key"):
            Source(server.url).read()
        assert Source(server.url, "secret").read().model == "m"


# The screen.


def test_screen_fits_80_columns() -> None:
    with MonitoredServer(state(123456, pages_sealed=500)) as server:
        text = shown(Source(server.url))
    assert all(len(line) <= 80 for line in text.splitlines())
    for words in (
        "Twilight: m",
        "12.5 tokens/s   3 running   1 waiting   p = 0.95, half_bound",
        "500 sealed of 512; 246,912 summaries built in 30864.00 s",
        "370,368 prefix pages found sealed",
        "off (--twilight-audit-interval)",
        "highest: 3.1% of the context",
        server.url,
    ):
        assert words in text
    (line,) = (line for line in text.splitlines() if line.startswith("│ since start"))
    cells = ["123,456", "1,000", "250", "20.5", "2.1%", "0.900"]
    assert line.strip("│ ").split()[2:] == cells


def test_audit_state() -> None:
    with MonitoredServer(state(2, audit_checks=7)) as server:
        assert "7 audits, no violation" in shown(Source(server.url))
        server.states = [state(2, audit_checks=7, audit_violations=2)]
        assert "2 violations in 7 audits" in shown(Source(server.url))


def test_before_the_first_sparse_row() -> None:
    with MonitoredServer(state(0)) as server:
        text = shown(Source(server.url))
    assert "no row has been sparse yet" in text


@pytest.mark.parametrize(("layers", "bands"), [(3, 1), (36, 1), (37, 1), (80, 2)])
def test_heat_map_shows_every_cell_once(layers: int, bands: int) -> None:
    heads = 3
    values = [[(layer * heads + head) / (layers * heads) for head in range(heads)] for layer in
              range(layers)]  # fmt: skip
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(HeatMap(values, range(2, layers + 2)))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert sum(line.startswith("layer") for line in lines) == bands
    cell = 2 if layers <= 36 else 1
    for head in range(heads):
        text = "".join(line[8:] for line in lines if line.startswith(f"head {head}"))
        # What is blank at the end of a line may have been cut.
        text = text.ljust(cell * layers)
        most = values[-1][-1]
        assert text == "".join(BARS[round(row[head] / most * 8)] * cell for row in values)
    labels = [line.split()[1:] for line in lines if line.startswith("layer")]
    assert labels[0][0] == "2"
    assert labels[-1][-1] == str(layers + 1)


def test_terminals_without_unicode() -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(width=80, file=output, force_terminal=False)
    with MonitoredServer(state(2)) as server:
        console.print(refreshed(Source(server.url)))
    output.flush()
    assert "@@" in output.buffer.getvalue().decode("ascii")


def test_a_server_that_goes_and_comes_back() -> None:
    with MonitoredServer(state(7)) as server:
        source = Source(server.url)
        assert "Twilight: m" in shown(source)
    gone = shown(source)
    assert f"waiting for {server.url}" in gone
    assert "refused" in gone
    with MonitoredServer(state(9), port=server.port):
        back = shown(source)
    assert "Twilight: m" in back
    assert "waiting for" not in back


# The command.


def test_once_json(capsys: pytest.CaptureFixture[str]) -> None:
    with MonitoredServer(state(2)) as server:
        assert main(["--once", "--json", "--url", server.url]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["total"]["kept_tokens"] == pytest.approx(KEPT)
    assert printed["kept_fraction"] == [[0.01, 0.011], [0.02, 0.021], [0.03, 0.031]]
    assert printed["audit"] == {"checks": 0, "violations": 0}


@pytest.mark.parametrize("what", [["--once"], ["--once", "--json"], ["--plot", "x.png"]])
def test_nobody_answers(what: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*what, "--url", NOWHERE]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"no answer from {NOWHERE}" in printed.err


def test_a_server_that_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with MonitoredServer({"last_gen_throughput": 1.0}) as server:
        assert main(["--once", "--url", server.url]) == 1
    assert "does not decode with Twilight" in capsys.readouterr().err


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "x"])
def test_intervals_that_make_no_sense(interval: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--interval", interval])
    assert ended.value.code == 2


def test_ctrl_c_ends_it_cleanly() -> None:
    command = [sys.executable, "-m", "twilight_sgl.monitor", "--json", "--interval", "0.1"]
    with MonitoredServer(state(2)) as server:
        process = subprocess.Popen(
            [*command, "--url", server.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["model"] == "m"
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
    assert process.returncode == 0
    assert complaints == b""


# The picture.


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with MonitoredServer(state(2)) as server:
        assert main(["--plot", str(tmp_path / "heads.png"), "--url", server.url]) == 0
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with MonitoredServer(state(2)) as server:
        assert main(["--plot", str(tmp_path / "heads.png"), "--url", server.url]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("/dev/full", "No space left on device"),
        ("/no/such/folder/heads.png", "No such file"),
        (".", "Is a directory"),
    ],
    ids=["full disk", "no folder", "a folder"],
)
def test_plot_that_cannot_be_written(
    file: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    with MonitoredServer(state(2)) as server:
        assert main(["--plot", file, "--url", server.url]) == 1
        assert [path.partition("?")[0] for path in server.requests] == ["/server_info", "/v1/loads"]
    assert f"--plot: cannot write {file}: {reason}" in capsys.readouterr().err


def test_plot_before_the_first_sparse_row(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    with MonitoredServer(state(0)) as server:
        assert main(["--plot", str(tmp_path / "heads.png"), "--url", server.url]) == 1
    assert "no row has been sparse yet" in capsys.readouterr().err
    assert not (tmp_path / "heads.png").exists()
