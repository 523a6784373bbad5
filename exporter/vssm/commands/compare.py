"""The command `vssm compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vssm.commands.options import (
    Classes,
    Folder,
    HeadWidth,
    Json,
    ModelOptions,
    Runtime,
    Schedule,
    Threads,
    options,
)
from vssm.commands.tables import say, show, table, working, write_result
from vssm.training.request import ModelSource


def compare(
    contestants: Annotated[
        list[Path],
        typer.Argument(help="Two or more: exports, checkpoints, evaluate.csv files."),
    ],
    output: Folder,
    *,
    images: Annotated[
        Path | None, typer.Option(help="Folder with a folder of images for each class.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="What checkpoints are of.")] = None,
    schedule: Schedule = None,
    num_classes: HeadWidth = None,
    option: ModelOptions = None,
    runtime: Runtime = "ort-cpu",
    threads: Threads = None,
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 32,
    workers: Annotated[
        int | None, typer.Option(help="Processes that load images; by default by the cores.")
    ] = None,
    classes: Classes = None,
    show_images: Annotated[
        int, typer.Option("--show", help="Disagreement images on the page.")
    ] = 48,
    json_file: Json = None,
) -> None:
    """Compare classifiers on the same images: paired differences, disagreements, time."""
    from vssm.studies.compare import (
        ACCURACY_COLUMNS,
        PAGE,
        PAIR_COLUMNS,
        CompareOptions,
        accuracy_cells,
        pair_cells,
    )
    from vssm.studies.compare import compare as compare_all

    given = {"schedule": schedule, "num-classes": num_classes, "set": option}
    if model is None and (named := [name for name, value in given.items() if value is not None]):
        raise ValueError(f"--{named[0]} without --model says nothing of checkpoints; give both")
    source = None
    if model is not None:
        source = ModelSource(
            model, schedule=schedule, num_classes=num_classes, options=options(option)
        )
    asked = CompareOptions(images, source, runtime, threads, batch, workers, classes, show_images)
    with working("opening what is compared", leaves="the same command goes on") as tell:
        report = compare_all(contestants, output, asked, progress=tell)
    for name, value in report.facts.items():
        say(f"{name}: {value}")
    show(
        table("top-1", ACCURACY_COLUMNS, map(accuracy_cells, report.contestants)),
        table("paired differences", PAIR_COLUMNS, map(pair_cells, report.pairs)),
    )
    say(f"{len(report.disagreements):,} images on which they disagree; wrote {output / PAGE}")
    write_result(json_file, report)
