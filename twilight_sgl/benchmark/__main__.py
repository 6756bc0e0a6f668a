"""`python -m twilight_sgl.benchmark COMMAND`."""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m twilight_sgl.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    from twilight_sgl.benchmark import kernels

    command = commands.add_parser("kernels", help=kernels.__doc__)
    kernels.add_arguments(command)
    command.set_defaults(main=kernels.main)
    args = parser.parse_args()
    return args.main(args)


if __name__ == "__main__":
    sys.exit(main())
