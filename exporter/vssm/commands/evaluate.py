"""The command `vssm evaluate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vssm.commands.options import (
    Backend,
    Classes,
    Directory,
    Images,
    Json,
    RayActors,
    RayAddress,
    RayGpus,
    Runtime,
    Threads,
    Workers,
    ray_options,
)
from vssm.commands.tables import (
    say,
    say_folders,
    say_unreadable,
    show,
    table,
    working,
    write_result,
)

if TYPE_CHECKING:
    from vssm.evaluation.detection import DetectionReport
    from vssm.evaluation.evaluate import EvaluationReport, Report
    from vssm.evaluation.segmentation import SegmentationReport


def evaluate(
    directory: Directory,
    images: Images,
    *,
    runtime: Runtime = "ort-cpu",
    backend: Backend = None,
    threads: Threads = None,
    batch: Annotated[
        int | None, typer.Option(help="Images per batch of a classifier, 32 by default.")
    ] = None,
    workers: Workers = None,
    classes: Classes = None,
    split: Annotated[
        str | None,
        typer.Option(help="Part of ADE20K (by default validation) or COCO (val2017)."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="CSV file, one row per image. Default: DIR/evaluate.csv.")
    ] = None,
    ray: RayAddress = None,
    ray_actors: RayActors = None,
    ray_gpus: RayGpus = 0,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, not where an evaluation was stopped.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Measure accuracy, mIoU or AP over a folder; goes on where a stopped run ended."""
    # It checks the options itself, before any work.
    with working("opening the model", leaves="the same command goes on") as tell:
        from vssm.evaluation.evaluate import evaluate as evaluate_export

        report = evaluate_export(
            directory,
            images,
            runtime,
            backend=backend,
            threads=threads,
            batch=batch,
            workers=workers,
            classes=classes,
            split=split,
            results=results,
            restart=restart,
            ray=ray_options(ray, ray_actors, ray_gpus),
            progress=tell,
        )
    _print(report)
    write_result(json_file, report)


def _print(report: Report) -> None:
    from vssm.evaluation.detection import DetectionReport
    from vssm.evaluation.segmentation import SegmentationReport

    if isinstance(report, SegmentationReport):
        _print_segmentation(report)
    elif isinstance(report, DetectionReport):
        _print_detection(report)
    else:
        _print_classification(report)
    say_unreadable(report.unreadable, report.results)
    say(f"wrote {report.results}")


def _print_classification(report: EvaluationReport) -> None:
    scores = [("top-1", f"{report.top1:.2%}"), ("top-5", f"{report.top5:.2%}")]
    show(table(str(report.info), ("", "measured"), scores + _images(report)))
    say_folders(report.classes, report.notes)


def _print_segmentation(report: SegmentationReport) -> None:
    scores = [
        ("mIoU", f"{report.miou:.2%}"),
        ("mAcc", f"{report.macc:.2%}"),
        ("aAcc", f"{report.aacc:.2%}"),
    ]
    classes = (
        (score.name, *(None if s is None else f"{s:.2%}" for s in (score.iou, score.accuracy)))
        for score in report.classes
    )
    show(
        table("classes", ("class", "IoU", "accuracy"), classes),
        table(str(report.info), ("", "measured"), scores + _images(report)),
    )
    for note in report.notes:
        say(("note", "yellow"), f": {note}")


def _print_detection(report: DetectionReport) -> None:
    boxes, masks = report.box, report.mask
    scores = [
        (name.replace("_", " ").replace("ap", "AP").replace("ar", "AR"), _share(value), shown)
        for name, value in asdict(boxes).items()
        for shown in [_share(None if masks is None else getattr(masks, name))]
    ]
    classes = ((c.name, _share(c.box_ap), _share(c.mask_ap), c.objects) for c in report.classes)
    show(
        table("classes", ("class", "box AP", "mask AP", "objects"), classes),
        table("COCO's numbers", ("", "boxes", "masks"), scores),
        table(str(report.info), ("", "measured"), _images(report)),
    )
    say_folders(report.rule, report.notes)
    say(f"wrote {report.detections}")


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _images(report: Report) -> list[tuple[str, str]]:
    speed = "-" if report.images_per_s is None else f"{report.images_per_s:.1f}"
    stopped = ("images of the run that was stopped", f"{report.resumed:,}")
    return [
        ("images", f"{report.images - len(report.unreadable):,}"),
        ("images that cannot be read", f"{len(report.unreadable):,}"),
        *([stopped] if report.resumed else []),
        ("images/s, loading included", speed),
    ]
