"""The ablation's plots: accuracy against FLOPs and against measured time."""

from __future__ import annotations

import io
from collections.abc import Sequence

from vssm.studies.plan import ALIGNMENT, CONV, IMPORTANCE, RATIO
from vssm.studies.report import FINE_TUNED, AblationReport, VariantRow

# Okabe-Ito colours and two of Tol's, and a mark of its own for whoever sees none.
_METHODS = {
    "dense": ("#000000", "D"),
    "EViT-style, one fused leftover": ("#cc79a7", "v"),
    "plain removal": ("#0072b2", "o"),
    "aligned (gap)": ("#d55e00", "o"),
    "merged (R-MeeTo)": ("#332288", "h"),
    "merged, aligned (size)": ("#882255", "h"),
}
_OTHERS = {ALIGNMENT: "#56b4e9", IMPORTANCE: "#009e73", CONV: "#e69f00", RATIO: "#999999"}
_MARKS = {"constant": "s", "masked": "P", "sum": "^", "l1": "<", "l2": ">"}
_OTHER_MARK = "X"
_TUNED_MARK = "*"


def plot(report: AblationReport, *, against: str) -> bytes:
    """Top-1 over "flops" (published rule) or "time" (milliseconds an image), as PNG.

    Bars are the standard error, or the spread over several runs. Every variant is drawn once, and
    once more fine-tuned.
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


def _series(rows: Sequence[VariantRow]) -> dict[str, list[VariantRow]]:
    """Rows by their legend; a variant of several tables stands in its first."""
    found: dict[str, list[VariantRow]] = {}
    drawn: set[tuple[str, ...]] = set()
    for row in rows:
        if row.runs in drawn:
            continue
        drawn.add(row.runs)
        label = row.label
        if row.table == RATIO:
            label = f"keep ratios, {row.label.partition(', ')[2]}"
        found.setdefault(label, []).append(row)
    return found


def _style(row: VariantRow) -> tuple[str, str]:
    """Colour and mark: the method's where it is one, and a star for weights trained with it."""
    label = row.label.removesuffix(f", {FINE_TUNED}")
    for method, (colour, mark) in _METHODS.items():
        if label == method:
            return colour, _TUNED_MARK if row.tuned else mark
        if row.table == RATIO and label.endswith(method):
            return colour, _TUNED_MARK if row.tuned else "."
    return _OTHERS[row.table], _TUNED_MARK if row.tuned else _MARKS.get(label, _OTHER_MARK)


def _x(row: VariantRow, against: str) -> float:
    return row.flops.published / 1e9 if against == "flops" else 1e3 / row.images_per_s
