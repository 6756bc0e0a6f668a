"""Selectors by name: each scores the pages of a request for every KV head.

A selector is a function `(q, cache, page_ids) -> scores`: `q` is [B, HQ, D], `cache` a
`LayerCache`, `page_ids` [B, T] int32, the result [B, HK, T] float32, larger being better. It is
read for full pages only. Register one with `register` before the server starts.
"""

from collections.abc import Callable
from typing import Any

_SELECTORS: dict[str, str | Callable[..., Any]] = {
    "quest": "twilight_sgl.attention.selectors.boxes:quest",
    "half_bound": "twilight_sgl.attention.selectors.boxes:half_bound",
}


def names() -> list[str]:
    """The selectors there are."""
    return sorted(_SELECTORS)


def register(name: str, score: Callable[..., Any]) -> None:
    """Add a selector.

    Raises:
        ValueError: the name is taken.
    """
    if name in _SELECTORS:
        raise ValueError(f"a selector named {name!r} exists already")
    _SELECTORS[name] = score


def get(name: str) -> Callable[..., Any]:
    """The scoring function of a selector; KeyError when there is none of that name."""
    selector = _SELECTORS[name]
    if isinstance(selector, str):
        import pkgutil

        return pkgutil.resolve_name(selector)
    return selector
