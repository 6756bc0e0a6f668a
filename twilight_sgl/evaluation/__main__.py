"""`python -m twilight_sgl.evaluation TASK...`, `... sweep`, `report` and `export`."""

import argparse
import sys
from collections.abc import Sequence

from twilight_sgl.evaluation import export, report, run, sweep

COMMANDS = {"report": report, "export": export, "sweep": sweep}
PROG = "python -m twilight_sgl.evaluation"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns a process exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        command = COMMANDS[given[0]]
        parser = argparse.ArgumentParser(prog=f"{PROG} {given[0]}", description=command.__doc__)
        command.add_arguments(parser)
        return command.main(parser.parse_args(given[1:]))
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=run.__doc__,
        epilog=f"{PROG} sweep TASK... --out DIR starts servers and compares methods; "
        "report RUN... --out DIR puts runs side by side; export TASK... --out DIR writes tasks for "
        "lm-eval.",
    )
    run.add_arguments(parser)
    return run.main(parser.parse_args(given))


if __name__ == "__main__":
    sys.exit(main())
