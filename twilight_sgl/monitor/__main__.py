"""`python -m twilight_sgl.monitor`: watch a server from a terminal."""

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from twilight_sgl.errors import TwilightError
from twilight_sgl.monitor.figures import Source
from twilight_sgl.monitor.view import screen, waiting

DESCRIPTION = "Shows what a running Twilight server keeps. Ctrl-C ends it; the server goes on."


def main(argv: list[str] | None = None) -> int:
    """Show a server's figures; returns the exit code, 1 if there are none to show."""
    arguments = _parser().parse_args(argv)
    source = Source(arguments.url, arguments.api_key)
    try:
        if arguments.plot is not None:
            from twilight_sgl.monitor.plot import plot

            plot(source.read(), arguments.plot)
            print(f"wrote {arguments.plot}")
        elif arguments.once:
            _show_once(source, arguments.json)
        elif arguments.json:
            _stream(source, arguments.interval)
        else:
            _watch(source, arguments.interval, Console())
    except TwilightError as error:
        print(f"twilight_sgl.monitor: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # as in `--json | head`
        sys.stdout = None  # or Python complains when it flushes it at exit
    except KeyboardInterrupt:
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m twilight_sgl.monitor", description=DESCRIPTION)
    parser.add_argument(
        "--url", default="http://127.0.0.1:30000", help="the server (default: %(default)s)"
    )
    parser.add_argument("--api-key", help="the server's --api-key, if it has one")
    parser.add_argument(
        "--interval",
        type=_seconds,
        default=2.0,
        help="seconds between refreshes; each makes the server read its counters once "
        "(default: %(default)s)",
    )
    parser.add_argument("--once", action="store_true", help="show the figures once and end")
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object, a line each refresh, for scripts"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="write heat maps by layer and KV head as PNG, and end (needs matplotlib)",
    )
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.1 and 3600 seconds")
    return value


def _show_once(source: Source, as_json: bool) -> None:
    figures = source.read()
    if as_json:
        print(json.dumps(figures.to_dict()))
    else:
        Console().print(screen(figures, source.url))


def _stream(source: Source, interval: float) -> None:
    """A line for each refresh; says once when the server is gone, and goes on when it is back."""
    gone = False
    while True:
        try:
            print(json.dumps(source.read().to_dict()), flush=True)
            gone = False
        except TwilightError as error:
            if not gone:
                print(f"waiting for {source.url}: {error}", file=sys.stderr, flush=True)
            gone = True
        time.sleep(interval)


def refreshed(source: Source) -> RenderableType:
    """The screen now: figures, or that the server is waited for."""
    try:
        return screen(source.read(), source.url)
    except TwilightError as error:
        return waiting(source.url, str(error))


def _watch(source: Source, interval: float, console: Console) -> None:
    with Live(refreshed(source), console=console, auto_refresh=False, screen=False) as live:
        while True:
            time.sleep(interval)
            live.update(refreshed(source), refresh=True)


if __name__ == "__main__":
    sys.exit(main())
