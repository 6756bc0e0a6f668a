"""`python -m twilight_sgl.launch_server`: SGLang's server, decoding with Twilight."""

import argparse
import os
import sys
from pathlib import Path

from twilight_sgl.errors import TwilightError
from twilight_sgl.plugin import BACKEND


def main(argv: list[str] | None = None) -> int:
    """Start SGLang's server with Twilight's defaults; returns the exit code.

    Takes every flag of SGLang's server and the `--twilight-*` group. Without `--model-path` it
    serves the embedded model.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not {"-h", "--help"} & set(argv):
            argv = with_defaults(argv)
        return _run(argv)
    except TwilightError as error:
        print(f"twilight_sgl.launch_server: error: {error}", file=sys.stderr)
        return 2


def with_defaults(argv: list[str]) -> list[str]:
    """Add what the user left out: the decode backend and a model.

    A key in a `--config` file counts as given.

    Raises:
        TwilightError: there is no model to serve.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--decode-attention-backend")
    parser.add_argument("--config")
    given, _ = parser.parse_known_args(argv)
    keys = _config_keys(given.config)
    if given.decode_attention_backend is None and "decode-attention-backend" not in keys:
        argv += ["--decode-attention-backend", BACKEND]
    if given.model_path is None and not keys & {"model-path", "model"}:
        from twilight_sgl.embedded_model import ensure_embedded_model

        argv += ["--model-path", str(ensure_embedded_model())]
    return argv


def _config_keys(path: str | None) -> set[str]:
    if path is None:
        return set()
    from twilight_sgl.config import read_file

    return {str(key).replace("_", "-") for key in read_file(Path(path), "--config")}


def _run(argv: list[str]) -> int:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    _check_plugin()

    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    server_args = prepare_server_args(argv)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0


def _check_plugin() -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from twilight_sgl import plugin

    if plugin.failure() is not None:
        raise TwilightError(f"the plugin could not be installed: {plugin.failure()}")
    if BACKEND not in ATTENTION_BACKENDS:
        raise TwilightError(
            "SGLang did not load the plugin: install the package (pip install -e .) so that its "
            "entry points are found, and keep 'twilight' in SGLANG_PLUGINS if that is set"
        )


if __name__ == "__main__":
    sys.exit(main())
