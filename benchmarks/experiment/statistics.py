"""Means over seeds, and differences between variants of the same seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from scipy import stats

_CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Mean:
    """Of one variant over the seeds, in percent; `spread` is the standard deviation."""

    mean: float
    spread: float


@dataclass(frozen=True)
class Difference:
    """Of two variants, seed by seed, in points.

    Attributes:
        mean: over the seeds.
        error: standard error of the mean.
        low, high: 95 % confidence interval by Student's t, seeds - 1 degrees of freedom.
    """

    mean: float
    error: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """Whether zero lies outside of the interval; equal differences leave no interval."""
        return self.error > 0 and (self.low > 0 or self.high < 0)


def mean(values: Sequence[float]) -> Mean:
    """Over seeds; two at least."""
    return Mean(statistics.fmean(values), statistics.stdev(values))


def paired(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """`values` minus `baseline`, one of each a seed."""
    each = [a - b for a, b in zip(values, baseline, strict=True)]
    middle, error = statistics.fmean(each), statistics.stdev(each) / math.sqrt(len(each))
    reach = error * float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(each) - 1))
    return Difference(middle, error, middle - reach, middle + reach)
