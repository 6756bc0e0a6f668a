"""The seal invariant, checked: every sealed page's summary equals the one recomputed from K now."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from twilight_sgl.pages.pool import SummaryPool

PAGES_PER_CHUNK = 1024


@dataclass(frozen=True)
class Violation:
    """A sealed page whose summary is not that of its keys.

    Attributes:
        page_id: physical page.
        layer_id: layer of the model.
        fields: which of `min_max`, `codes` and `scale_zero`, of those that are kept, differ.
    """

    page_id: int
    layer_id: int
    fields: tuple[str, ...]


def audit(pool: SummaryPool, keys_of: Callable[[int], torch.Tensor]) -> list[Violation]:
    """Recompute the summary of every sealed page and compare it bit by bit.

    Synchronises with the device. Run it between steps, after `Ledger.apply`.

    Args:
        keys_of: one layer's keys by page, [P, PS, HK, D], for a layer id.
    """
    violations = []
    pages = pool.sealed.nonzero().squeeze(1)
    for layer_id in pool.layer_ids:
        stored = pool.fields_of_layer(layer_id)
        keys = keys_of(layer_id)
        for chunk in pages.split(PAGES_PER_CHUNK):
            fresh = pool.summarize(keys[chunk])
            differs = torch.stack(
                [_rows_differ(old[chunk], fresh[name]) for name, old in stored.items()]
            )
            for index in differs.any(0).nonzero().squeeze(1).tolist():
                wrong = tuple(n for n, bad in zip(stored, differs[:, index], strict=True) if bad)
                violations.append(Violation(int(chunk[index]), layer_id, wrong))
    return violations


def _rows_differ(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Which rows of [M, ...] tensors differ in any bit: [M] bool."""
    as_bytes = [t.contiguous().flatten(1).view(torch.uint8) for t in (old, new)]
    return (as_bytes[0] != as_bytes[1]).any(1)
