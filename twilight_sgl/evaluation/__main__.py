"""`python -m twilight_sgl.evaluation TASK...` and `... report RUNS...`."""

import argparse
import sys
from collections.abc import Sequence

from twilight_sgl.evaluation import run

PROG = "python -m twilight_sgl.evaluation"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns a process exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog=PROG, description=run.__doc__)
    run.add_arguments(parser)
    return run.main(parser.parse_args(given))


if __name__ == "__main__":
    sys.exit(main())
