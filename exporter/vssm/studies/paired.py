"""Two runs on the same images: how they differ, and whether by chance. Needs no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TWO_SIDED_95: Final = 1.959963984540054  # of the normal distribution


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
    # All runs saw the same images, so equal places are one image.
    both = [(a, b) for a, b in zip(hits, others, strict=True) if a != b]
    better = sum(a == "1" for a, _ in both)
    return Pair(key, against, better, len(both) - better, mcnemar(better, len(both) - better))


def mcnemar(better: int, worse: int) -> float:
    """Two-sided probability of the split under even odds; exact, in integers."""
    total, tail, term = better + worse, 0, 1
    for k in range(min(better, worse) + 1):
        tail += term
        term = term * (total - k) // (k + 1)
    # Of integers, which Python divides however large they are; as floats they would overflow.
    share: float = 2 * tail / 2**total
    # Twice the tail is more than 1 where the split is even.
    return min(1.0, share)


def join(pairs: Sequence[Pair], images: int) -> Paired:
    """Pairs over so many images each, as one comparison."""
    shares = [(pair.better - pair.worse) / images for pair in pairs]
    spread = statistics.stdev(shares) if len(shares) > 1 else None
    return Paired(statistics.fmean(shares), spread, tuple(pairs))


def paired_interval(better: int, worse: int, images: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares of the same images.

    Bonett and Price's adjusted Wald interval (2012), which keeps its level where few images differ,
    down to none.
    """
    up, down, total = better + 1, worse + 1, images + 2
    middle = (up - down) / total
    half = _TWO_SIDED_95 * math.sqrt(((up + down) / total - middle**2) / total)
    return max(-1.0, middle - half), min(1.0, middle + half)


def share_interval(correct: int, images: int) -> tuple[float, float]:
    """95 % interval of one share, Wilson's."""
    z, share = _TWO_SIDED_95, correct / images
    scale = 1 + z * z / images
    middle = (share + z * z / (2 * images)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / images + z * z / (4 * images**2))
    return middle - half, middle + half


def holm(chances: Sequence[float]) -> list[float]:
    """The p values of several comparisons, adjusted by Holm's step-down method."""
    order = sorted(range(len(chances)), key=lambda i: chances[i])
    adjusted, least = [0.0] * len(chances), 0.0
    for rank, i in enumerate(order):
        # Never below that of a smaller p.
        least = max(least, min(1.0, (len(chances) - rank) * chances[i]))
        adjusted[i] = least
    return adjusted


def probability(p: float) -> str:
    """A p as papers print it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def own_names(paths: Sequence[str]) -> list[str]:
    """The shortest end of each path that no other has; numbers where there is none."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-length:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    return [f"number {i + 1}" for i in range(len(paths))]
