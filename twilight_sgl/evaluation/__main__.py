"""`python -m twilight_sgl.evaluation TASK...` and `... report RUNS...`."""

import argparse
import sys
from collections.abc import Sequence

from twilight_sgl.evaluation import report, run

PROG = "python -m twilight_sgl.evaluation"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns a process exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["report"]:
        parser = argparse.ArgumentParser(prog=f"{PROG} report", description=report.__doc__)
        report.add_arguments(parser)
        return report.main(parser.parse_args(given[1:]))
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=run.__doc__,
        epilog=f"{PROG} report RUN... --out DIR puts runs side by side.",
    )
    run.add_arguments(parser)
    return run.main(parser.parse_args(given))


if __name__ == "__main__":
    sys.exit(main())
