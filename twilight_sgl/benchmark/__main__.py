"""`python -m twilight_sgl.benchmark COMMAND`."""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m twilight_sgl.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    from twilight_sgl.benchmark import decode, kernels, record, soak

    modules = {"kernels": kernels, "decode": decode, "record": record, "soak": soak}
    for name, module in modules.items():
        command = commands.add_parser(name, help=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    args = parser.parse_args()
    return args.main(args)


if __name__ == "__main__":
    sys.exit(main())
