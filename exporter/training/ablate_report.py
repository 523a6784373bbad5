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
    METHODS,
    RATIO,
    Line,
    Published,
)
from exporter.training.ablate_run import Cost, Outcome

COLUMNS = (
    *("", "GFLOPs, published rule", "without alignment's part", "true", "images/s", "top-1 %"),
    *("published GFLOPs", "published top-1 %"),
)
_COLOURS = {METHODS: "#000000", ALIGNMENT: "#0072b2", IMPORTANCE: "#009e73", RATIO: "#d55e00"}
_MARKS = {METHODS: "D", ALIGNMENT: "s", IMPORTANCE: "^", RATIO: "o"}


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
    flops = (f"{x / 1e9:.3f}" for x in (row.flops.published, row.flops.unaligned, row.flops.true))
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
    """Top-1 over "flops" (published rule) or "time" (milliseconds an image), as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for table in dict.fromkeys(row.table for row in report.rows):
        rows = [row for row in report.rows if row.table == table]
        xs = [_x(row, against) for row in rows]
        ys = [100 * row.top1 for row in rows]
        errors = [100 * (row.spread or row.standard_error) for row in rows]
        style = {"color": _COLOURS[table], "marker": _MARKS[table]}
        axes.errorbar(xs, ys, errors, linestyle="none", capsize=2, label=table, **style)
    swept = [row for row in report.rows if row.table == RATIO]
    for end, style in (("plain removal", ":"), ("aligned (gap)", "-")):
        line = sorted((_x(r, against), 100 * r.top1) for r in swept if r.label.endswith(end))
        if line:
            axes.plot(*zip(*line, strict=True), style, color=_COLOURS[RATIO], label=f"sweep, {end}")
    for row in report.rows:
        if row.table == METHODS:
            place = (_x(row, against), 100 * row.top1)
            axes.annotate(row.label, place, (6, 5), textcoords="offset points", fontsize=8)
    units = {"flops": "GFLOPs, published rule", "time": "milliseconds an image, measured"}
    axes.set_xlabel(units[against])
    axes.set_ylabel("top-1 %")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _x(row: Row, against: str) -> float:
    return row.flops.published / 1e9 if against == "flops" else 1e3 / row.images_per_s
