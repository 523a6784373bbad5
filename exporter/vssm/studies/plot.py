"""The ablation's plots: accuracy against FLOPs and against measured time."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from vssm.studies.plan import RATIO
from vssm.studies.report import AblationReport, VariantRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By a variant's key, without the number behind + or @: a colour (Okabe-Ito's and Tol's muted ones)
# and a mark of its own, which print without colour tells apart.
_STYLES: Final[dict[str, tuple[str, Any]]] = {
    "dense": ("#000000", "D"),
    "evit": ("#cc79a7", "v"),
    "none": ("#0072b2", "o"),
    "gap": ("#d55e00", "s"),
    "merge": ("#332288", "h"),
    "merge+size": ("#882255", "p"),
    "constant": ("#56b4e9", "P"),
    "masked": ("#aa4499", "X"),
    "sum": ("#009e73", "^"),
    "l1": ("#117733", "<"),
    "l2": ("#44aa99", ">"),
    "random": ("#999933", "*"),
    "none+": ("#88ccee", "d"),
    "gap+": ("#e69f00", (4, 1, 0)),
    "none@": ("#6699cc", (5, 1, 36)),
    "gap@": ("#cc6677", (6, 1, 0)),
}
_LINES: Final = {"none@": "--", "gap@": "-"}
_DRAWN: Final = {"flops": "GFLOPs, published rule", "time": "milliseconds per image, measured"}


def draw(report: AblationReport, *, against: str) -> Figure:
    """Top-1 over "flops" (published rule) or "time" (milliseconds per image).

    Every variant is drawn once with a mark and colour of its own, and once more fine-tuned: filled
    then, and the others hollow. The axes say what their bars are.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    tuned = any(row.tuned for row in report.rows)
    for label, rows in _series(report.rows).items():
        kind = _kind(rows[0])
        colour, mark = _STYLES[kind]
        xs, ys = [_x(row, against) for row in rows], [100 * row.top1 for row in rows]
        bars = [100 * (row.standard_error if row.spread is None else row.spread) for row in rows]
        axes.errorbar(
            xs,
            ys,
            bars,
            None if against == "flops" else _spans(rows, xs),
            color=colour,
            ecolor=colour,
            marker=mark,
            markersize=7,
            markerfacecolor="white" if tuned and not rows[0].tuned else colour,
            # A line would run from checkpoint to checkpoint and back.
            linestyle=_LINES.get(kind, "none") if rows[0].checkpoint is None else "none",
            linewidth=1,
            elinewidth=0.7,
            label=label,
        )
    exact = "; exact, so there are no bars"
    quartiles = "; bars: the middle half of the batches"
    axes.set_xlabel(_DRAWN[against] + (exact if against == "flops" else quartiles))
    axes.set_ylabel(textwrap.fill(f"top-1 %; bars: {_bars(report.rows)}", 50))
    axes.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(report.setting.caption, 110), fontsize=8)
    figure.legend(fontsize=9, loc="outside right center")
    return figure


def picture(figure: Figure, kind: str) -> bytes:
    """A figure as "png", "svg" or "pdf", the same bytes every time."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # Both write the time of day, and SVG random names.
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with rc_context({"svg.hashsalt": "vssm", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, dpi=150, metadata=dated)
    return buffer.getvalue()


def _bars(rows: Sequence[VariantRow]) -> str:
    kinds = {row.spread is not None for row in rows}
    if kinds == {True, False}:
        return "standard deviation over runs, of a single run its standard error"
    return "standard deviation over runs" if True in kinds else "standard error"


def _spans(rows: Sequence[VariantRow], xs: Sequence[float]) -> list[list[float]]:
    """Bars to the left and to the right."""
    ends = [row.ms_quartiles or (x, x) for row, x in zip(rows, xs, strict=True)]
    low = [max(0.0, x - end) for x, (end, _) in zip(xs, ends, strict=True)]
    return [low, [max(0.0, end - x) for x, (_, end) in zip(xs, ends, strict=True)]]


def _series(rows: Sequence[VariantRow]) -> dict[str, list[VariantRow]]:
    """Rows by their legend; a variant of several tables stands in its first."""
    found: dict[str, list[VariantRow]] = {}
    drawn: set[tuple[str, ...]] = set()
    for row in rows:
        if row.runs in drawn:
            continue
        drawn.add(row.runs)
        # Checkpoints share a mark: they are points of one variant.
        label = row.label.removesuffix(f", {row.checkpoint}")
        if row.table == RATIO:
            label = f"keep ratios, {label.partition(', ')[2]}"
        found.setdefault(label, []).append(row)
    return found


def _kind(row: VariantRow) -> str:
    """Key of the row's style."""
    key = row.variants[0]
    return key if key in _STYLES else re.sub(r"-\d+$|(?<=[+@]).*", "", key)


def _x(row: VariantRow, against: str) -> float:
    return row.flops.published / 1e9 if against == "flops" else 1e3 / row.images_per_s


def scatter(
    points: Sequence[tuple[str, float, float, Sequence[float]]], *, x: str, y: str
) -> Figure:
    """Points (name, x, y, ends of the bar along y), each with a mark and colour of its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    # Round and round where there are more points than styles.
    for (name, across, up, (low, high)), style in zip(points, itertools.cycle(_STYLES.values())):
        colour, mark = style
        bars = [[up - low], [high - up]]
        axes.errorbar([across], [up], bars, color=colour, marker=mark, linestyle="none", label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center")
    return figure


def element(svg: bytes) -> str:
    """The element that HTML takes of an SVG `picture`, without the declarations in front."""
    text = svg.decode()
    return text[text.index("<svg") :]
