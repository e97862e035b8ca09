"""Intervals by bootstrap over the units that were drawn: windows of text, or documents of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
RESAMPLES = 2000


@dataclass(frozen=True)
class Measured:
    """A figure with its 95 % interval and the number of independent units behind it."""

    value: float
    low: float
    high: float
    samples: int

    def as_dict(self) -> dict[str, float | int]:
        """As written to ``results.json``."""
        return asdict(self)


def mean_interval(values: np.ndarray, *, transform: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Measured:
    """The mean of independent units, after ``transform`` (``np.exp`` for perplexity), with a percentile bootstrap interval.

    Args:
        values: One per unit, [S].
        transform: Monotone; applied to the mean.
    """
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(values), size=(RESAMPLES, len(values)))
    means = transform(values[draws].mean(axis=1))
    low, high = np.quantile(means, [0.025, 0.975])
    return Measured(float(transform(values.mean())), float(low), float(high), len(values))


def paired_interval(before: np.ndarray, after: np.ndarray) -> Measured:
    """The mean difference after − before over the same units, [S] each; an interval around zero is no measurable change."""
    return mean_interval(after - before)


def mean_of(figures: Sequence[Measured]) -> Measured:
    """The mean of independent figures, each counting the same; half the width of its interval is that of a sum of theirs."""
    value = sum(figure.value for figure in figures) / len(figures)
    half = np.sqrt(sum((figure.high - figure.low) ** 2 for figure in figures)) / 2 / len(figures)
    return Measured(value, float(value - half), float(value + half), sum(figure.samples for figure in figures))


def wilson_interval(correct: np.ndarray) -> Measured:
    """An accuracy with its Wilson score interval; ``correct`` is 0 or 1 per document, [S]."""
    count, share, z = len(correct), float(correct.mean()), 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Measured(share, float(max(middle - half, 0)), float(min(middle + half, 1)), count)
