"""What is in images of any size, by a whole detector: boxes, masks, COCO's result format, drawings.

Sources: the pasting of masks of detectron2's and mmdetection's public code, and the run lengths of
COCO's, which pycocotools reads. Arrays and PIL alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vssm.artifact.data_sets import COCO, COCO_CATEGORIES, voc_colours
from vssm.artifact.manifest import BOXES
from vssm.artifact.preprocessing import ImageInput, open_rgb, padded, preprocessing_of
from vssm.errors import check_least
from vssm.evaluation.label_maps import png, refuse_same_names
from vssm.files.atomic import atomic_write_bytes, make_directory
from vssm.runtimes.session import Session
from vssm.types import Array, Steps

RESULTS: Final = "detections.json"
LEAST_SCORE: Final = 0.3  # of what is drawn; a file has everything
_THRESHOLD: Final = 0.5  # of the probability that a pixel belongs to an object
_PHASE: Final = "finding objects"


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one image, best first.

    Attributes:
        size: (height, width) of the image.
        boxes: (n, 4) in its pixels: x and y of the top left corner, then of the bottom right one.
        scores: (n,) in [0, 1].
        labels: (n,) int64, indices of classes.
        masks: (n, 28, 28), the probability that a part of its box belongs to the object; None for
            detectors without masks.
    """

    size: tuple[int, int]
    boxes: Array
    scores: Array
    labels: Array
    masks: Array | None = None

    def region(self, index: int) -> tuple[int, int, Array]:
        """Where an object is: the first row and column of the pixels (rows, columns) that say so.

        Raises:
            ValueError: the detector has no masks.
        """
        if self.masks is None:
            raise ValueError("masks=None: this detector gives boxes alone; use boxes")
        left, top, right, bottom = self.boxes[index].tolist()
        parts = self.masks.shape[1]
        first_row, rows = _shares(top, bottom, self.size[0], parts)
        first_column, columns = _shares(left, right, self.size[1], parts)
        inside: Array = rows @ self.masks[index] @ columns.T >= _THRESHOLD
        return first_row, first_column, inside


def detect(session: Session, image: ImageInput) -> ImageDetections:
    """What is in one image of any size.

    Args:
        session: of a detector that was exported with outputs "boxes".
        image: a path, a PIL image, or an array (height, width, 3) uint8 RGB.

    Raises:
        ValueError: the session is of another model, or the image cannot be read.
    """
    if not session.manifest.gives_boxes:
        raise ValueError(
            f"session of {session.manifest.name} does not give boxes; export a detector with "
            "--outputs boxes"
        )
    spec = preprocessing_of(session.manifest)
    picture = open_rgb(image, spec)
    return detect_padded(session, *padded(picture, spec), (picture.height, picture.width))


def detect_padded(
    session: Session, whole: Array, inside: tuple[int, int], size: tuple[int, int]
) -> ImageDetections:
    """What is in one image that `padded` has prepared.

    Args:
        session: as for `detect`.
        whole: (3, height, width) float32 of the model's input.
        inside: (height, width) of the image in there.
        size: that of the image itself.
    """
    found = session.run(whole[None], sizes=np.array([inside]))
    # By side, as rounding to whole pixels makes two scales of one.
    scale = np.array([size[1] / inside[1], size[0] / inside[0]] * 2)
    boxes = found[BOXES].astype(np.float64) * scale
    return ImageDetections(size, boxes, found["scores"], found["labels"], found.get("masks"))


def coco_results(
    found: ImageDetections,
    image_id: int | str,
    names: Sequence[str] | None = None,
    *,
    numbers: Mapping[int, int] | None = None,
) -> list[dict[str, Any]]:
    """The detections of an image in COCO's result format.

    Args:
        found: what was found in it.
        image_id: as in the annotations.
        names: of the classes; COCO's own have COCO's numbers, others are counted from 1.
        numbers: in their place, by class its number; a class that has none is left out.
    """
    if numbers is None and names is not None and tuple(names) == COCO:
        numbers = dict(enumerate(COCO_CATEGORIES))
    rows = []
    for i, (box, score, label) in enumerate(
        zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    ):
        if numbers is not None and label not in numbers:
            continue
        row = {
            "image_id": image_id,
            "category_id": label + 1 if numbers is None else numbers[label],
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": score,
        }
        if found.masks is not None:
            counts = run_lengths(*found.region(i), found.size)
            row["segmentation"] = {"size": list(found.size), "counts": packed(counts)}
        rows.append(row)
    return rows


def run_lengths(top: int, left: int, inside: Array, size: tuple[int, int]) -> list[int]:
    """How many pixels are outside and inside in turn, column by column, outside first.

    Args:
        top: first row of `inside` in the image.
        left: its first column.
        inside: (rows, columns) bool.
        size: (height, width) of the image.
    """
    height, width = size
    if not inside.any():
        return [height * width]
    columns, rows = np.nonzero(inside.T)
    place = (left + columns) * height + top + rows
    first = np.flatnonzero(np.diff(place, prepend=-2) != 1)
    last = np.append(first[1:], len(place)) - 1
    edges = np.stack([place[first], place[last] + 1], axis=1).ravel()
    counts: list[int] = np.diff(edges, prepend=0, append=height * width).tolist()
    # What is inside down to the last pixel leaves nothing behind it.
    return counts[:-1] if len(counts) > 1 and counts[-1] == 0 else counts


def packed(counts: Sequence[int]) -> str:
    """Run lengths as COCO's text: five bits a character, from the third on the change by two."""
    text = []
    for i, count in enumerate(counts):
        number, more = count - counts[i - 2] if i > 2 else count, True
        while more:
            bits, number = number & 31, number >> 5
            # The sign is the highest bit of the last character.
            more = number != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return "".join(text)


def write_detections(
    session: Session,
    files: Sequence[Path],
    output: Path,
    *,
    names: Sequence[str] | None = None,
    top: int = 5,
    least: float = LEAST_SCORE,
    progress: Steps = lambda *_: None,
) -> list[dict[str, Any]]:
    """Write NAME.detections.png of each image file, and what was found as detections.json.

    Args:
        session: of a detector that was exported with outputs "boxes".
        files: images. In the file their numbers are their names where these are digits, as in
            COCO, else their names.
        output: directory to write; made where it is missing, files of the same name are replaced.
        names: of the classes.
        top: how many detections of an image are told.
        least: score of what is told and drawn; the file has everything.
        progress: called with the images done and their number.

    Returns:
        A row for each file, with "error" where it is no readable image.

    Raises:
        ValueError: `top` is below 1, `least` no score, two files would write one name, or no file
            is an image.
        ArtifactError: the directory cannot be written.
    """
    check_least(1, top=top)
    if not 0 <= least <= 1:
        raise ValueError(f"score={least} is outside [0, 1]; give the least score to draw")
    refuse_same_names(files)
    make_directory(output)
    rows: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for done, file in enumerate(files):
        progress(_PHASE, done, len(files))
        try:
            image = open_rgb(file, preprocessing_of(session.manifest))
        except ValueError as error:
            rows.append({"file": str(file), "detections": [], "error": str(error)})
            continue
        found = detect(session, image)
        number = int(file.stem) if file.stem.isdecimal() else file.name
        results += coco_results(found, number, names)
        told = np.flatnonzero(found.scores >= least)
        path = output / f"{file.stem}.detections.png"
        atomic_write_bytes(path, png(drawn(image, found, names, told)))
        row = {"file": str(file), "image_id": number, "picture": str(path), "error": None}
        rows.append({**row, "detections": [_told(found, i, names) for i in told[:top]]})
    progress(_PHASE, len(files), len(files))
    if not any(row["error"] is None for row in rows):
        raise ValueError(rows[0]["error"])
    atomic_write_bytes(output / RESULTS, json.dumps(results, allow_nan=False).encode())
    return rows


def drawn(
    image: Image.Image, found: ImageDetections, names: Sequence[str] | None, some: Array
) -> Image.Image:
    """A copy of an image with some of its detections, the best on top: mask, box, class and score.

    Args:
        image: RGB.
        found: what was found in it.
        names: of the classes; None for their indices.
        some: indices of the detections to draw.
    """
    # The first colour is black, which is hard to see.
    palette = np.array(voc_colours(256)[1:], np.uint8)
    pixels = np.array(image)
    if found.masks is not None:
        for i in some[::-1]:
            top, left, inside = found.region(i)
            rows, columns = inside.shape
            part = pixels[top : top + rows, left : left + columns]
            part[inside] = (part[inside] + palette[found.labels[i] % 255].astype(int)) // 2
    picture = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(picture)
    # To be read on a large image too.
    font, width = ImageFont.load_default(max(11, image.height // 45)), max(2, image.height // 300)
    for i in some[::-1]:
        colour = tuple(palette[found.labels[i] % 255].tolist())
        left, top, right, bottom = found.boxes[i].tolist()
        canvas.rectangle((left, top, right, bottom), outline=colour, width=width)
        told = _told(found, i, names)
        text = f"{told['label']} {told['score']:.2f}"
        corner = (left + width, top + width)
        canvas.rectangle(canvas.textbbox(corner, text, font), fill=colour)
        canvas.text(corner, text, (255, 255, 255), font)
    return picture


def _told(found: ImageDetections, index: int, names: Sequence[str] | None) -> Mapping[str, Any]:
    label = int(found.labels[index])
    return {
        "class": label,
        "label": str(label) if names is None else names[label],
        "score": float(found.scores[index]),
        "box": found.boxes[index].tolist(),
    }


def _shares(start: float, end: float, length: int, parts: int) -> tuple[int, Array]:
    """First pixel of a box along an axis, and (pixels, parts): what each pixel reads of a mask."""
    first, last = max(int(np.floor(start)), 0), min(int(np.ceil(end)), length)
    if not end > start:
        return 0, np.zeros((0, parts))
    # In parts, from the middle of the first; beyond the mask there is nothing.
    place = (np.arange(first, last) + 0.5 - start) / (end - start) * parts - 0.5
    return first, np.clip(1 - np.abs(place[:, None] - np.arange(parts)), 0, None)
