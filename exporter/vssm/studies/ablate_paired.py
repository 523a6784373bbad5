"""Two runs on the same images: how often one is right where the other is not."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """One run beside another on the same images.

    Attributes:
        run: key of the run.
        against: key of the other.
        better: images that it alone gets right.
        worse: images that the other alone gets right.
        p: exact two-sided McNemar test: the chance of so uneven a split of these images, or a
            more uneven one, if either run were as likely to get one right.
    """

    run: str
    against: str
    better: int
    worse: int
    p: float


@dataclass(frozen=True)
class Paired:
    """Several such pairs, one a seed.

    Attributes:
        difference: mean of the differences of top-1, as a share of the images.
        spread: their standard deviation; None for a single pair.
        pairs: the pairs.
    """

    difference: float
    spread: float | None
    pairs: tuple[Pair, ...]


def compare(run: tuple[str, str], other: tuple[str, str]) -> Pair:
    """Two runs, each its key and its hits, a "1" or "0" an image in the same order."""
    (key, hits), (against, others) = run, other
    both = [(a, b) for a, b in zip(hits, others, strict=True) if a != b]
    better = sum(a == "1" for a, _ in both)
    return Pair(key, against, better, len(both) - better, mcnemar(better, len(both) - better))


def mcnemar(better: int, worse: int) -> float:
    """Two-sided probability of the split under even odds; exact, in integers."""
    total, tail, term = better + worse, 0, 1
    for k in range(min(better, worse) + 1):
        tail += term
        term = term * (total - k) // (k + 1)
    share: float = 2 * tail / 2**total
    return min(1.0, share)


def join(pairs: Sequence[Pair], images: int) -> Paired:
    """Pairs over so many images each, as one comparison."""
    shares = [(pair.better - pair.worse) / images for pair in pairs]
    spread = statistics.stdev(shares) if len(shares) > 1 else None
    return Paired(statistics.fmean(shares), spread, tuple(pairs))
