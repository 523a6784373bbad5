"""Average precision of a detector over a COCO-layout folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vssm.artifact.manifest import Manifest, Preprocessing
from vssm.artifact.preprocessing import FloatArray, open_rgb, padded, preprocessing_of
from vssm.evaluation.coco import (
    CocoFolder,
    CocoImage,
    Precision,
    open_coco,
    precision_of,
)
from vssm.evaluation.data import in_order
from vssm.evaluation.detect import coco_results, detect_padded
from vssm.evaluation.pace import refuse_unreadable, take_all
from vssm.files.atomic import atomic_write_bytes, check_writable
from vssm.files.journal import JsonJournal
from vssm.files.table import table_bytes
from vssm.runtimes.session import RuntimeInfo, Session
from vssm.types import Steps

COLUMNS = ("image", "number", "objects", "found", "best_score", "error")


@dataclass(frozen=True)
class CategoryScore:
    """One class: its name and average precision; None where no image has it.

    `mask_ap` is None for a detector without masks too.
    """

    name: str
    box_ap: float | None
    mask_ap: float | None
    objects: int


@dataclass(frozen=True)
class DetectionReport:
    """What the evaluation of a detector found.

    Attributes:
        info: what ran.
        split: the folder of images.
        rule: how categories were matched to the model's classes.
        notes: what else one should know.
        images: in the annotations.
        unreadable: of these, the ones that are no readable images: path and error. They count in
            no number, nor do their objects.
        box: of boxes.
        mask: of masks; None for a detector or for annotations without them.
        classes: those of the annotations, in the model's order.
        resumed: images whose results an interrupted run before had left.
        seconds: spent on the others, loading included.
        images_per_s: over these seconds; None where nothing was left to do.
        workers: processes that loaded images.
        results: the CSV file with a row for each image.
        detections: the file of all that was found, in COCO's format of results.
    """

    info: RuntimeInfo
    split: str
    rule: str
    notes: tuple[str, ...]
    images: int
    unreadable: tuple[tuple[str, str], ...]
    box: Precision
    mask: Precision | None
    classes: tuple[CategoryScore, ...]
    resumed: int
    seconds: float
    images_per_s: float | None
    workers: int
    results: str
    detections: str


@dataclass(frozen=True)
class ImageObjects:
    """The result for one image.

    Attributes:
        found: rows of COCO's format of results.
        error: why the image could not be read.
    """

    found: Sequence[Mapping[str, Any]] = ()
    error: str | None = None


class Journal(JsonJournal[ImageObjects]):
    """The journal of one evaluation, an entry an image."""

    what = "evaluation"
    option = "--results"

    @staticmethod
    def to_json(entry: ImageObjects) -> Any:
        """The rows and the error."""
        return [list(entry.found), entry.error]

    @staticmethod
    def from_json(document: Any) -> ImageObjects:
        """The entry again."""
        rows, error = document
        return ImageObjects(rows, error)


@dataclass(frozen=True)
class Detection:
    """One evaluation of a detector: what is measured, and on what.

    Attributes:
        folder: the images and annotations.
        spec: how images are prepared.
        masks: whether the detector gives masks.
        workers: processes that load images.
    """

    folder: CocoFolder
    spec: Preprocessing
    masks: bool
    workers: int

    journal = Journal

    @classmethod
    def of(cls, manifest: Manifest, root: Path, split: str, workers: int) -> Detection:
        """Of the export with this manifest, over a folder.

        Raises:
            ValueError: the folder does not fit.
            MissingPackageError: pycocotools is not installed.
        """
        classes = int(manifest.config["num_classes"])
        spec = preprocessing_of(manifest)
        masks = any(output.name == "masks" for output in manifest.outputs)
        return cls(open_coco(root, split, classes, labels=manifest.labels), spec, masks, workers)

    @property
    def header(self) -> dict[str, str]:
        """What the results depend on beside the model and its runtime."""
        return {"images": self.folder.fingerprint(), "split": self.folder.split}

    def run(
        self, session: Session, journal: Journal, results: Path, progress: Steps
    ) -> DetectionReport:
        """Measure the images that the journal lacks, then write the results.

        Raises:
            ValueError: an image has another size than its annotation says, or none can be read.
            ArtifactError: a file cannot be written.
        """
        images, detections = self.folder.images, results.with_suffix(".coco.json")
        check_writable(detections)
        count = 0

        def add(entry: ImageObjects) -> str:
            nonlocal count
            count += len(entry.found)
            return f"{count:,} objects found"

        entries = self._measured(session, images[len(journal.done) :])
        pace = take_all(entries, journal, len(images), add, progress)
        pairs = list(zip(images, journal.done, strict=True))
        unreadable = tuple((i.path, e.error) for i, e in pairs if e.error is not None)
        refuse_unreadable(unreadable, len(images))
        rows = [row for entry in journal.done for row in entry.found]
        readable = [image.number for image, entry in pairs if entry.error is None]
        box, by_box = precision_of(self.folder, rows, "bbox", readable)
        mask: Precision | None = None
        by_mask: dict[int, float | None] = {}
        notes: tuple[str, ...] = ()
        if self.masks and self.folder.has_masks():
            mask, by_mask = precision_of(self.folder, rows, "segm", readable)
        elif self.masks:
            notes = ("annotations have no masks for every object, so boxes alone are judged",)
        atomic_write_bytes(results, table_bytes(COLUMNS, map(self._row, images, journal.done)))
        atomic_write_bytes(detections, json.dumps(rows).encode())
        return DetectionReport(
            info=session.info,
            split=self.folder.split,
            rule=self.folder.rule,
            notes=notes,
            images=len(images),
            unreadable=unreadable,
            box=box,
            mask=mask,
            classes=self._classes(by_box, by_mask),
            resumed=pace.resumed,
            seconds=pace.seconds,
            images_per_s=pace.images_per_s,
            workers=self.workers,
            results=str(results),
            detections=str(detections),
        )

    def _measured(self, session: Session, images: Sequence[CocoImage]) -> Iterator[ImageObjects]:
        load = functools.partial(_load, root=self.folder.root, spec=self.spec)
        numbers = {c: number for c, (number, _) in self.folder.categories.items()}
        loaded = in_order(load, images, workers=self.workers)
        for image, (pixels, inside, error) in zip(images, loaded, strict=True):
            if error is not None:
                yield ImageObjects(error=error)
                continue
            found = detect_padded(session, pixels, inside, (image.height, image.width))
            yield ImageObjects(coco_results(found, image.number, numbers=numbers))

    def _row(self, image: CocoImage, entry: ImageObjects) -> tuple[object, ...]:
        objects = len(self.folder.truth.imgToAnns[image.number])
        if entry.error is not None:
            return image.path, image.number, objects, "", "", entry.error
        best = max((row["score"] for row in entry.found), default=None)
        shown = "" if best is None else f"{best:.6f}"
        return image.path, image.number, objects, len(entry.found), shown, ""

    def _classes(
        self, by_box: Mapping[int, float | None], by_mask: Mapping[int, float | None]
    ) -> tuple[CategoryScore, ...]:
        truth = self.folder.truth
        return tuple(
            CategoryScore(
                name=name,
                box_ap=by_box[number],
                mask_ap=by_mask.get(number),
                objects=len(truth.getAnnIds(catIds=[number])),
            )
            for number, name in self.folder.categories.values()
        )


def _load(
    image: CocoImage, *, root: Path, spec: Preprocessing
) -> tuple[FloatArray, tuple[int, int], str | None]:
    """The input (3, height, width) of an image and its size inside, or why it cannot be read."""
    try:
        opened = open_rgb(root / image.path, spec)
    except ValueError as error:
        return np.empty((3, 0, 0), np.float32), (0, 0), str(error)
    if (opened.height, opened.width) != (image.height, image.width):
        raise ValueError(
            f"image={root / image.path} has {opened.width}x{opened.height} pixels, but its "
            f"annotation says {image.width}x{image.height}; give the images that were annotated"
        )
    return *padded(opened, spec), None
