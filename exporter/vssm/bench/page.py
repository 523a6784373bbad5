"""The benchmark as one HTML page: tables to look up, a plot to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from vssm.bench.measure import BenchReport, Timing
from vssm.extras import install_command, is_installed
from vssm.files.atomic import atomic_write_bytes
from vssm.files.page import Illustration, Section, Table, render
from vssm.runtimes.session import plural


def write_page(report: BenchReport, path: Path) -> None:
    """Write the page to `path`, whole or not at all.

    Raises:
        ArtifactError: the path cannot be written.
    """
    atomic_write_bytes(path, page(report).encode())


def page(report: BenchReport) -> str:
    """The page's HTML, without references to other files."""
    how = "Latency of one batch; subjects were run in turn, so compare ratios within this page."
    latency = Table(_COLUMNS, [_cells(row) for row in report.rows], "latency", numbers=True)
    text = [f"{how} {_floor_sentence(report)}", *report.notes]
    figures = []
    # A page without its plot is still a report; the measurement must not be lost for it.
    if is_installed("matplotlib"):
        figures.append(Illustration(_plot(report.rows)))
    else:
        hint = install_command("matplotlib")
        text.append(f"No plot: matplotlib is not installed ({hint}).")
    found = Section(tables=[latency, *_operators(report)])
    return render("vssm bench", report.context, [Section("", text, figures=figures), found])


_COLUMNS = (
    "subject",
    "batch",
    "threads",
    "median ms",
    "p95 ms",
    "min ms",
    "n",
    "images/s",
    "floor ms",
    "over floor",
    "difference",
    "what ran",
)


def _cells(row: Timing) -> tuple[str, ...]:
    difference = "-" if row.difference is None else f"{row.difference:.0e}"
    return (
        row.subject,
        str(row.batch),
        str(row.threads),
        f"{row.median_ms:.2f}",
        f"{row.p95_ms:.2f}",
        f"{row.min_ms:.2f}",
        str(row.samples),
        f"{row.images_per_s:.1f}",
        "-" if row.floor_ms is None else f"{row.floor_ms:.2f}",
        "-" if row.over_floor is None else f"{row.over_floor:.2f}",
        difference,
        row.info,
    )


def _floor_sentence(report: BenchReport) -> str:
    if report.rates is None:
        return "Times are the host's, from images to outputs; this GPU's floor was not measured."
    scan = report.scan_over_floor
    scans = "" if scan is None else f" The scans themselves take {scan:.2f} times their floor."
    return (
        "The floor is the exponentials of the scans at this machine's measured exp2 rate "
        f"({report.rates.exp2 / 1e9:.1f} G/s a thread), or their products where all states of a "
        f"channel share one decay ({report.rates.products / 1e9:.1f} G/s), plus the multiply-adds "
        f"at the rate of a large matrix product, nothing overlapped.{scans}"
    )


def _operators(report: BenchReport) -> list[Table]:
    if not report.operators:
        return []
    total = sum(report.operators.values())
    rows = [(name, f"{ms:.3f}", f"{ms / total:.0%}") for name, ms in report.operators.items()]
    caption = "time by operator, one image, one thread, with kernels"
    kinds = [
        (
            k.kind,
            f"{k.ms:.3f}",
            f"{k.ms / total:.0%}",
            "-" if k.floor_ms is None else f"{k.floor_ms:.3f}",
            "-" if k.over_floor is None else f"{k.over_floor:.2f}",
        )
        for k in report.kinds
    ]
    columns = ("kind of work", "ms", "share", "floor ms", "over floor")
    return [
        Table(columns, kinds, "the same time by kind of work", numbers=True),
        Table(("operator", "ms", "share"), rows, caption, numbers=True),
    ]


def _plot(rows: Sequence[Timing]) -> str:
    """Median latency by subject as inline SVG, log scale, the floor as a mark on every bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    labels = [f"{r.subject}, batch {r.batch}, {plural(r.threads, 'thread')}" for r in rows]
    places = list(range(len(rows)))
    axes.barh(places, [r.median_ms for r in rows], color="#4c78a8", label="median")
    floors = [(r.floor_ms, place) for r, place in zip(rows, places, strict=True) if r.floor_ms]
    if floors:
        axes.plot(*zip(*floors, strict=True), "k|", markersize=12, label="floor")
    axes.set_yticks(places, labels)
    # Bars count upwards; the table above the plot counts downwards.
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds a batch (log scale)")
    axes.legend()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    # HTML takes the element alone, without the XML declaration and doctype in front.
    return text[text.index("<svg") :]
