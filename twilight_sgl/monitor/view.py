"""The monitor's screen."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from twilight_sgl.monitor.figures import Budget, Figures

BARS, ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
COLOURS = ("grey50", "blue", "cyan", "green", "yellow", "orange1", "red")
LABEL_WIDTH = 8


class HeatMap:
    """KV heads down, layers across, in as many bands as the width asks for.

    A cell's height and colour both show its value, so it reads without colours too.

    Args:
        values: [L][HK], from 0.
        layer_ids: L.
    """

    def __init__(self, values: Sequence[Sequence[float]], layer_ids: Sequence[int]) -> None:
        self._values, self._layer_ids = values, layer_ids
        self._most = max(max(row) for row in values)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        bars = ASCII_BARS if options.ascii_only else BARS
        room = max(options.max_width - LABEL_WIDTH, 1)
        cell = 2 if 2 * len(self._layer_ids) <= room else 1
        per_band = room // cell
        for start in range(0, len(self._layer_ids), per_band):
            ids = self._layer_ids[start : start + per_band]
            values = self._values[start : start + per_band]
            axis = f"{ids[0]}".ljust(cell * len(ids))
            end = str(ids[-1])
            axis = axis[: -len(end)] + end if len(axis) > len(end) else axis
            yield Text("layer".ljust(LABEL_WIDTH) + axis, style="dim", no_wrap=True)
            for head in range(len(values[0])):
                line = Text(f"head {head}".ljust(LABEL_WIDTH), no_wrap=True)
                for row in values:
                    level = row[head] / self._most if self._most else 0.0
                    bar = bars[round(level * (len(bars) - 1))]
                    colour = COLOURS[round(level * (len(COLOURS) - 1))]
                    line.append(bar * cell, style=colour)
                yield line
        yield Text(f"highest: {self._most:.1%} of the context", style="dim")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _budget_row(name: str, budget: Budget | None) -> list[str]:
    if budget is None:
        return [name, *["-"] * 6]
    return [
        name,
        f"{budget.rows:,}",
        _number(budget.context_tokens),
        _number(budget.candidate_tokens),
        _number(budget.kept_tokens),
        f"{budget.kept_fraction:.1%}",
        f"{budget.kept_mass:.3f}",
    ]


def _audit(figures: Figures) -> Text:
    checks, violations = figures.audit["checks"], figures.audit["violations"]
    if violations:
        return Text(f"{violations:,} violations in {checks:,} audits", style="bold red")
    if not checks and not figures.audit_interval:
        return Text("off (--twilight-audit-interval)", style="dim")
    return Text(f"{checks:,} audits, no violation", style="green")


def screen(figures: Figures, url: str) -> Panel:
    """All figures as one panel; fits 80 columns."""
    requests = Text(
        f"{_number(figures.tokens_per_second)} tokens/s   "
        f"{'-' if figures.running is None else figures.running} running   "
        f"{'-' if figures.waiting is None else figures.waiting} waiting   "
        f"p = {figures.p:g}, {figures.selector}"
    )
    budget = Table(box=None, padding=(0, 1, 0, 0), expand=True)
    budget.add_column("budget", no_wrap=True)
    for heading in ("rows", "context", "B0", "B1", "kept", "mass"):
        budget.add_column(heading, justify="right", no_wrap=True)
    budget.add_row(*_budget_row("now", figures.now))
    budget.add_row(*_budget_row("since start", figures.total))

    pages, steps = figures.pages, figures.steps
    known = Table.grid(padding=(0, 2))
    known.add_column(style="bold", no_wrap=True)
    known.add_column()
    known.add_row("steps", f"{steps['decode']:,} decode, {steps['dense']:,} of them dense")
    known.add_row(
        "pages",
        f"{pages['sealed']:,} sealed of {pages['capacity']:,}; {pages['built']:,} summaries built "
        f"in {pages['sealing_seconds']:.2f} s",
    )
    known.add_row("reuse", f"{pages['reused']:,} prefix pages found sealed")
    known.add_row("audit", _audit(figures))
    parts: list[RenderableType] = [requests, Text(), budget, Text(), known]
    if figures.kept_fraction is not None:
        title = Text("kept fraction by layer and KV head, since start", style="bold")
        parts += [Text(), title, HeatMap(figures.kept_fraction, figures.layer_ids)]
    else:
        parts += [Text(), Text("no row has been sparse yet", style="dim")]
    return Panel(Group(*parts), title=f"Twilight: {figures.model}", subtitle=url)


def waiting(url: str, reason: str) -> Panel:
    """What is shown while no server answers."""
    text = Text.assemble((f"waiting for {url}", "bold yellow"), "\n", (reason, "dim"))
    return Panel(text, title="Twilight")
