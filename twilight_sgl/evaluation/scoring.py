"""Scores as RULER publishes them, and how sure one can be of their means.

Copied into exported tasks, so it imports nothing of this package.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_Z = 1.959964  # of the normal distribution, for 95 %
_RESAMPLES = 2000
_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Mean:
    """A mean score in [0, 1], its 95 % interval, and how many samples it is of."""

    value: float
    low: float
    high: float
    samples: int


def recall(output: str, references: Sequence[str]) -> float:
    """Share of references that the output contains, whatever their case, in [0, 1].

    RULER's `string_match_all` (Hsieh et al., arXiv 2404.06654, section 4), without its factor of
    a hundred.
    """
    text = output.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def process_results(sample: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, float]:
    """The score of an exported sample, as lm-eval asks for it."""
    return {"recall": recall(outputs[0], sample["references"])}


def agreeing_tokens(output: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first in which two outputs differ, or before one of them ends."""
    pairs = zip(output, other, strict=False)
    return next(
        (place for place, (a, b) in enumerate(pairs) if a != b), min(map(len, (output, other)))
    )


def mean(scores: Sequence[float]) -> Mean:
    """The mean of at least one score, with its 95 % confidence interval.

    Wilson's score interval (JASA 22, 1927) where every score is 0 or 1, so that an interval has a
    width where all samples pass; else `bootstrap_mean`.
    """
    values = np.asarray(scores, dtype=np.float64)
    average, count = float(values.mean()), len(values)
    if np.isin(values, (0.0, 1.0)).all():
        scale = 1 + _Z**2 / count
        middle = (average + _Z**2 / (2 * count)) / scale
        half = _Z * math.sqrt(average * (1 - average) / count + (_Z / (2 * count)) ** 2) / scale
        # Rounding must not put an end below 0, above 1, or on the wrong side of the mean.
        low, high = min(max(middle - half, 0.0), average), max(min(middle + half, 1.0), average)
        return Mean(average, low, high, count)
    return bootstrap_mean(scores)


def bootstrap_mean(figures: Sequence[float]) -> Mean:
    """The mean of at least one figure, with its 95 % confidence interval.

    By the percentile bootstrap (Efron, 1979), always with the same resamples.
    """
    values = np.asarray(figures, dtype=np.float64)
    average, count = float(values.mean()), len(values)
    rng = np.random.default_rng(0)
    means = [float(rng.choice(values, count).mean()) for _ in range(_RESAMPLES)]
    low, high = (float(point) for point in np.percentile(means, _PERCENTILES))
    return Mean(average, min(low, average), max(high, average), count)
