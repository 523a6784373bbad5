"""What an evaluation has done so far: the rows of every batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from vssm.files.journal import JsonJournal


@dataclass(frozen=True)
class ImageResult:
    """The result for one image.

    Attributes:
        top: the best classes, best first; empty where the image could not be read.
        best: softmax probability of the first of them.
        target: that of the image's own class.
        error: why the image could not be read.
    """

    top: tuple[int, ...] = ()
    best: float = 0.0
    target: float = 0.0
    error: str | None = None


class Journal(JsonJournal[Sequence[ImageResult]]):
    """The journal of one evaluation, a list of rows a batch."""

    what = "evaluation"
    option = "--results"

    @staticmethod
    def to_json(entry: Sequence[ImageResult]) -> Any:
        """Rows as lists."""
        # By position: field names in each of 50,000 rows would say nothing new.
        return [astuple(row) for row in entry]

    @staticmethod
    def from_json(document: Any) -> Sequence[ImageResult]:
        """Rows again."""
        return [_row(entry) for entry in document]


def _row(entry: Any) -> ImageResult:
    top, best, target, error = entry
    # JSON gives lists back; a tuple again, so that resumed rows equal those of an unbroken run.
    return ImageResult(tuple(top), best, target, error)
