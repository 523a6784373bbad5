"""`vssm evaluate` as a function: an export, a folder of images, a runtime."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from vssm.artifact.directory import EXPORT_FILES, MODEL_FILE, Artifact, open_artifact
from vssm.artifact.manifest import MANIFEST_NAME, Manifest, Preprocessing
from vssm.artifact.preprocessing import preprocessing_of
from vssm.errors import check_least
from vssm.evaluation.blocks import BlockFiles, BlockHeader, cut, held_folder
from vssm.evaluation.class_rows import ClassRows, image_results, results_of
from vssm.evaluation.data import (
    ImageFolder,
    Picture,
    load_in_order,
    open_images,
)
from vssm.evaluation.detection import Detection, DetectionReport
from vssm.evaluation.folders import ClassesGiven
from vssm.evaluation.journal import ImageResult, Journal
from vssm.evaluation.label_maps import is_segmenter
from vssm.evaluation.pace import Pace, refuse_unreadable, take_all
from vssm.evaluation.scorers import check_ray, open_scorer
from vssm.evaluation.scoring import RayOptions, Scoring
from vssm.evaluation.segmentation import Segmentation, SegmentationReport
from vssm.files.atomic import (
    atomic_write_bytes,
    check_writable,
    discard_unfinished,
    sha256_of,
)
from vssm.files.journal import JsonJournal
from vssm.files.json import write_json
from vssm.files.progress import automatic, shows_progress
from vssm.files.table import table_bytes
from vssm.models.registry import cards
from vssm.runtimes.open import ENGINE_RUNTIMES, check_runtime, open_session
from vssm.runtimes.session import RuntimeInfo, Session, share_cores
from vssm.types import Steps

COLUMNS = (
    *("image", "class", "predicted", "top5", "correct", "correct_top5"),
    *("probability", "probability_of_class", "error"),
)


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        info: what ran.
        classes: how the folders were matched to the model's classes.
        notes: what else is in the folder: empty classes, files that were passed over.
        images: files in the folder.
        unreadable: of these, the ones that are no readable images: path and error. They count in
            neither accuracy.
        top1: share of the readable images whose class came first.
        top5: share whose class is among the first five.
        resumed: images whose results an interrupted run before had left.
        seconds: spent on the others, loading included.
        images_per_s: over these seconds; None where nothing was left to do.
        batch: images of a run.
        workers: processes that loaded images.
        actors: sessions on a Ray cluster; 0 where this process had the only one.
        results: the CSV file with a row for each image.
    """

    info: RuntimeInfo
    classes: str
    notes: tuple[str, ...]
    images: int
    unreadable: tuple[tuple[str, str], ...]
    top1: float
    top5: float
    resumed: int
    seconds: float
    images_per_s: float | None
    batch: int
    workers: int
    actors: int
    results: str


@dataclass(frozen=True)
class Classification:
    """One evaluation of a classifier: what is measured, and on what.

    Attributes:
        folder: the pictures.
        spec: how images are prepared.
        batch: images of a run.
        workers: processes that load images.
    """

    folder: ImageFolder
    spec: Preprocessing
    batch: int
    workers: int

    journal = Journal

    @property
    def header(self) -> dict[str, str]:
        """What the results depend on beside the model and its runtime."""
        folder = self.folder
        return {
            "images": folder.fingerprint(),
            "classes": folder.rule,
            "batch": str(self.batch),
        }

    def run(
        self, session: Session, journal: Journal, results: Path, progress: Steps
    ) -> EvaluationReport:
        """Run the batches that the journal lacks, then write the results.

        Raises:
            ValueError: logits are not finite, or no image can be read.
            ArtifactError: a file cannot be written.
        """
        pictures, batch, tally = self.folder.pictures, self.batch, _Tally()
        left = [pictures[i : i + batch] for i in range(0, len(pictures), batch)]
        left = left[len(journal.done) :]
        files = [self.folder.places(some) for some in left]
        loads = load_in_order(files, self.spec, workers=self.workers)
        entries = (
            list(image_results(session, some, loaded))
            for some, loaded in zip(left, loads, strict=True)
        )

        def add(rows: Sequence[ImageResult]) -> str:
            tally.add(pictures[tally.images : tally.images + len(rows)], rows)
            return str(tally)

        pace = take_all(entries, journal, len(pictures), add, progress, size=len)
        done = [row for entry in journal.done for row in entry]
        return self.report(session.info, done, results, pace)

    def report(
        self,
        info: RuntimeInfo,
        rows: Sequence[ImageResult],
        results: Path,
        pace: Pace,
        *,
        actors: int = 0,
    ) -> EvaluationReport:
        """Write the rows of all pictures, and count them.

        Raises:
            ValueError: no image can be read.
            ArtifactError: the file cannot be written.
        """
        pictures, tally = self.folder.pictures, _Tally()
        tally.add(pictures, rows)
        pairs = zip(pictures, rows, strict=True)
        atomic_write_bytes(results, table_bytes(COLUMNS, (_columns(*pair) for pair in pairs)))
        first, five = tally.shares()
        return EvaluationReport(
            info=info,
            classes=self.folder.rule,
            notes=self.folder.notes,
            images=len(rows),
            unreadable=tuple(tally.unreadable),
            top1=first,
            top5=five,
            resumed=pace.resumed,
            seconds=pace.seconds,
            images_per_s=pace.images_per_s,
            batch=self.batch,
            workers=self.workers,
            actors=actors,
            results=str(results),
        )


class _Tally:
    """What has been counted so far."""

    def __init__(self) -> None:
        self.images = self.first = self.five = 0
        self.unreadable: list[tuple[str, str]] = []

    def add(self, pictures: Sequence[Picture], rows: Sequence[ImageResult]) -> None:
        for picture, row in zip(pictures, rows, strict=True):
            self.images += 1
            if row.error is not None:
                self.unreadable.append((picture.path, row.error))
                continue
            self.first += picture.target == row.top[0]
            self.five += picture.target in row.top

    def shares(self) -> tuple[float, float]:
        """Top-1 and top-5 over the readable images."""
        refuse_unreadable(self.unreadable, self.images)
        readable = self.images - len(self.unreadable)
        return self.first / readable, self.five / readable

    def __str__(self) -> str:
        readable = self.images - len(self.unreadable)
        return f"top-1 {self.first / readable:.2%}" if readable else ""


def _columns(picture: Picture, row: ImageResult) -> tuple[object, ...]:
    if row.error is not None:
        return picture.path, picture.target, "", "", "", "", "", "", row.error
    right, among = picture.target == row.top[0], picture.target in row.top
    chances = f"{row.best:.6f}", f"{row.target:.6f}"
    top = " ".join(map(str, row.top))
    return picture.path, picture.target, row.top[0], top, int(right), int(among), *chances, ""


RESULTS_FILE = "evaluate.csv"
_BATCH = 32
_BATCHES_A_BLOCK = 8
_SPLIT = "validation"  # ADE20K's name
_COCO_SPLIT = "val2017"
Report = EvaluationReport | SegmentationReport | DetectionReport


class _Measure(Protocol):
    """What is measured, and on what; each has entries of its own in its journal."""

    @property
    def journal(self) -> type[JsonJournal[Any]]: ...

    @property
    def header(self) -> dict[str, str]: ...

    def run(self, session: Session, journal: Any, results: Path, progress: Steps) -> Report: ...


_OWN_FILES = (RESULTS_FILE, "evaluate.json", "evaluate.coco.json")


@shows_progress
def evaluate(
    artifact: Artifact | str | os.PathLike[str],
    images: str | os.PathLike[str],
    runtime: str = "ort-cpu",
    *,
    backend: str | None = None,
    threads: int | None = None,
    batch: int | None = None,
    workers: int | None = None,
    classes: ClassesGiven = None,
    split: str | None = None,
    results: str | os.PathLike[str] | None = None,
    restart: bool = False,
    ray: RayOptions | None = None,
    progress: Steps = automatic,
) -> Report:
    """How good an export is, over a folder of images: a classifier, a segmenter or a detector.

    Of a classifier top-1 and top-5 accuracy, over a folder that holds one folder a class. Of a
    segmenter intersection over union and accuracy of its classes, over a folder that holds
    images/SPLIT and annotations/SPLIT, as ADE20K does. Of a detector that gives boxes their average
    precision, and that of masks, over a folder that holds SPLIT and
    annotations/instances_SPLIT.json, as COCO does.

    An interrupted evaluation, a killed one too, goes on at its next call where it ended, and ends
    with the same results file. The report is written beside that, as JSON.

    Args:
        artifact: the export, or its directory.
        images: the folder, laid out as ImageNet's validation set, ADE20K or COCO.
        runtime: as for `open_session`.
        backend: as for `open_session`.
        threads: as for `open_session`, but None for as many as `workers` leave cores.
        batch: images of one run; None for 32. Others than classifiers see one at a time.
        workers: processes that load images; 0 for this one alone; None for up to four,
            as many as `threads` leave cores.
        classes: file that names the folder of each class, as `read_labels` takes it; "numeric" or
            "text": the order of their names; None: by the export's labels, else by name, where
            that is certain (docs/evaluate.md). For classifiers alone.
        split: of a segmenter's set, the folder in images and annotations, "." where there is none
            between; of a detector's, the folder of images. None for "validation", or "val2017".
        results: CSV file with a row for each image; None for evaluate.csv in the export.
        restart: begin anew, whatever an interrupted evaluation has left.
        ray: run a classifier on a Ray cluster, whose nodes see the export, the images and the
            results under the same paths; None for this process.
        progress: called with how far it is; a bar in a terminal or a notebook by default.

    Raises:
        ValueError: an argument is out of its range or of no use to the model, it is not certain
            which folder is which class, an annotation does not fit, or no image can be read.
        ArtifactError: the export was changed, a file cannot be written, or what an interrupted
            evaluation left is of another one.
        MissingPackageError: a detector without pycocotools.
        RuntimeUnavailableError, UnsupportedError: as for `open_session`.
        MissingPackageError: Ray is not installed.
        VssmError: the cluster cannot be reached, or cannot hold an actor.
    """
    check_runtime(runtime, backend=backend, threads=threads)
    check_ray(ray, workers)
    cores, workers = share_cores(threads, 0 if ray is not None else workers)
    check_least(1, batch=batch)
    opened = open_artifact(artifact, only=(MODEL_FILE,))
    target = opened.directory / RESULTS_FILE if results is None else Path(results)
    summary = _summary_of(target, opened)
    what = _measure_of(
        opened, Path(images), batch=batch, workers=workers, classes=classes, split=split
    )
    if ray is not None:
        if not isinstance(what, Classification):
            raise ValueError(f"ray={ray} is for classifiers alone; leave it out")
        rows = ClassRows(what.folder.classes)
        scoring = Scoring(opened, runtime, backend, threads, rows, what.batch)
        places = target.absolute(), summary
        return _on_cluster(scoring, what, ray, places, restart=restart, progress=progress)
    threads = None if runtime in ENGINE_RUNTIMES else cores
    # Not spinning: beside other work, image loading too, a thread that spins takes the core that
    # the others need to come to their end.
    with open_session(opened, runtime, backend=backend, threads=threads, spin=False) as session:
        # All that the bytes of the results depend on; a journal under another header is refused.
        header = {
            **{key: str(value) for key, value in asdict(session.info).items()},
            "model": sha256_of(opened.directory / MANIFEST_NAME),
            **what.header,
        }
        path = target.with_name(f"{target.name}.journal")
        with what.journal(path, header, restart=restart) as journal:
            # Only now: whoever holds the journal's lock is the only run that writes beside these.
            for file in (target, summary):
                discard_unfinished(file)
            report = what.run(session, journal, target, progress)
            write_json(summary, report)
            # Last: killed at any point before, the next call still finds what was done.
            journal.remove()
    return report


class _Header(BlockHeader):
    what = "evaluation"
    option = "--results"


def _on_cluster(
    scoring: Scoring,
    what: Classification,
    ray: RayOptions,
    results_and_summary: tuple[Path, Path],
    *,
    restart: bool,
    progress: Steps,
) -> EvaluationReport:
    """Rows by a cluster, in blocks of whole batches, so that they are those of one process."""
    results, summary = results_and_summary
    names = [picture.path for picture in what.folder.pictures]
    places = what.folder.places(what.folder.pictures)
    files = BlockFiles(
        results.with_name(f"{results.name}.blocks"),
        cut(names, places, _BATCHES_A_BLOCK * what.batch),
        scoring.rows.schema(),
    )
    with open_scorer(scoring, ray, workers=0) as scorer:
        header = {
            **{key: str(value) for key, value in asdict(scorer.info).items()},
            "model": sha256_of(scoring.artifact.directory / MANIFEST_NAME),
            **what.header,
        }
        with held_folder(_Header, files.folder, header, restart=restart):
            for file in results_and_summary:
                discard_unfinished(file)
            left, start = files.left(), time.perf_counter()
            scorer.score(files, left, progress)
            seconds = time.perf_counter() - start
            rows = [row for table in files.tables() for row in results_of(table)]
            resumed = len(rows) - sum(len(block.names) for block in left)
            pace = Pace(len(rows), resumed, seconds)
            report = what.report(scorer.info, rows, results, pace, actors=scorer.actors)
            write_json(summary, report)
    return report


def _refuse(model: str, **options: object) -> None:
    """Refuse what the model has no use for, rather than leave it out."""
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option}={value}: {model} does not take it; leave it out")


def _measure_of(
    artifact: Artifact,
    root: Path,
    *,
    batch: int | None,
    workers: int,
    classes: ClassesGiven,
    split: str | None,
) -> _Measure:
    """What the model's task asks for."""
    manifest = artifact.manifest
    if is_segmenter(manifest):
        _refuse("a segmenter", batch=batch, classes=classes)
        return Segmentation.of(manifest, root, split or _SPLIT, workers)
    if manifest.gives_boxes:
        _refuse("a detector", batch=batch, classes=classes)
        return Detection.of(manifest, root, split or _COCO_SPLIT, workers)
    _refuse_parts(manifest)
    _refuse("a classifier", split=split)
    spec = preprocessing_of(artifact)
    folder = open_images(root, manifest.num_classes, labels=manifest.labels, classes=classes)
    return Classification(folder, spec, batch or _BATCH, workers)


def _refuse_parts(manifest: Manifest) -> None:
    """Refuse a part of a segmenter or detector, which gives nothing that could be judged."""
    card = cards().get(manifest.name)
    if card is not None and card.task != "classification":
        outputs = "boxes" if card.task == "detection" else "logits"
        raise ValueError(
            f"the export of {manifest.name} gives {manifest.main_output.name}, a part of what a "
            f"model for {card.task} finds, so there is nothing to judge; export it again with "
            f"--outputs {outputs}"
        )


def _summary_of(results: Path, artifact: Artifact) -> Path:
    """The report's file beside the results; neither may take the place of what is there."""
    if results.suffix == ".json" or not results.suffix:
        raise ValueError(
            f"results={results} is to be a CSV file, and the report goes beside it with the suffix "
            ".json; give a name that ends in .csv"
        )
    summary = results.with_suffix(".json")
    for path in (results, summary):
        check_writable(path)
        # Our own results may be replaced: that is what a second evaluation does.
        kept = {MANIFEST_NAME, *artifact.manifest.files, *EXPORT_FILES} - set(_OWN_FILES)
        if path.name in kept and path.parent.resolve() == artifact.directory.resolve():
            raise ValueError(
                f"results={results} would overwrite {path.name}, a file of the export; give another"
            )
    return summary
