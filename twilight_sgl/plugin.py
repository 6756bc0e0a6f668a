"""SGLang's entry point to Twilight; imports nothing heavy until SGLang calls it."""

import logging
from typing import Any

BACKEND = "twilight"
SUPPORTED_SGLANG = ">=0.5.17,<0.5.24"

logger = logging.getLogger(__name__)

_failure: Exception | None = None


def register() -> None:
    """Install the patches, then the backend, in a process of SGLang's.

    SGLang only logs a plugin that raises. So a failure is kept, and a server that asks for the
    backend is refused with it before any weights load; the backend's name is registered last.
    """
    global _failure
    from twilight_sgl.patches import all_patches, install

    try:
        check_sglang_version()
        install(all_patches())
        _register_backend()
    except Exception as error:
        _failure = error
        _refuse_servers()
        raise


def failure() -> Exception | None:
    """Why the plugin could not be installed in this process, if it could not."""
    return _failure


def check_sglang_version() -> str:
    """The installed SGLang's version.

    Raises:
        TwilightError: it is outside the supported range.
    """
    from importlib.metadata import version

    from packaging.specifiers import SpecifierSet

    from twilight_sgl.errors import TwilightError

    installed = version("sglang")
    if not SpecifierSet(SUPPORTED_SGLANG).contains(installed, prereleases=True):
        raise TwilightError(
            f"sglang {installed} is outside the supported range {SUPPORTED_SGLANG}: "
            f"pip install 'sglang{SUPPORTED_SGLANG}'"
        )
    return installed


def _register_backend() -> None:
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    @register_attention_backend(BACKEND)
    def create(model_runner: Any) -> Any:
        from twilight_sgl.attention.backend import create_backend

        return create_backend(model_runner)

    if BACKEND not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([BACKEND])


def _refuse_servers() -> None:
    """Make a server that names the backend fail with the reason, not with 'invalid backend'."""
    from sglang.srt import server_args as arguments
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    arguments.add_attention_backend_choices([BACKEND])  # so that the flag gets that far

    def refuse(server_args: Any) -> None:
        if server_args.decode_attention_backend == BACKEND:
            raise RuntimeError(f"the Twilight plugin failed to load: {_failure}") from _failure

    HookRegistry.register(
        "sglang.srt.server_args.ServerArgs.check_server_args", refuse, HookType.BEFORE
    )
