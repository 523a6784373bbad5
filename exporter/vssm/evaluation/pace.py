"""The loop of an evaluation that goes image by image: what it has done, and how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from vssm.files.journal import JsonJournal
from vssm.types import Steps

Entry = TypeVar("Entry")
EVALUATING = "evaluating images"


@dataclass(frozen=True)
class Pace:
    """How an evaluation went.

    Attributes:
        resumed: images whose results an interrupted run before had left.
        seconds: spent on the others, loading included.
        images_per_s: over these seconds; None where nothing was left to do.
    """

    resumed: int
    seconds: float
    images_per_s: float | None


def take_all(
    entries: Iterable[Entry],
    journal: JsonJournal[Entry],
    images: int,
    add: Callable[[Entry], str],
    progress: Steps,
) -> Pace:
    """Put each entry into the journal, and then count it.

    Args:
        entries: of the images that the journal lacks, in order.
        journal: what is done; its entries are counted first.
        images: how many there are in all.
        add: counts an entry, and gives what is to be told so far.
        progress: called after every image.
    """
    for entry in journal.done:
        add(entry)
    resumed, start = len(journal.done), time.perf_counter()
    progress(EVALUATING, resumed, images)
    for entry in entries:
        # Before it is counted: what the journal holds is done, whatever happens next.
        journal.append(entry)
        progress(EVALUATING, len(journal.done), images, add(entry))
    seconds, new = time.perf_counter() - start, len(journal.done) - resumed
    return Pace(resumed, seconds, new / seconds if new else None)


def refuse_unreadable(unreadable: tuple[tuple[str, str], ...], images: int) -> None:
    """Refuse an evaluation of nothing.

    Raises:
        ValueError: all of the images are among those that cannot be read.
    """
    if len(unreadable) == images:
        raise ValueError(f"none of the {images} images can be read; the first: {unreadable[0][1]}")
