"""The command `vssm predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vssm.commands.options import (
    Backend,
    Directory,
    Json,
    RayActors,
    RayAddress,
    RayGpus,
    Runtime,
    Threads,
    Workers,
    ray_options,
)
from vssm.commands.tables import say, say_unreadable, show, table, working, write_result


def predict(
    directory: Directory,
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of images; list of files (.txt); .tar or .parquet, or a folder of such."
        ),
    ],
    *,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Parquet file, one row per image.")
    ],
    runtime: Runtime = "ort-cpu",
    backend: Backend = None,
    threads: Threads = None,
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 32,
    block: Annotated[int, typer.Option(help="Images that are written at once.")] = 1024,
    workers: Workers = None,
    top: Annotated[int, typer.Option(help="Classes per row.")] = 5,
    tensor: Annotated[
        list[str] | None,
        typer.Option(help="Also write this output of the model, such as features; repeatable."),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Of a Parquet source, where several hold bytes.")
    ] = None,
    ray: RayAddress = None,
    ray_actors: RayActors = None,
    ray_gpus: RayGpus = 0,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, not where a prediction was stopped.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Classify many images into a Parquet file; goes on where a stopped run ended."""
    # It checks the options itself, before any work.
    with working("opening the model", leaves="the same command goes on") as tell:
        from vssm.evaluation.predict import predict as predict_images

        report = predict_images(
            directory,
            source,
            output,
            runtime,
            backend=backend,
            threads=threads,
            batch=batch,
            block=block,
            workers=workers,
            top=top,
            tensors=tensor or (),
            column=column,
            ray=ray_options(ray, ray_actors, ray_gpus),
            restart=restart,
            progress=tell,
        )
    speed = "-" if report.images_per_s is None else f"{report.images_per_s:.1f}"
    rows = [
        ("images", f"{report.images:,}"),
        ("images that cannot be read", f"{len(report.unreadable):,}"),
        ("images/s, loading included", speed),
    ]
    if report.resumed:
        rows.insert(2, ("images of the run that was stopped", f"{report.resumed:,}"))
    show(table(str(report.info), ("", "predicted"), rows))
    for note in report.notes:
        say(("note", "yellow"), f": {note}")
    say_unreadable(report.unreadable, report.output)
    say(f"wrote {report.output}")
    write_result(json_file, report)
