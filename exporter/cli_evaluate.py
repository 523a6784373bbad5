"""The command `vssm evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from exporter.cli_options import Json
from exporter.json_files import write_json
from exporter.pipeline_evaluate import evaluate as evaluate_export
from exporter.training.evaluate import EvaluationReport

_SHOWN = 20  # unreadable images; the results file has them all
console = Console(markup=False, emoji=False)


def evaluate(
    directory: Annotated[Path, typer.Argument(help="What `vssm export` wrote.")],
    images: Annotated[Path, typer.Argument(help="Folder with a folder of images for each class.")],
    *,
    runtime: Annotated[str, typer.Option(help="ort-cpu, ort-cuda or torch.")] = "ort-cpu",
    operators: Annotated[
        str | None, typer.Option(help="kernel (the default) or body, for ONNX Runtime.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of a run; all cores.")] = None,
    batch: Annotated[int, typer.Option(help="Images of a run.")] = 32,
    workers: Annotated[
        int | None, typer.Option(help="Processes that load images; 0 for none besides.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="File naming the folder of each class; by name without.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="CSV file, a row an image; DIR/evaluate.csv.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, not where an evaluation was stopped.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Measure top-1 and top-5 over a folder of images; goes on where a stopped run ended."""
    with console.status("evaluating") as status:
        report = evaluate_export(
            directory,
            images,
            runtime,
            operators=operators,
            threads=threads,
            batch=batch,
            workers=workers,
            classes=classes,
            results=results,
            restart=restart,
            progress=lambda line: status.update(Text(line)),
        )
    _print(report)
    if json_file is not None:
        write_json(json_file, report)


def _print(report: EvaluationReport) -> None:
    from exporter.tables import table

    readable = report.images - len(report.unreadable)
    speed = "-" if report.images_per_s is None else f"{report.images_per_s:.1f}"
    rows = (
        ("top-1", f"{report.top1:.2%}"),
        ("top-5", f"{report.top5:.2%}"),
        ("images", f"{readable:,}"),
        ("images that cannot be read", f"{len(report.unreadable):,}"),
        ("images of the run that was stopped", f"{report.resumed:,}"),
        ("images/s, loading included", speed),
    )
    console.print(table(str(report.info), ("", "measured"), rows))
    for path, error in report.unreadable[:_SHOWN]:
        console.print(Text.assemble(("not read", "yellow"), f": {path}: {error}"), soft_wrap=True)
    if len(report.unreadable) > _SHOWN:
        console.print(f"and {len(report.unreadable) - _SHOWN:,} more, in {report.results}")
    console.print(f"wrote {report.results}", soft_wrap=True)
