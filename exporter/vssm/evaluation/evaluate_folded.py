"""Accuracy of a session over a folder of images: the loop, its results and its report."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vssm.artifact.manifest_types import Preprocessing
from vssm.evaluation.data import Loaded, Picture, load_in_order
from vssm.evaluation.journal import Journal, Row
from vssm.files.atomic import atomic_write_bytes
from vssm.runtimes.session import Array, RuntimeInfo, Session

TOP = 5
COLUMNS = (
    *("image", "class", "predicted", "top5", "correct", "correct_top5"),
    *("probability", "probability_of_class", "error"),
)
Progress = Callable[[str], None]


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found.

    Attributes:
        info: what ran.
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
        results: the CSV file with a row for each image.
    """

    info: RuntimeInfo
    images: int
    unreadable: tuple[tuple[str, str], ...]
    top1: float
    top5: float
    resumed: int
    seconds: float
    images_per_s: float | None
    batch: int
    workers: int
    results: str


def evaluate_session(
    session: Session,
    pictures: Sequence[Picture],
    *,
    root: Path,
    spec: Preprocessing,
    journal: Journal,
    batch: int,
    workers: int,
    results: Path,
    progress: Progress = lambda _: None,
) -> EvaluationReport:
    """Run the batches that the journal lacks, then write the results.

    Raises:
        ValueError: logits are not finite, or no image can be read.
        ArtifactError: a file cannot be written.
    """
    batches = [pictures[i : i + batch] for i in range(0, len(pictures), batch)]
    tally = _Tally()
    for some, rows in zip(batches, journal.done, strict=False):
        tally.add(some, rows)
    left, resumed = batches[len(journal.done) :], tally.images
    start = time.perf_counter()
    files = [[str(root / p.path) for p in some] for some in left]
    for some, loaded in zip(left, load_in_order(files, spec, workers=workers), strict=True):
        journal.append(rows := list(_rows(session, some, loaded)))
        tally.add(some, rows)
        speed = (tally.images - resumed) / (time.perf_counter() - start)
        progress(f"{tally.images:,} of {len(pictures):,} images, {speed:.1f} images/s{tally}")
    seconds = time.perf_counter() - start
    _write(results, pictures, [row for done in journal.done for row in done])
    first, five = tally.shares()
    return EvaluationReport(
        info=session.info,
        images=tally.images,
        unreadable=tuple(tally.unreadable),
        top1=first,
        top5=five,
        resumed=resumed,
        seconds=seconds,
        images_per_s=(tally.images - resumed) / seconds if left else None,
        batch=batch,
        workers=workers,
        results=str(results),
    )


class _Tally:
    """What has been counted so far."""

    def __init__(self) -> None:
        self.images = self.first = self.five = 0
        self.unreadable: list[tuple[str, str]] = []

    def add(self, pictures: Sequence[Picture], rows: Sequence[Row]) -> None:
        for picture, row in zip(pictures, rows, strict=True):
            self.images += 1
            if row.error is not None:
                self.unreadable.append((picture.path, row.error))
                continue
            self.first += picture.target == row.top[0]
            self.five += picture.target in row.top

    def shares(self) -> tuple[float, float]:
        """Top-1 and top-5 over the readable images."""
        readable = self.images - len(self.unreadable)
        if readable == 0:
            raise ValueError(
                f"none of the {self.images} images can be read; the first: {self.unreadable[0][1]}"
            )
        return self.first / readable, self.five / readable

    def __str__(self) -> str:
        readable = self.images - len(self.unreadable)
        return f", top-1 {self.first / readable:.2%}" if readable else ""


def _rows(session: Session, pictures: Sequence[Picture], loaded: Loaded) -> Iterator[Row]:
    """A row for each picture; what cannot be read takes no part in the run."""
    scores = iter(session.run(loaded.images)["logits"] if len(loaded.images) else ())
    for picture, error in zip(pictures, loaded.errors, strict=True):
        yield Row(error=error) if error is not None else _row(picture, next(scores))


def class_probabilities(logits: Array, image: Path | str) -> Array:
    """Softmax over the logits (classes,) of an image, in float64.

    Raises:
        ValueError: they are not finite; the message names the image.
    """
    if not np.isfinite(logits).all():
        raise ValueError(
            f"image={image} has logits that are NaN or infinite: the model overflows; see "
            "`vssm check --per-block --image FILE`, or export it in float32"
        )
    shares = np.exp(logits.astype(np.float64) - logits.max())
    probabilities: Array = shares / shares.sum()
    return probabilities


def _row(picture: Picture, logits: Array) -> Row:
    shares = class_probabilities(logits, picture.path)
    top = np.argsort(-logits, kind="stable")[:TOP]
    return Row(tuple(map(int, top)), float(shares[top[0]]), float(shares[picture.target]))


def _write(path: Path, pictures: Sequence[Picture], rows: Sequence[Row]) -> None:
    text = io.StringIO(newline="")
    plain = csv.writer(text, lineterminator="\n")
    # Python before 3.13 leaves a lone "\r" unquoted, which readers take for the end of a row.
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    plain.writerow(COLUMNS)
    for picture, row in zip(pictures, rows, strict=True):
        writer = quoted if "\r" in f"{picture.path}{row.error}" else plain
        if row.error is not None:
            writer.writerow((picture.path, picture.target, "", "", "", "", "", "", row.error))
            continue
        right, among = picture.target == row.top[0], picture.target in row.top
        chances = f"{row.best:.6f}", f"{row.target:.6f}"
        top = " ".join(map(str, row.top))
        start = (picture.path, picture.target, row.top[0], top)
        writer.writerow((*start, int(right), int(among), *chances, ""))
    atomic_write_bytes(path, text.getvalue().encode())
