"""What an ablation has done so far: for every batch, which runs got which images right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vssm.files.journal import JsonJournal


@dataclass(frozen=True)
class Step:
    """One batch through every run.

    Attributes:
        unreadable: files that are no readable images: path and error.
        hits: by run, a "1" for every readable image whose class came first, else a "0".
        seconds: by run; nothing where no image could be read.
        first: whether it was the first batch of its call, in which runs warm up.
    """

    unreadable: tuple[tuple[str, str], ...]
    hits: Mapping[str, str]
    seconds: Mapping[str, float]
    first: bool


class AblationJournal(JsonJournal[Step]):
    """The journal of one ablation, a step a batch."""

    what = "ablation"
    option = "-o"

    @staticmethod
    def to_json(entry: Step) -> Any:
        """A step as an object."""
        return asdict(entry)

    @staticmethod
    def from_json(document: Any) -> Step:
        """A step again."""
        unreadable = tuple((path, error) for path, error in document["unreadable"])
        return Step(unreadable, document["hits"], document["seconds"], document["first"])
