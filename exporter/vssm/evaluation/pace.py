"""The loop of an evaluation: what it has done, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from vssm.files.journal import JsonJournal
from vssm.types import Steps

Entry = TypeVar("Entry")
_PHASE: Final = "evaluating images"


@dataclass(frozen=True)
class Pace:
    """How an evaluation went.

    Attributes:
        images: in all.
        resumed: of these, the ones whose results an interrupted run before had left.
        seconds: spent on the others, loading included.
    """

    images: int
    resumed: int
    seconds: float

    @property
    def images_per_s(self) -> float | None:
        """Over these seconds; None where nothing was left to do."""
        new = self.images - self.resumed
        return new / self.seconds if new else None


def take_all(
    entries: Iterable[Entry],
    journal: JsonJournal[Entry],
    images: int,
    add: Callable[[Entry], str],
    progress: Steps,
    *,
    size: Callable[[Entry], int] = lambda _: 1,
) -> Pace:
    """Put each entry into the journal, and then count it.

    Args:
        entries: of the images that the journal lacks, in order.
        journal: what is done; its entries are counted first.
        images: how many there are in all.
        add: counts an entry, and gives what is to be told so far.
        progress: called after every entry.
        size: images of an entry.
    """
    for entry in journal.done:
        add(entry)
    done = resumed = sum(map(size, journal.done))
    start = time.perf_counter()
    progress(_PHASE, done, images)
    for entry in entries:
        # Before it is counted: what the journal holds is done, whatever happens next.
        journal.append(entry)
        done += size(entry)
        progress(_PHASE, done, images, add(entry))
    return Pace(images, resumed, time.perf_counter() - start)


def refuse_unreadable(unreadable: Sequence[tuple[str, str]], images: int) -> None:
    """Refuse an evaluation of nothing.

    Raises:
        ValueError: all of the images are among those that cannot be read.
    """
    if len(unreadable) == images:
        raise ValueError(f"none of the {images} images can be read; the first: {unreadable[0][1]}")
