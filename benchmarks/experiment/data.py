"""The experiment's images, written as folders of PNG files once; the same bytes every time.

The 1,797 handwritten digits that scikit-learn carries (8x8 pixels; E. Alpaydin and C. Kaynak,
"Optical Recognition of Handwritten Digits", UCI, CC BY 4.0), enlarged to 32x32, in a margin that an
evaluation's preprocessing crops away.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Grey = npt.NDArray[np.uint8]
TRAIN, HELD_OUT = "train", "held_out"
# A third is trained on: the others tell small differences apart.
_HELD_OUT_IMAGES: Final = 1197
_SIZE: Final = 32
_MARGIN: Final = 2  # of the 36x36 files, of which an evaluation at size 32 takes the centre
_WHITE: Final = 16  # the digits' brightest grey


@dataclass(frozen=True)
class Part:
    """Digits (n, 8, 8) uint8 of one part of the split, and their labels."""

    name: str
    digits: Grey
    labels: Sequence[int]


def write(folder: Path, *, quick: bool = False) -> Path:
    """The folder with `train` and `held_out`, one folder a class in each; kept where it is there.

    Args:
        folder: to write.
        quick: 300 images to train with and 200 held out.
    """
    if folder.is_dir():
        return folder
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    for part in _split(quick):
        for number, (image, label) in enumerate(_pictures(part)):
            place = aside / part.name / str(label)
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{number:04}.png")
    os.replace(aside, folder)
    return folder


def _split(quick: bool) -> list[Part]:
    data = load_digits()
    grey = np.round(data.images * (255 / _WHITE)).astype(np.uint8)
    train, held_out = train_test_split(
        np.arange(len(grey)), test_size=_HELD_OUT_IMAGES, stratify=data.target, random_state=0
    )
    if quick:
        train, held_out = train[:300], held_out[:200]
    named = ((TRAIN, train), (HELD_OUT, held_out))
    return [Part(name, grey[some], data.target[some].tolist()) for name, some in named]


def _pictures(part: Part) -> Iterator[tuple[Image.Image, int]]:
    for digit, label in zip(part.digits, part.labels, strict=True):
        large = Image.fromarray(digit).resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
        yield Image.fromarray(np.pad(np.asarray(large), _MARGIN)).convert("RGB"), label
