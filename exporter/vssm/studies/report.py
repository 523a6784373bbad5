"""What an ablation found: rows, and Markdown in the paper's layout."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vssm.models.family import Published
from vssm.studies.measure import Outcome, VariantCost
from vssm.studies.plan import Line, Run


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


FINE_TUNED = "fine-tuned"
COLUMNS = (
    *("", "GFLOPs, published rule", "without alignment's part", "true", "images/s", "top-1 %"),
    *("published GFLOPs", "published top-1 %"),
)
PAIRED_COLUMNS = ("", "difference, points", "better", "worse", "p")


@dataclass(frozen=True)
class VariantRow:
    """One row of a table.

    Attributes:
        table: which one.
        label: what ran.
        weights: where the row's weights come from.
        tuned: whether they were trained with the row's own variant.
        variants: keys of the variants behind it; one, or one a seed of the random choice.
        runs: keys of the runs behind it: a run for each variant and checkpoint or training seed.
        top1s: of each run, the share of the images whose class came first.
        top1: their mean.
        spread: their standard deviation; None for a single run.
        standard_error: of one run's top1, from the number of images alone.
        images_per_s: the median's; the mean over the runs.
        timed_batches: behind it.
        flops: multiply-adds of an image.
        published: what the paper prints beside it.
        paired: its runs beside plain removal's of the same number, image by image; None where
            there is none to compare with.
    """

    table: str
    label: str
    weights: str
    tuned: bool
    variants: tuple[str, ...]
    runs: tuple[str, ...]
    top1s: tuple[float, ...]
    top1: float
    spread: float | None
    standard_error: float
    images_per_s: float
    timed_batches: int
    flops: VariantCost
    published: Published
    paired: Paired | None


@dataclass(frozen=True)
class AblationReport:
    """All rows, what ran, what was refused, and the images that could not be read."""

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

    def of(self, line: Line, *, tuned: bool) -> list[Run]:
        """The runs of a line; none where one of its variants has none."""
        some = [run for run in self.runs if run.tuned == tuned and run.variant.key in line.keys]
        return some if {run.variant.key for run in some} == set(line.keys) else []

    def baseline(self, run: Run) -> Run | None:
        """Plain removal of the same ratio, weights and number; None for itself."""
        wanted = (run.variant.baseline, run.tuned, run.number)
        found = [r for r in self.runs if (r.variant.key, r.tuned, r.number) == wanted]
        return found[0] if found and found[0] is not run else None


def make_row(
    line: Line, measured: Measured, *, tuned: bool, weights: str, published: Published
) -> VariantRow | None:
    """The row of a line; None where its variants did not all run."""
    runs = measured.of(line, tuned=tuned)
    if not runs:
        return None
    some = [measured.outcomes[run.key] for run in runs]
    shares = [outcome.top1 for outcome in some]
    speeds = [outcome.images_per_s() for outcome in some]
    top1 = statistics.fmean(shares)
    return VariantRow(
        table=line.table,
        label=f"{line.label}, {FINE_TUNED}" if tuned else line.label,
        weights=FINE_TUNED if tuned else weights,
        tuned=tuned,
        variants=line.keys,
        runs=tuple(run.key for run in runs),
        top1s=tuple(shares),
        top1=top1,
        spread=statistics.stdev(shares) if len(shares) > 1 else None,
        standard_error=math.sqrt(top1 * (1 - top1) / some[0].images),
        images_per_s=statistics.fmean(speed for speed, _ in speeds),
        timed_batches=min(n for _, n in speeds),
        # One for all: seeds change choices and weights, not the work.
        flops=measured.costs[runs[0].key],
        published=published,
        paired=_paired(runs, measured),
    )


def _paired(runs: Sequence[Run], measured: Measured) -> Paired | None:
    pairs = []
    for run in runs:
        other = measured.baseline(run)
        if other is not None:
            one, two = ((r.key, measured.outcomes[r.key].hits) for r in (run, other))
            pairs.append(compare(one, two))
    return join(pairs, measured.outcomes[runs[0].key].images) if pairs else None


def cells(row: VariantRow) -> tuple[str, ...]:
    """A row as the tables show it; beside top-1 the spread and number of runs, where several."""
    spread = "" if row.spread is None else f" ± {100 * row.spread:.2f} ({len(row.runs)})"
    flops = (f"{x / 1e9:.4g}" for x in (row.flops.published, row.flops.unaligned, row.flops.true))
    printed = row.published
    return (
        row.label,
        *flops,
        f"{row.images_per_s:.1f}",
        f"{100 * row.top1:.2f}{spread}",
        "-" if printed.gflops is None else f"{printed.gflops:g}",
        "-" if printed.top1 is None else f"{printed.top1:g}",
    )


def markdown(report: AblationReport, plots: Sequence[str]) -> str:
    """The tables as Markdown, with what ran and what did not."""
    parts = ["# vssm ablate", "\n".join(f"- {k}: {v}" for k, v in report.facts.items())]
    for table in dict.fromkeys(row.table for row in report.rows):
        lines = [f"## {table}", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        lines += [_line(cells(row)) for row in report.rows if row.table == table]
        parts.append("\n".join(lines))
    if any(row.paired for row in report.rows):
        parts.append(_paired_table(report.rows))
    error = max(row.standard_error for row in report.rows)
    parts.append(
        "Published figures, on ImageNet: Zhan et al., arXiv:2409.18962, and of merging Shi et al., "
        "arXiv:2412.12496; their pruned and merged rows are fine-tuned, rows here only where they "
        "say so. A difference of top-1 below about "
        f"{200 * error:.2f} points (twice the standard error of one run) may be chance; the pairs "
        "above say more. ± is the standard deviation over runs, their number in brackets."
    )
    if report.left_out:
        lines = [f"- {key}: {reason}" for key, reason in report.left_out.items()]
        parts.append("\n".join(["## left out", "", *lines]))
    if report.unreadable:
        lines = [f"- {path}: {error}" for path, error in report.unreadable]
        parts.append("\n".join(["## images that cannot be read", "", *lines]))
    parts += [f"![{name}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def _paired_table(rows: Sequence[VariantRow]) -> str:
    """Every row beside plain removal, once; sums over its pairs, and p of a single one."""
    lines = ["## beside plain removal, image by image", ""]
    lines += [_line(PAIRED_COLUMNS), _line(["---"] * len(PAIRED_COLUMNS))]
    shown: set[tuple[str, ...]] = set()
    for row in rows:
        # A variant may stand in several tables; "gap" is in three.
        if row.paired is None or row.runs in shown:
            continue
        shown.add(row.runs)
        found = row.paired
        spread = "" if found.spread is None else f" ± {100 * found.spread:.2f}"
        better, worse = (sum(getattr(p, name) for p in found.pairs) for name in ("better", "worse"))
        chance = f"{found.pairs[0].p:.2g}" if len(found.pairs) == 1 else "-"
        difference = f"{100 * found.difference:+.2f}{spread}"
        lines.append(_line((row.label, difference, str(better), str(worse), chance)))
    return "\n".join(lines)


def _line(columns: Sequence[str]) -> str:
    # A bar in a text would begin a cell.
    escaped = (column.replace("|", "\\|") for column in columns)
    return f"| {' | '.join(escaped)} |"
