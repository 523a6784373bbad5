"""What an ablation found: rows, Markdown in the paper's layout, and plots."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exporter.training.ablate_plan import (
    ALIGNMENT,
    IMPORTANCE,
    RATIO,
    Line,
    Published,
)
from exporter.training.ablate_run import Cost, Outcome

FINE_TUNED = "fine-tuned"
COLUMNS = (
    *("", "GFLOPs, published rule", "without alignment's part", "true", "images/s", "top-1 %"),
    *("published GFLOPs", "published top-1 %"),
)
# Okabe-Ito colours, and a mark of its own for whoever sees none.
_METHODS = {
    "dense": ("#000000", "D"),
    "EViT-style, one fused leftover": ("#cc79a7", "v"),
    "plain removal": ("#0072b2", "o"),
    "aligned (gap)": ("#d55e00", "o"),
}
_OTHERS = {ALIGNMENT: "#56b4e9", IMPORTANCE: "#009e73", RATIO: "#999999"}
_MARKS = {"constant": "s", "masked": "P", "sum": "^", "l1": "<", "l2": ">"}
_OTHER_MARK = "X"
_TUNED_MARK = "*"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        table: which one.
        label: what ran.
        weights: where the row's weights come from.
        variants: keys of the variants behind it, one a seed.
        top1: share of the images whose class came first, the mean over seeds.
        spread: standard deviation over the seeds; None for a single one.
        standard_error: of one variant's top1, from the number of images alone.
        images_per_s: the median's; the mean over seeds.
        timed_batches: behind it.
        flops: multiply-adds of an image.
        published: what the paper prints beside it.
    """

    table: str
    label: str
    weights: str
    variants: tuple[str, ...]
    top1: float
    spread: float | None
    standard_error: float
    images_per_s: float
    timed_batches: int
    flops: Cost
    published: Published


@dataclass(frozen=True)
class AblationReport:
    """All rows, what ran, what was refused, and the images that could not be read."""

    facts: Mapping[str, str]
    rows: tuple[Row, ...]
    left_out: Mapping[str, str]
    unreadable: tuple[tuple[str, str], ...]


def make_row(
    line: Line,
    outcomes: Mapping[str, Outcome],
    costs: Mapping[str, Cost],
    *,
    weights: str,
    published: Published,
) -> Row:
    """The row of a line whose variants all ran."""
    some = [outcomes[key] for key in line.keys]
    shares = [outcome.top1 for outcome in some]
    speeds = [outcome.images_per_s() for outcome in some]
    top1 = statistics.fmean(shares)
    return Row(
        table=line.table,
        label=line.label,
        weights=weights,
        variants=line.keys,
        top1=top1,
        spread=statistics.stdev(shares) if len(shares) > 1 else None,
        standard_error=math.sqrt(top1 * (1 - top1) / some[0].images),
        images_per_s=statistics.fmean(speed for speed, _ in speeds),
        timed_batches=min(n for _, n in speeds),
        flops=costs[line.keys[0]],
        published=published,
    )


def cells(row: Row) -> tuple[str, ...]:
    """A row as the tables show it; beside top-1 the seeds' spread where there are several."""
    spread = "" if row.spread is None else f" ± {100 * row.spread:.2f}"
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
    error = max(row.standard_error for row in report.rows)
    parts.append(
        "Published figures: Zhan et al., arXiv:2409.18962, on ImageNet; its pruned rows are "
        "fine-tuned, rows here only where they say so. A difference of top-1 below about "
        f"{200 * error:.2f} points (twice the standard error of one row) may be chance."
    )
    if report.left_out:
        lines = [f"- {key}: {reason}" for key, reason in report.left_out.items()]
        parts.append("\n".join(["## left out", "", *lines]))
    if report.unreadable:
        lines = [f"- {path}: {error}" for path, error in report.unreadable]
        parts.append("\n".join(["## images that cannot be read", "", *lines]))
    parts += [f"![{name}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def _line(columns: Sequence[str]) -> str:
    escaped = (column.replace("|", "\\|") for column in columns)
    return f"| {' | '.join(escaped)} |"


def plot(report: AblationReport, *, against: str) -> bytes:
    """Top-1 over "flops" (published rule) or "time" (milliseconds an image), as PNG.

    Bars are the standard error, or the spread over seeds. Every variant is drawn once.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    for method, (colour, _) in _METHODS.items():
        rows = [r for r in report.rows if r.table == RATIO and r.label.endswith(method)]
        xs, ys = [_x(row, against) for row in rows], [100 * row.top1 for row in rows]
        if rows:  # in the order of the ratios
            axes.plot(xs, ys, color=colour, linewidth=1, alpha=0.6)
    for label, rows in _series(report.rows).items():
        colour, mark = _style(rows[0])
        xs, ys = [_x(row, against) for row in rows], [100 * row.top1 for row in rows]
        bars = [100 * (row.standard_error if row.spread is None else row.spread) for row in rows]
        axes.errorbar(xs, ys, bars, fmt=mark, color=colour, elinewidth=0.7, label=label)
    units = {"flops": "GFLOPs, published rule", "time": "milliseconds an image, measured"}
    axes.set_xlabel(units[against])
    axes.set_ylabel("top-1 %")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside right upper")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by their legend; a variant of several tables stands in its first."""
    found: dict[str, list[Row]] = {}
    drawn: set[tuple[str, ...]] = set()
    for row in rows:
        if row.variants in drawn:
            continue
        drawn.add(row.variants)
        label = row.label
        if row.table == RATIO:
            label = f"keep ratios, {row.label.partition(', ')[2]}"
        found.setdefault(label, []).append(row)
    return found


def _style(row: Row) -> tuple[str, str]:
    """Colour and mark: the method's where it is one."""
    if row.weights == FINE_TUNED:
        return _METHODS["aligned (gap)"][0], _TUNED_MARK
    for method, style in _METHODS.items():
        if row.label == method or (row.table == RATIO and row.label.endswith(method)):
            return (style[0], "." if row.table == RATIO else style[1])
    return _OTHERS[row.table], _MARKS.get(row.label, _OTHER_MARK)


def _x(row: Row, against: str) -> float:
    return row.flops.published / 1e9 if against == "flops" else 1e3 / row.images_per_s
