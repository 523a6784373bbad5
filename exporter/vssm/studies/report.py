"""What an ablation found: a row for each variant, and its runs beside plain removal's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vssm.models.family import Published
from vssm.studies.measure import Outcome, VariantCost
from vssm.studies.paired import Paired, compare, join
from vssm.studies.plan import Line, Run

FINE_TUNED = "fine-tuned"
_UNITS: Final = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def amount(number: float) -> str:
    """A count with three digits and a unit: 1.45 G."""
    for scale, unit in _UNITS:
        if number >= 0.9995 * scale:  # what would be rounded up to the unit is one
            # "g" alone would write 1e+03 for 999.7.
            return f"{float(f'{number / scale:.3g}'):g} {unit}"
    return f"{number:g}"


@dataclass(frozen=True)
class VariantRow:
    """One row of a table.

    Attributes:
        table: which one.
        label: what ran.
        weights: where the row's weights come from.
        tuned: whether they were trained with the row's own variant.
        checkpoint: the one of several that they begin with; None where there is one, or all are
            averaged.
        variants: keys of the variants behind it; one, or one a seed of the random choice.
        runs: keys of the runs behind it: a run for each variant and checkpoint or training seed.
        top1s: of each run, the share of the images whose class came first.
        top1: their mean.
        spread: their standard deviation; None for a single run.
        standard_error: of one run's top1, from the number of images alone.
        images_per_s: the median's; the mean over the runs.
        timed_batches: behind it.
        speed_up: over the dense model of the same call.
        ms_quartiles: milliseconds per image that a quarter and three quarters of the timed batches
            took at most; None for a single batch.
        flops: multiply-adds of an image.
        reduction: share of the dense model's FLOPs that is gone, by the published rule.
        published: what the paper prints beside it.
        paired: its runs beside plain removal's of the same number, image by image; None where
            there is none to compare with.
    """

    table: str
    label: str
    weights: str
    tuned: bool
    checkpoint: str | None
    variants: tuple[str, ...]
    runs: tuple[str, ...]
    top1s: tuple[float, ...]
    top1: float
    spread: float | None
    standard_error: float
    images_per_s: float
    timed_batches: int
    speed_up: float
    ms_quartiles: tuple[float, float] | None
    flops: VariantCost
    reduction: float
    published: Published
    paired: Paired | None


@dataclass(frozen=True)
class Setting:
    """What is the same in every row, for captions.

    Attributes:
        model: its name.
        image_size: (height, width) in pixels.
        parameters: numbers that are trained.
        images: files in the folder.
        ran: processor or GPU, threads, dtype, backend and batch.
    """

    model: str
    image_size: tuple[int, int]
    parameters: int
    images: int
    ran: str

    @property
    def caption(self) -> str:
        """All of it in words."""
        size = " x ".join(map(str, self.image_size))
        return (
            f"{self.model}, {size} pixels, {amount(self.parameters)} parameters; "
            f"{self.images:,} images; {self.ran}"
        )


@dataclass(frozen=True)
class AblationReport:
    """All rows, what ran, what was refused, and the images that could not be read."""

    setting: Setting
    facts: Mapping[str, str]
    rows: tuple[VariantRow, ...]
    left_out: Mapping[str, str]
    unreadable: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Measured:
    """All runs, and by their keys what they did and what they cost."""

    runs: Sequence[Run]
    outcomes: Mapping[str, Outcome]
    costs: Mapping[str, VariantCost]

    def of(self, line: Line, *, tuned: bool, checkpoint: int | None) -> list[Run]:
        """The runs of a line, or those of one checkpoint; none where a variant of it has none."""
        some = [
            run
            for run in self.runs
            if run.tuned == tuned
            and run.variant.key in line.keys
            and (checkpoint is None or run.checkpoint == checkpoint)
        ]
        return some if {run.variant.key for run in some} == set(line.keys) else []

    def speed(self, runs: Sequence[Run]) -> float:
        """Images/s, the mean over some runs."""
        return statistics.fmean(self.outcomes[run.key].images_per_s() for run in runs)

    def baseline(self, run: Run) -> Run | None:
        """Plain removal of the same ratio, weights and number; None for itself."""
        wanted = (run.variant.baseline, run.tuned, run.number)
        found = [r for r in self.runs if (r.variant.key, r.tuned, r.number) == wanted]
        return found[0] if found and found[0] is not run else None


def make_row(
    line: Line,
    measured: Measured,
    *,
    tuned: bool,
    weights: str,
    published: Published,
    checkpoint: tuple[int, str] | None = None,
) -> VariantRow | None:
    """The row of a line; None where its variants did not all run.

    Args:
        line: which variants.
        measured: what all runs did.
        tuned: whether the runs that were trained with their variant are meant.
        weights: where the others' weights come from.
        published: figures to show beside it.
        checkpoint: number and name of the one whose runs are meant; None for all.
    """
    number, name = checkpoint or (None, None)
    runs = measured.of(line, tuned=tuned, checkpoint=number)
    if not runs:
        return None
    some = [measured.outcomes[run.key] for run in runs]
    shares = [outcome.top1 for outcome in some]
    top1, speed = statistics.fmean(shares), measured.speed(runs)
    dense = [run for run in measured.runs if run.variant.key == "dense" and not run.tuned]
    # One for all: seeds change choices and weights, not the work.
    flops, whole = (measured.costs[first[0].key] for first in (runs, dense or runs))
    times = sorted(1e3 * seconds for outcome in some for seconds in outcome.seconds_per_image())
    label = f"{line.label}, {FINE_TUNED}" if tuned else line.label
    return VariantRow(
        table=line.table,
        label=label if name is None else f"{label}, {name}",
        weights=FINE_TUNED if tuned else weights if name is None else name,
        tuned=tuned,
        checkpoint=name,
        variants=line.keys,
        runs=tuple(run.key for run in runs),
        top1s=tuple(shares),
        top1=top1,
        spread=statistics.stdev(shares) if len(shares) > 1 else None,
        standard_error=math.sqrt(top1 * (1 - top1) / some[0].images),
        images_per_s=speed,
        timed_batches=min(len(outcome.seconds_per_image()) for outcome in some),
        speed_up=speed / measured.speed(dense or runs),
        ms_quartiles=_quartiles(times),
        flops=flops,
        reduction=1 - flops.published / whole.published,
        published=published,
        paired=_paired(runs, measured),
    )


def _quartiles(times: Sequence[float]) -> tuple[float, float] | None:
    if len(times) < 2:
        return None
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


def _paired(runs: Sequence[Run], measured: Measured) -> Paired | None:
    pairs = []
    for run in runs:
        other = measured.baseline(run)
        if other is not None:
            one, two = ((r.key, measured.outcomes[r.key].hits) for r in (run, other))
            pairs.append(compare(one, two))
    return join(pairs, measured.outcomes[runs[0].key].images) if pairs else None
