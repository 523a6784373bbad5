"""From right answers by seed to rows: accuracies, and differences to plain removal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.experiment.cases import DENSE, FURTHER, Case
from benchmarks.experiment.statistics import Difference, Mean, mean, paired

PLAIN: Final = "none"
ZERO_SHOT, TUNED, SWEEP = "zero-shot", "fine-tuned", "keep ratio, zero-shot"
LABELS: Final = {
    "dense": "dense",
    "further": "dense, trained further",
    "evit": "EViT-style, one fused leftover",
    "none": "plain removal",
    "gap": "aligned (gap)",
    "constant": "aligned (constant)",
    "masked": "masked",
    "held": "aligned (gap), input held",
    "sum": "aligned (gap), score sum",
    "l1": "aligned (gap), score l1",
    "l2": "aligned (gap), score l2",
    "random": "aligned (gap), places at random",
}
# How weights are trained, and what they are then deployed as.
_DEPLOYED_OTHERWISE: Final = (
    *(("masked", key) for key in ("gap", "none+grid", "gap+grid")),
    *(("none", "gap"), ("gap", "none")),
)
Seeds = Sequence[dict[str, Any]]  # what work.read gives for each seed


@dataclass(frozen=True)
class Row:
    """One variant of one case.

    Attributes:
        table: which part it stands in.
        key: of the variant that is deployed.
        label: for people.
        trained: key of the weights.
        top1: percent of the held-out images, over the seeds.
        to_plain: less that of plain removal, by seed; None where that says nothing.
        flops: multiply-adds of an image: published, unaligned, true.
    """

    table: str
    key: str
    label: str
    trained: str
    top1: Mean
    to_plain: Difference | None
    flops: dict[str, int]


def top1(seeds: Seeds, trained: str, key: str) -> list[float]:
    """Percent by seed; "random" is the mean of the draws that are there."""
    found = []
    for seed in seeds:
        right = seed["right"][trained]
        draws = [right[k] for k in right if k == key or (key == "random" and k[:7] == "random-")]
        found.append(100 * statistics.fmean(draws) / seed["images"])
    return found


def make_rows(case: Case, seeds: Seeds, costs: dict[str, dict[str, int]]) -> list[Row]:
    """All rows of a case, in the tables' order."""
    found = []

    def add(table: str, key: str, trained: str, baseline: list[float] | None) -> None:
        values = top1(seeds, trained, key)
        difference = None if baseline is None else paired(values, baseline)
        cost = costs["random-0" if key == "random" else key]
        found.append(Row(table, key, label(key, trained), trained, mean(values), difference, cost))

    zero = top1(seeds, DENSE, PLAIN)
    swept = [key for key in costs if "@" in key]
    for key in _once(key for key in costs if key not in swept):
        add(ZERO_SHOT, key, DENSE, None if key in {DENSE, PLAIN} else zero)
    if case.tuned:
        plain = top1(seeds, PLAIN, PLAIN)
        for trained in case.tuned:
            key = DENSE if trained == FURTHER else trained
            add(TUNED, key, trained, None if trained in {FURTHER, PLAIN} else plain)
        for trained, key in _DEPLOYED_OTHERWISE:
            if trained in case.tuned:
                add(TUNED, key, trained, plain)
    for key in swept:
        name, _, ratio = key.partition("@")
        add(SWEEP, key, DENSE, None if name == PLAIN else top1(seeds, DENSE, f"{PLAIN}@{ratio}"))
    return found


def label(key: str, trained: str = DENSE) -> str:
    """What a row is called."""
    if "@" in key:
        name, _, ratio = key.partition("@")
        return f"{ratio}, {LABELS[name]}"
    if trained == FURTHER:
        return LABELS[FURTHER]
    name, _, grid = key.partition("+")
    text = LABELS["random" if name.startswith("random") else name]
    text += ", convolution on the grid" if grid else ""
    if trained in {DENSE, key}:
        return text
    return f"{text}, of weights trained as: {label(trained)}"


def _once(keys: Any) -> list[str]:
    """The random draws as one row."""
    return list(dict.fromkeys("random" if key.startswith("random") else key for key in keys))
