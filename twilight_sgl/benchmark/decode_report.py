"""Files of the decode benchmark, written load by load: a run cut short leaves its figures."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twilight_sgl.benchmark.decode_figures import Measured, build_rows, format_table, plot
from twilight_sgl.benchmark.files import write_json
from twilight_sgl.benchmark.floor import Model, add_floors

TABLE, ROWS, PICTURE = "decode.md", "decode.json", "decode.png"


@dataclass(frozen=True)
class Report:
    """What a run's files say beside what was measured.

    Attributes:
        out: the folder they are written to.
        names: of the backends, in the order of the rows; the first is what others are compared to.
        output_tokens: of a request.
        intervals: tokens a chunk, by load.
        model, bandwidth: see `add_floors`.
        about: of the run and its machine, in each row.
    """

    out: Path
    names: Sequence[str]
    output_tokens: int
    intervals: Mapping[str, int]
    model: Model | None
    bandwidth: float | None
    about: Mapping[str, Any]

    def clear(self) -> None:
        """Remove the files of an earlier run, which would pass for those of this one."""
        logs = [f"{name}.log" for name in self.names]
        for folder in (self.out, *self.out.glob("start-*")):
            for name in (ROWS, TABLE, PICTURE, *logs):
                (folder / name).unlink(missing_ok=True)

    def save(
        self,
        results: Sequence[Measured],
        flags: Mapping[str, Sequence[str]],
        *,
        complete: bool = False,
    ) -> list[dict[str, Any]]:
        """Write the rows and the table of what there is.

        Args:
            results: passes that are done, whatever the backend; of a run cut short a load may have
                more of one backend than of another, and its ratio is then of those.
            flags: of the servers that were started, by backend.
            complete: this is all of the run; else every row says that it is not.
        Returns:
            The rows; none, and no files, where the first backend was asked nothing yet.
        Raises:
            MeasurementError: see `steady_phase`.
        """
        results = sorted(results, key=lambda result: self.names.index(result.backend))
        rows = [
            {
                **row,
                "stream_interval": self.intervals[row["load"]],
                "server_flags": list(flags[row["backend"]]),
                "complete": complete,
                **self.about,
            }
            for row in build_rows(results, self.names[0], self.output_tokens)
        ]
        add_floors(rows, self.model, self.bandwidth)
        if rows:
            write_json(self.out / ROWS, rows)
            (self.out / TABLE).write_text(format_table(rows))
        return rows

    def finish(self, results: Sequence[Measured], flags: Mapping[str, Sequence[str]]) -> None:
        """Write all files and print the table."""
        rows = self.save(results, flags, complete=True)
        machine = self.about["gpu"] or self.about["cpu"]
        print(f"{self.about['model']}, {machine}\n\n{format_table(rows)}")
        written = [ROWS, TABLE]
        try:
            plot(rows, self.out / PICTURE)
            written.append(PICTURE)
        except Exception as failure:  # the figures are saved; a plotting library may be broken
            print(f"no plot: {type(failure).__name__}: {failure}", file=sys.stderr)
        print(f"wrote {', '.join(str(self.out / name) for name in written)}", file=sys.stderr)
