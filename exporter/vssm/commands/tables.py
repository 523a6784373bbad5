"""What the commands write on the terminal: lines, tables, progress, and results as JSON."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vssm.files.json import json_text, write_json
from vssm.files.progress import Phase, drawn
from vssm.files.terminal import Terminal
from vssm.files.text import shown

if TYPE_CHECKING:  # what a command does not run, it does not import
    from vssm.bench.measure import BenchReport, Timing
    from vssm.parity.compare import Comparison, ParityReport
    from vssm.runtimes.doctor import Finding
    from vssm.types import Steps

# Under torchrun the first process speaks.
console = Terminal(quiet=os.environ.get("RANK", "0") != "0")
errors = Terminal(stderr=True)
STDOUT: Final = Path("-")
_SHOWN: Final = 20  # images that cannot be read


def say(*parts: str | tuple[str, str], to: Console | None = None) -> None:
    """Print one line, which the terminal may break but no text in it; a pair has a style."""
    # Escaped here, before the layout: the terminal sees these as ready texts, not as strings.
    safe = [shown(p) if isinstance(p, str) else (shown(p[0]), p[1]) for p in parts]
    (to or console).print(Text.assemble(*safe), soft_wrap=True)


def say_folders(rule: str, notes: Sequence[str]) -> None:
    """Say how class folders were matched to classes, and what else is among them."""
    say(("classes", "bold"), f": {rule}")
    for note in notes:
        say(("note", "yellow"), f": {note}")


def say_unreadable(images: Sequence[tuple[str, str]], results: str) -> None:
    """Name the images that cannot be read; the results have them all."""
    for name, error in images[:_SHOWN]:
        say(("not read", "yellow"), f": {name}: {error}")
    if len(images) > _SHOWN:
        say(f"and {len(images) - _SHOWN:,} more, in {results}")


def show(*tables: RenderableType) -> None:
    """Print tables."""
    for one in tables:
        # Never cut: what does not fit is for the terminal to break.
        console.print(one, crop=False)


def write_result(path: Path | None, value: Any) -> None:
    """Write what --json was asked for: into a file, or "-" on standard output.

    Raises:
        ArtifactError: the file cannot be written.
    """
    if path == STDOUT:
        # Past the console, which speaks to stderr then and could break lines.
        try:
            sys.stdout.write(json_text(value))
            sys.stdout.flush()
        except BrokenPipeError:
            Terminal().on_broken_pipe()
    elif path is not None:
        write_json(path, value)


@contextlib.contextmanager
def working(phase: str, *, leaves: str = "nothing was written") -> Iterator[Steps]:
    """Shows how far a long work is, from its first moment on; a log gets lines.

    Ctrl-C says how far it came, and ends with exit code 130.

    Args:
        phase: what is done first, before anything is told.
        leaves: what a stopped work leaves.
    """
    last: Phase | None = None
    try:
        with drawn(console) as tell:
            tell(phase, 0, 0)
            try:
                yield tell
            finally:
                last = tell.last
    except (KeyboardInterrupt, SystemExit) as stop:
        if last is not None:
            counted = last.total > 1 and last.done > 0
            where = f"at {last.done:,} of {last.total:,}" if counted else "before the first step"
            say(("stopped", "yellow"), f" {where} ({last.name}); {leaves}", to=errors)
        if isinstance(stop, SystemExit):  # SIGTERM, which has a code of its own
            raise
        raise SystemExit(130) from None


@dataclass(frozen=True)
class ReportTable:
    """A title over a table, or over a list where the terminal is too narrow for the table.

    A column is never narrower than its longest word, so that no name, path or number is split.
    Columns after the first are right-aligned where they are numbers.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Rich asks this for what to print, with the width that there is."""
        yield Text(self.title, style="italic")  # a Table would wrap it at its own width
        columns = list(zip(self.columns, *self.rows, strict=True))
        widths = [
            max(cell_len(w) for cell in cells for w in cell.split() or [""]) for cells in columns
        ]
        # A column has a border and two spaces beside its text; the table has one border more.
        left = options.max_width - sum(widths) - 3 * len(widths) - 1
        if left < 0:
            yield from self._list()
            return
        for i, cells in enumerate(columns):  # what is left goes to whom it saves a line break
            more = min(left, max(map(cell_len, cells)) - widths[i])
            widths[i], left = widths[i] + more, left - more
        drawn = Table()
        for i, name in enumerate(self.columns):
            # By the first sign; "-" for nothing counts as well, and so does an empty cell.
            numbers = i > 0 and all(row[i][:1] in "0123456789-+." for row in self.rows)
            drawn.add_column(name, justify="right" if numbers else "left", width=widths[i])
        for row in self.rows:
            drawn.add_row(*map(Text, row))
        yield drawn

    def _list(self) -> Iterator[Text]:
        for first, *others in self.rows:
            # Not broken, so that a path can be copied as it stands.
            yield Text(first, style="bold", overflow="ignore", no_wrap=True)
            for name, cell in zip(self.columns[1:], others, strict=True):
                if cell not in {"", "-"}:
                    line = f"  {name}: {cell}" if name else f"  {cell}"
                    yield Text(line, overflow="ignore", no_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> ReportTable:
    """A table of anything; None is "-", truth "yes" or "no"."""
    return ReportTable(title, columns, [[_text(cell) for cell in row] for row in rows])


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return shown(cell)


def models_tables(models: Sequence[Mapping[str, Any]]) -> list[ReportTable]:
    """The models with their size and cost, and where their weights are published."""
    title = (
        "tokens of the first block; multiply-adds; the published rule counts one of Vim's two "
        "directions"
    )
    columns = ("model", "parameters", "image", "tokens", "GFLOPs published rule", "true")
    # A table a task: names of classifiers are short, so that theirs fits into 80 columns.
    by_task: dict[str, list[Sequence[object]]] = {}
    for m in models:
        image = "x".join(map(str, m["image_size"]))
        costs = (f"{m[rule] / 1e9:.2f}" for rule in ("flops_published", "flops_true"))
        row = (m["name"], f"{m['parameters']:,}", image, m["tokens"], *costs)
        by_task.setdefault(m["task"], []).append(row)
    published = ((m["name"], m["checkpoint"]) for m in models if m["checkpoint"] is not None)
    files = (
        (name, found.megabytes, found.sha256 and f"{found.sha256[:12]}...", found.address)
        for name, found in published
    )
    return [
        *(table(f"{task} ({title})", columns, rows) for task, rows in by_task.items()),
        table(
            "official checkpoints (--checkpoint takes hf://...; download the others, and give the "
            "file; --json has the whole sha256)",
            ("model", "MB", "sha256", "address"),
            files,
        ),
    ]


def parity_tables(report: ParityReport) -> list[ReportTable]:
    """The verdict, the choices that differ, and the blocks where they were compared."""
    title = (
        f"{report.info}\n{report.dtype}, {report.weights} weights, {report.images} images, "
        "errors relative to the largest value"
    )
    tables = [table(title, ("", "measured", "allowed"), _parity_rows(report))]
    if report.disagreements:
        choices = (
            (d.image, d.stage, d.position, "follows" if d.margin is None else f"{d.margin:.1e}")
            # A screenful; --json has them all.
            for d in report.disagreements[:20]
        )
        columns = ("image", "stage", "position the oracle keeps", "its relative score margin")
        tables.append(table("tokens chosen otherwise", columns, choices))
    if report.signals:
        title = "signal over quantisation noise, oracle's positions, dB"
        found = ((s.name, f"{s.decibels:.1f}", f"{s.needed:g}", s.passed) for s in report.signals)
        tables.append(table(title, ("value", "measured", "needed", "passed"), found))
    elif report.blocks:
        found = ((b.name, f"{b.relative:.1e}", _limit(b), b.passed) for b in report.blocks)
        tables.append(table("block streams", ("value", "error", "allowed", "passed"), found))
    return tables


def _parity_rows(report: ParityReport) -> list[Sequence[object]]:
    """What was measured, and what is allowed of it."""
    forced = report.forced
    rows: list[Sequence[object]] = [
        (f"{forced.name}, oracle's positions", f"{forced.relative:.1e}", _limit(forced))
    ]
    if report.free_logits is not None:
        alike = report.images_alike
        some = "" if alike == report.images else f", {alike} images of the same choices"
        free = report.free_logits
        rows.append((f"{free.name}, free-running{some}", f"{free.relative:.1e}", _limit(free)))
    # Of a quantised export alone these shares are judged.
    top1, kept = ("", "") if report.limits is None else (report.limits.top1, report.limits.kept)
    for stage, share in enumerate(report.kept_agreement):
        name = f"kept positions agreed, stage {stage}"
        rows.append((name, f"{share:.2%}", kept and f"at least {kept:.0%}"))
    if report.top1_agreement is not None:
        agreed = f"{report.top1_agreement:.0%}"
        rows.append(("top-1 agreement", agreed, top1 and f"at least {top1:.0%}"))
    if report.labels is not None:
        rows.append(("labels agreed", f"{report.labels.agreement:.4%}", ""))
    for found in report.detections:
        rows.append((f"detections found, {found.name}", f"{found.found} of {found.clear}", ""))
        rows.append(("  largest error of a box, pixels", f"{found.boxes:.1e}", ""))
        rows.append(("  largest error of a score", f"{found.scores:.1e}", ""))
    return rows


def _limit(comparison: Comparison) -> str:
    # Of a quantised export its signals are judged.
    return f"{comparison.tolerance:.0e}" if math.isfinite(comparison.tolerance) else ""


def bench_tables(report: BenchReport) -> list[ReportTable]:
    """What ran where, times of every subject, and where the kernel session spends its own."""
    from vssm.runtimes.session import plural

    columns = ("subject", "median", "p95", "images/s", "floor", "x floor", "diff")
    groups: dict[tuple[int, int, int], list[Timing]] = {}
    for row in report.rows:
        groups.setdefault((row.batch, row.threads, row.samples), []).append(row)
    times = [
        table(
            f"batch {batch}, {plural(threads, 'thread')}: ms per batch, {samples} samples",
            columns,
            (
                (
                    r.subject,
                    f"{r.median_ms:.2f}",
                    f"{r.p95_ms:.2f}",
                    f"{r.images_per_s:.1f}",
                    None if r.floor_ms is None else f"{r.floor_ms:.2f}",
                    None if r.over_floor is None else f"{r.over_floor:.2f}",
                    None if r.difference is None else f"{r.difference:.0e}",
                )
                for r in rows
            ),
        )
        for (batch, threads, samples), rows in groups.items()
    ]
    measured = [table("measured", ("", ""), report.context.items()), *times]
    if not report.operators:
        return measured
    total = sum(report.operators.values())
    kinds = table(
        "one image, one thread, with kernels",
        ("kind of work", "ms", "share", "floor", "x floor"),
        (
            (
                k.kind,
                f"{k.ms:.3f}",
                f"{k.ms / total:.0%}",
                None if k.floor_ms is None else f"{k.floor_ms:.3f}",
                None if k.over_floor is None else f"{k.over_floor:.2f}",
            )
            for k in report.kinds
        ),
    )
    spent = table(
        "the same by operator",
        ("operator", "ms", "share"),
        # The largest, as the session sorts them; --json has them all.
        ((k, f"{v:.3f}", f"{v / total:.0%}") for k, v in list(report.operators.items())[:12]),
    )
    return [*measured, kinds, spent]


def findings_table(findings: Sequence[Finding]) -> ReportTable:
    """What `doctor` found, with the remedy of what is absent."""
    return table(
        "vssm doctor",
        ("part", "there", "found; what brings it in"),
        ((f.part, f.found, f"{f.detail}; {f.remedy}" if f.remedy else f.detail) for f in findings),
    )
