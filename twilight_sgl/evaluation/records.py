"""Files of results: JSON lines, of which the first says what was run and how."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twilight_sgl.errors import TwilightError

Key = tuple[str, int, int, int]
TEXT = "perplexity_text"  # of settings: SHA-256 of the file, None without that task


@dataclass
class Run:
    """What one file holds.

    Attributes:
        settings: what all its samples have in common, with `method`, `dense` and `model`.
        samples: by (task, context, seed, index).
        budgets: one of each pass over a task and context on a server that reports them.
    """

    settings: dict[str, Any]
    samples: dict[Key, dict[str, Any]] = field(default_factory=dict)
    budgets: list[dict[str, Any]] = field(default_factory=list)


def key_of(sample: Mapping[str, Any]) -> Key:
    return sample["task"], sample["context"], sample["seed"], sample["index"]


def read_run(path: Path) -> Run:
    """Read a file of results; a last line that was cut short does not count.

    Raises:
        TwilightError: it cannot be read, or is no such file.
    """
    try:
        lines = list(_read_lines(path))
    except (OSError, UnicodeDecodeError) as error:
        raise TwilightError(f"{path} cannot be read: {error}") from error
    if not lines or "settings" not in lines[0]:
        raise TwilightError(
            f"{path} is no file of results: pass one that `python -m twilight_sgl.evaluation "
            "TASK... --json` wrote"
        )
    run = Run(lines[0]["settings"])
    for line in lines[1:]:
        if "budget" in line:
            run.budgets.append(line)
        else:
            run.samples[key_of(line)] = line
    return run


class Writer:
    """Appends to a file of results, which it begins or, if its settings are these, goes on with.

    Raises:
        TwilightError: the file has other settings, or cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        try:
            begun = path.exists() and path.stat().st_size > 0
            self.run = read_run(path) if begun else Run(settings)
            if different := sorted(
                name
                for name in {*settings, *self.run.settings}
                if settings.get(name) != self.run.settings.get(name)
            ):
                shown = "; ".join(
                    f"{name} {self.run.settings.get(name)!r}, now {settings.get(name)!r}"
                    for name in different
                )
                raise TwilightError(
                    f"--json {path} was written with other settings ({shown}): pass another file"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            if begun:
                _cut_short_line(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise TwilightError(f"--json {path} cannot be written: {error}") from error
        if not begun:
            self._write({"settings": settings})

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add_sample(self, sample: dict[str, Any]) -> None:
        self.run.samples[key_of(sample)] = sample
        self._write(sample)

    def add_budget(self, budget: dict[str, Any]) -> None:
        self.run.budgets.append(budget)
        self._write(budget)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n"):
                return
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise TwilightError(f"{path} is no file of JSON lines: {error}") from error
            if not isinstance(value, dict):
                raise TwilightError(f"{path} is no file of JSON lines: {line[:80]!r}")
            yield value


def _cut_short_line(path: Path) -> None:
    """Remove what a run that was killed left of its last line."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
