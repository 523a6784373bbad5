"""The questions of the experiment, as differences between two variants of the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from benchmarks.experiment.cases import DENSE, Case
from benchmarks.experiment.rows import TUNED, ZERO_SHOT, Seeds, label, top1
from benchmarks.experiment.statistics import Difference, paired

# What the plot shows.
MAIN: Final = (
    "alignment",
    "alignment, convolution on the grid",
    "convolution on the grid, plain removal",
    "score clip against places at random",
)
# What is asked, and the variants whose difference answers.
_QUESTIONS: Final = (
    ("alignment", "gap", "none"),
    ("alignment, constant", "constant", "none"),
    ("alignment, convolution on the grid", "gap+grid", "none+grid"),
    ("alignment, constant, convolution on the grid", "constant+grid", "none+grid"),
    ("convolution on the grid, plain removal", "none+grid", "none"),
    ("convolution on the grid, aligned", "gap+grid", "gap"),
    ("input held beside alignment", "held", "gap"),
    ("input held, convolution on the grid", "held+grid", "gap+grid"),
    ("masked against aligned on the grid", "masked", "gap+grid"),
    ("score clip against places at random", "gap", "random"),
)


@dataclass(frozen=True)
class Contrast:
    """An answer: `first` less `second`, in points, where and with which labels."""

    table: str
    question: str
    first: str
    second: str
    difference: Difference


def make_contrasts(case: Case, seeds: Seeds) -> list[Contrast]:
    """All that the case's variants can answer, zero-shot and trained further."""
    found = []

    def add(table: str, question: str, first: list[float], second: list[float], *keys: str) -> None:
        names = (label(keys[0]), label(keys[1]))
        found.append(Contrast(table, question, *names, paired(first, second)))

    keys = {*seeds[0]["right"][DENSE], "random"}
    for question, a, b in _QUESTIONS:
        if {a, b} <= keys:
            add(ZERO_SHOT, question, top1(seeds, DENSE, a), top1(seeds, DENSE, b), a, b)
    for question, a, b in _QUESTIONS:
        if {a, b.replace("random", "random-0")} <= set(case.tuned):
            b_key = b.replace("random", "random-0")
            add(TUNED, question, top1(seeds, a, a), top1(seeds, b_key, b_key), a, b_key)
    return found
