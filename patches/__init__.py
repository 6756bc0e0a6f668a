"""Every place where SGLang is touched, one module each.

A patch module holds `PATCHES`: its hooks, with the target's dotted path and why it is needed.
`install` registers them through SGLang's own hook registry and fails unless every target was
there, had the parameters the hook relies on, and was patched.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from twilight_sgl.errors import TwilightError

MODULES = (
    "server_args",
    "speculative",
    "pinned_backends",
    "sampling_params",
    "pool_size",
    "page_release",
    "request_slots",
    "decode_slots",
    "forward_order",
    "mixed_steps",
    "graph_variants",
    "compile_ahead",
    "server_info",
    "meta_info",
    "openai_report",
    "telemetry",
)


class PatchError(TwilightError):
    """SGLang is not as a patch expects it."""


@dataclass(frozen=True)
class Patch:
    """One hook.

    Attributes:
        target: dotted path of the function or method.
        when: `before`, `after` or `around`.
        hook: as SGLang's `HookType` of that name wants it.
        why: what would break without it.
        parameters: names the target's signature must have, in this order and position.
    """

    target: str
    when: str
    hook: Callable[..., Any]
    why: str
    parameters: tuple[str, ...]

    def check(self) -> None:
        """Check the contract against the SGLang that is installed.

        Raises:
            PatchError: the target is gone or its parameters changed.
        """
        try:
            target = pkgutil.resolve_name(self.target)
        except (ImportError, AttributeError) as error:
            raise PatchError(f"{self.target} is not in this SGLang: {error}") from error
        found = tuple(inspect.signature(target).parameters)
        if found[: len(self.parameters)] != self.parameters:
            raise PatchError(
                f"{self.target} takes {list(found)} in this SGLang; "
                f"the patch expects it to begin with {list(self.parameters)}"
            )


def all_patches() -> list[Patch]:
    """The patches of every module."""
    patches = []
    for name in MODULES:
        patches += importlib.import_module(f"{__name__}.{name}").PATCHES
    return patches


def install(patches: Iterable[Patch]) -> None:
    """Check and apply patches.

    Raises:
        PatchError: a contract does not hold, or SGLang did not apply a hook.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    patches = list(patches)
    for patch in patches:
        patch.check()
        if patch.target in HookRegistry._patched:
            raise PatchError(
                f"another plugin has patched {patch.target} already; "
                "set SGLANG_PLUGINS=twilight,twilight_cpu to load Twilight alone"
            )
    for patch in patches:
        HookRegistry.register(patch.target, patch.hook, HookType(patch.when))
    HookRegistry.apply_hooks()
    missed = [patch.target for patch in patches if patch.target not in HookRegistry._patched]
    if missed:
        raise PatchError(f"SGLang did not apply the hooks on {', '.join(missed)}; see its log")
