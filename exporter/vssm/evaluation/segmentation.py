"""Intersection over union and accuracy of a segmenter over an ADE20K-layout folder.

Source: the definitions of mmsegmentation. Areas are summed over all images before anything is
divided; pixels without a class count nowhere; a class that is neither labelled nor predicted has
no intersection over union, one that is not labelled has no accuracy, and means leave them out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vssm.artifact.manifest import Manifest, Preprocessing
from vssm.artifact.preprocessing import FloatArray, normalised, open_rgb, preprocessing_of
from vssm.evaluation.data import in_order
from vssm.evaluation.pace import refuse_unreadable, take_all
from vssm.evaluation.scenes import (
    UNLABELLED,
    ClassMap,
    Scene,
    SceneFolder,
    check_class_count,
    open_scenes,
    read_classes,
)
from vssm.evaluation.segment import best_classes, segment
from vssm.files.atomic import atomic_write_bytes
from vssm.files.journal import JsonJournal
from vssm.files.table import table_bytes
from vssm.runtimes.session import RuntimeInfo, Session
from vssm.types import Array, Steps

COLUMNS = ("image", "pixels", "correct", "accuracy", "mean_iou", "areas", "error")


@dataclass(frozen=True)
class ClassScore:
    """One class over all images.

    Attributes:
        name: the class's, or its number.
        iou: intersection over union; None for a class that is neither labelled nor predicted.
        accuracy: share of its labelled pixels that were found; None where there are none.
        labelled: pixels with this class in the annotations.
        predicted: labelled pixels, of any class, that the model gives this class.
    """

    name: str
    iou: float | None
    accuracy: float | None
    labelled: int
    predicted: int


@dataclass(frozen=True)
class SegmentationReport:
    """What the evaluation of a segmenter found.

    Attributes:
        info: what ran.
        split: the folder of images.
        notes: what else is in the folder.
        images: in the folder.
        unreadable: of these, the ones that are no readable images: path and error. They count in
            no number.
        miou: mean intersection over union of the classes.
        macc: mean accuracy of the classes.
        aacc: share of all labelled pixels whose class was found.
        classes: each class, in the model's order.
        resumed: images whose results an interrupted run before had left.
        seconds: spent on the others, loading included.
        images_per_s: over these seconds; None where nothing was left to do.
        workers: processes that loaded images.
        results: the CSV file with a row for each image.
    """

    info: RuntimeInfo
    split: str
    notes: tuple[str, ...]
    images: int
    unreadable: tuple[tuple[str, str], ...]
    miou: float
    macc: float
    aacc: float
    classes: tuple[ClassScore, ...]
    resumed: int
    seconds: float
    images_per_s: float | None
    workers: int
    results: str


@dataclass(frozen=True)
class ImageAreas:
    """The result for one image.

    Attributes:
        areas: by class, the pixels that are found, predicted and labelled; without classes that
            have none.
        error: why the image could not be read.
    """

    areas: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)
    error: str | None = None


class Journal(JsonJournal[ImageAreas]):
    """The journal of one evaluation, an entry an image."""

    what = "evaluation"
    option = "--results"

    @staticmethod
    def to_json(entry: ImageAreas) -> Any:
        """The classes' areas as lists, and the error."""
        return [[[c, *areas] for c, areas in entry.areas.items()], entry.error]

    @staticmethod
    def from_json(document: Any) -> ImageAreas:
        """The areas again."""
        rows, error = document
        return ImageAreas({c: (found, given, true) for c, found, given, true in rows}, error)


def image_areas(predicted: Array, classes: ClassMap, num_classes: int) -> ImageAreas:
    """The areas of one image, by class.

    Args:
        predicted: (height, width), a class a pixel.
        classes: likewise, `UNLABELLED` where there is none.
        num_classes: of the model.
    """
    known = classes != UNLABELLED
    guesses, truth = predicted[known], classes[known]
    kinds = (truth[guesses == truth], guesses, truth)
    counts = np.stack([np.bincount(kind, minlength=num_classes) for kind in kinds], axis=1)
    some = counts.any(axis=1).nonzero()[0]
    rows = counts[some].tolist()
    return ImageAreas({int(c): (row[0], row[1], row[2]) for c, row in zip(some, rows, strict=True)})


@dataclass(frozen=True)
class Segmentation:
    """One evaluation of a segmenter: what is measured, and on what.

    Attributes:
        folder: the scenes.
        spec: how images are prepared.
        num_classes: of the model.
        names: of the classes; None where they have none.
        workers: processes that load images.
    """

    folder: SceneFolder
    spec: Preprocessing
    num_classes: int
    names: tuple[str, ...] | None
    workers: int

    journal = Journal

    @classmethod
    def of(cls, manifest: Manifest, root: Path, split: str, workers: int) -> Segmentation:
        """Of the export with this manifest, over a folder.

        Raises:
            ValueError: the folder does not fit, or the model has too many classes.
        """
        classes = int(manifest.main_output.shape[1])
        check_class_count(classes)
        spec = preprocessing_of(manifest)
        return cls(open_scenes(root, split), spec, classes, manifest.labels, workers)

    @property
    def header(self) -> dict[str, str]:
        """What the results depend on beside the model and its runtime."""
        return {"images": self.folder.fingerprint(), "split": self.folder.split}

    def run(
        self, session: Session, journal: Journal, results: Path, progress: Steps
    ) -> SegmentationReport:
        """Measure the images that the journal lacks, then write the results.

        Raises:
            ValueError: an annotation does not fit, or no image can be read.
            ArtifactError: a file cannot be written.
        """
        scenes, tally = self.folder.scenes, Tally(self.num_classes)

        def add(entry: ImageAreas) -> str:
            tally.add(entry)
            return str(tally)

        entries = self._measured(session, scenes[len(journal.done) :])
        pace = take_all(entries, journal, len(scenes), add, progress)
        rows = list(zip(scenes, journal.done, strict=True))
        unreadable = tuple((s.image, e.error) for s, e in rows if e.error is not None)
        refuse_unreadable(unreadable, len(scenes))
        miou, macc, aacc = tally.means()
        atomic_write_bytes(results, table_bytes(COLUMNS, (_row(*row) for row in rows)))
        return SegmentationReport(
            info=session.info,
            split=self.folder.split,
            notes=self.folder.notes,
            images=len(scenes),
            unreadable=unreadable,
            miou=miou,
            macc=macc,
            aacc=aacc,
            classes=tally.classes(self.names),
            resumed=pace.resumed,
            seconds=pace.seconds,
            images_per_s=pace.images_per_s,
            workers=self.workers,
            results=str(results),
        )

    def _measured(self, session: Session, scenes: Sequence[Scene]) -> Iterator[ImageAreas]:
        load = functools.partial(
            _load, root=self.folder.root, spec=self.spec, num_classes=self.num_classes
        )
        for pixels, classes, error in in_order(load, scenes, workers=self.workers):
            if error is not None:
                yield ImageAreas(error=error)
                continue
            logits = segment(session, pixels[None])
            height, width = classes.shape
            best = best_classes(logits, (height, width))
            yield image_areas(best, classes, self.num_classes)


class Tally:
    """The areas of all images so far."""

    def __init__(self, num_classes: int) -> None:
        self._areas = np.zeros((num_classes, 3), np.int64)

    def add(self, entry: ImageAreas) -> None:
        """Count an image."""
        for c, areas in entry.areas.items():
            self._areas[c] += areas

    def means(self) -> tuple[float, float, float]:
        """Mean intersection over union, mean accuracy, accuracy of all pixels.

        Raises:
            ValueError: no pixel of any image has a class.
        """
        found, _, labelled = self._areas.sum(axis=0)
        if labelled == 0:
            raise ValueError("images: no pixel of any of them has a class; give their annotations")
        scores = self.classes(None)
        ious = [score.iou for score in scores if score.iou is not None]
        shares = [score.accuracy for score in scores if score.accuracy is not None]
        return sum(ious) / len(ious), sum(shares) / len(shares), float(found / labelled)

    def classes(self, names: Sequence[str] | None) -> tuple[ClassScore, ...]:
        """Every class."""
        return tuple(
            ClassScore(
                name=str(c) if names is None else names[c],
                iou=_share(found, predicted + labelled - found),
                accuracy=_share(found, labelled),
                labelled=labelled,
                predicted=predicted,
            )
            for c, (found, predicted, labelled) in enumerate(self._areas.tolist())
        )

    def __str__(self) -> str:
        return f"mIoU {self.means()[0]:.2%}" if self._areas[:, 2].any() else ""


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _load(
    scene: Scene, *, root: Path, spec: Preprocessing, num_classes: int
) -> tuple[FloatArray, ClassMap, str | None]:
    """The input (3, height, width) of a scene and its classes, or why the image cannot be read."""
    try:
        image = open_rgb(root / scene.image, spec)
    except ValueError as error:
        return np.empty((3, 0, 0), np.float32), np.empty((0, 0), np.uint8), str(error)
    size = (image.height, image.width)
    return normalised(image, spec), read_classes(root / scene.annotation, num_classes, size), None


def _row(scene: Scene, entry: ImageAreas) -> tuple[object, ...]:
    if entry.error is not None:
        return scene.image, "", "", "", "", "", entry.error
    found, _, labelled = (sum(part) for part in zip((0, 0, 0), *entry.areas.values(), strict=True))
    ious = [f / (p + t - f) for f, p, t in entry.areas.values()]
    means = (_share(found, labelled), sum(ious) / len(ious) if ious else None)
    shown = ("" if mean is None else f"{mean:.6f}" for mean in means)
    areas = " ".join(":".join(map(str, (c, *some))) for c, some in entry.areas.items())
    return scene.image, labelled, found, *shown, areas, ""
