"""The command `vssm evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vssm.commands.options import Backend, Classes, Directory, Images, Json, Runtime, Threads
from vssm.commands.tables import (
    say,
    say_folders,
    say_unreadable,
    show,
    table,
    telling,
    write_result,
)

if TYPE_CHECKING:
    from vssm.evaluation.evaluate import EvaluationReport


def evaluate(
    directory: Directory,
    images: Images,
    *,
    runtime: Runtime = "ort-cpu",
    backend: Backend = None,
    threads: Threads = None,
    batch: Annotated[int, typer.Option(help="Images a batch.")] = 32,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that load images; by default none to four, by the cores."),
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
    from vssm.evaluation.evaluate import evaluate as evaluate_export

    # It checks the options itself, before any work.
    with telling("evaluating") as tell:
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
    write_result(json_file, report)


def _print(report: EvaluationReport) -> None:
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
    show(table(str(report.info), ("", "measured"), rows))
    say_folders(report.classes, report.notes)
    say_unreadable(report.unreadable, report.results)
    say(f"wrote {report.results}")
