"""Image files to label maps and coloured overlays, by a segmenter's export."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from vssm.artifact.data_sets import palette_of
from vssm.artifact.manifest import LOGITS, Manifest
from vssm.artifact.preprocessing import normalised, open_rgb, preprocessing_of
from vssm.errors import check_least
from vssm.evaluation.segment import best_classes, segment
from vssm.files.atomic import atomic_write_bytes, make_directory
from vssm.runtimes.session import Session
from vssm.types import Array, Steps

_OPACITY: Final = 0.5  # of the colours over the image
_MOST: Final = 256  # classes that an 8-bit map can tell apart


def is_segmenter(manifest: Manifest) -> bool:
    """Whether an export gives the logits of every place of an image."""
    return manifest.main_output.name == LOGITS and len(manifest.main_output.shape) == 4


def write_label_maps(
    session: Session,
    files: Sequence[Path],
    output: Path,
    *,
    names: Sequence[str] | None = None,
    top: int = 5,
    progress: Steps = lambda *_: None,
) -> list[dict[str, Any]]:
    """Write NAME.labels.png and NAME.overlay.png for each image file, of the image's own size.

    The image is resized as the model was evaluated, its shorter side to the model's, and seen in
    sliding windows. Classes by ADE20K's names have ADE20K's colours, others PASCAL VOC's.

    Args:
        session: of a segmenter's export.
        files: images.
        output: directory to write; made where it is missing, files of the same name are replaced.
        names: of the classes.
        top: how many classes of an image are told, by their share of its pixels.
        progress: called with the windows of each image.

    Returns:
        A row for each file, with "error" where it is no readable image.

    Raises:
        ValueError: `top` is below 1, two files would write one name, there are more classes than
            colours, or no file is an image.
        ArtifactError: the directory cannot be written.
    """
    classes = _refuse(session.manifest, files, top)
    spec = preprocessing_of(session.manifest)
    palette = np.array(palette_of(names, _MOST), np.uint8)
    make_directory(output)
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            image = open_rgb(file, spec)
            logits = segment(session, normalised(image, spec)[None], progress=progress)
        except ValueError as error:
            rows.append({"file": str(file), "classes": [], "error": str(error)})
            continue
        labels = best_classes(logits, (image.height, image.width)).astype(np.uint8)
        paths = {kind: output / f"{file.stem}.{kind}.png" for kind in ("labels", "overlay")}
        atomic_write_bytes(paths["labels"], png(Image.fromarray(labels)))
        atomic_write_bytes(paths["overlay"], png(_overlay(image, palette[labels])))
        found = {kind: str(path) for kind, path in paths.items()}
        shares = _shares(labels, classes, names, top)
        rows.append({"file": str(file), **found, "classes": shares, "error": None})
    if not any(row["error"] is None for row in rows):
        raise ValueError(rows[0]["error"])
    return rows


def refuse_same_names(files: Sequence[Path]) -> None:
    """Refuse images whose results would have one name.

    Raises:
        ValueError: there are two.
    """
    twice = sorted({f.stem for f in files if sum(g.stem == f.stem for g in files) > 1})
    if twice:
        raise ValueError(
            f"images: two are called {twice[0]} but for folder and ending, and would write one "
            "file; run them one by one, into a directory each"
        )


def _refuse(manifest: Manifest, files: Sequence[Path], top: int) -> int:
    check_least(1, top=top)
    refuse_same_names(files)
    classes = int(manifest.main_output.shape[1])
    if classes > _MOST:
        raise ValueError(
            f"classes={classes} are more than the {_MOST} that a label map of 8 bits can hold; use "
            "vssm.segment"
        )
    return classes


def _shares(
    labels: Array, classes: int, names: Sequence[str] | None, top: int
) -> list[dict[str, Any]]:
    count = np.bincount(labels.ravel(), minlength=classes)
    return [
        {
            "class": int(c),
            "label": str(c) if names is None else names[c],
            "share": float(count[c] / labels.size),
        }
        for c in np.argsort(-count, kind="stable")[:top]
        if count[c]
    ]


def _overlay(image: Image.Image, painted: Array) -> Image.Image:
    return Image.blend(image, Image.fromarray(painted), _OPACITY)


def png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
