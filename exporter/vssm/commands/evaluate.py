"""The command `vssm evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from vssm.commands.options import (
    Classes,
    Directory,
    Images,
    Json,
    Operators,
    Runtime,
    Threads,
    say_folders,
    telling,
)
from vssm.evaluation.evaluate import EvaluationReport
from vssm.evaluation.evaluate import evaluate as evaluate_export
from vssm.files.json import write_json

_SHOWN = 20  # unreadable images; the results file has them all
console = Console(markup=False, emoji=False)


def evaluate(
    directory: Directory,
    images: Images,
    *,
    runtime: Runtime = "ort-cpu",
    backend: Operators = None,
    threads: Threads = None,
    batch: Annotated[int, typer.Option(help="Images a batch.")] = 32,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that load images, up to four by default; 0: this one."),
    ] = None,
    classes: Classes = None,
    results: Annotated[
        Path | None, typer.Option(help="CSV file, a row an image; DIR/evaluate.csv by default.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, not where an evaluation was stopped.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Measure top-1 and top-5 over a folder of images; goes on where a stopped run ended."""
    with telling(console, "evaluating") as tell:
        report = evaluate_export(
            directory,
            images,
            runtime,
            backend=backend,
            threads=threads,
            batch=batch,
            workers=workers,
            classes=classes,
            results=results,
            restart=restart,
            progress=tell,
        )
    _print(report)
    if json_file is not None:
        write_json(json_file, report)


def _print(report: EvaluationReport) -> None:
    from vssm.commands.tables import table

    readable = report.images - len(report.unreadable)
    speed = "-" if report.images_per_s is None else f"{report.images_per_s:.1f}"
    rows = [
        ("top-1", f"{report.top1:.2%}"),
        ("top-5", f"{report.top5:.2%}"),
        ("images", f"{readable:,}"),
        ("images that cannot be read", f"{len(report.unreadable):,}"),
        ("images/s, loading included", speed),
    ]
    if report.resumed:
        rows.insert(4, ("images of the run that was stopped", f"{report.resumed:,}"))
    console.print(table(str(report.info), ("", "measured"), rows))
    say_folders(console, report.classes, report.notes)
    for path, error in report.unreadable[:_SHOWN]:
        console.print(Text.assemble(("not read", "yellow"), f": {path}: {error}"), soft_wrap=True)
    if len(report.unreadable) > _SHOWN:
        console.print(f"and {len(report.unreadable) - _SHOWN:,} more, in {report.results}")
    console.print(f"wrote {report.results}", soft_wrap=True)
