"""The experiment's images, written as folders of PNG files once; the same bytes every time.

digits: the 1,797 handwritten digits that scikit-learn carries (8x8 pixels; E. Alpaydin and
C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, CC BY 4.0), enlarged to 32x32.

scenes: the same digits on pieces of the two photographs that scikit-learn carries, 64x64. Composed
of real images, and no data set that others know. Held-out digits lie on the photographs' right
halves, those to train with on the left halves.

Files have a margin, which the preprocessing of an evaluation crops away.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

Grey = npt.NDArray[np.uint8]
TRAIN, HELD_OUT = "train", "held_out"
# A third is trained on: the others tell small differences apart.
_HELD_OUT_IMAGES: Final = 1197
_WHITE: Final = 16  # the digits' brightest grey
_REPEATS: Final = 3  # scenes of each training digit
_SIDES: Final = (28, 40)  # of a digit in a scene
_DARKER: Final = 0.6  # of the photographs, so that white ink shows everywhere


@dataclass(frozen=True)
class Part:
    """Digits (n, 8, 8) uint8 of one part of the split, and their labels."""

    name: str
    digits: Grey
    labels: Sequence[int]


def write(root: Path, name: str, *, quick: bool = False) -> Path:
    """The folder with `train` and `held_out`, one folder a class in each; kept where it is there.

    Args:
        root: holds the data sets.
        name: "digits" or "scenes".
        quick: 300 images to train with and 200 held out.
    """
    folder = root / name
    if folder.is_dir():
        return folder
    aside = root / f".{name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    for part in _split(quick):
        for number, (image, label) in enumerate(_WRITERS[name](part)):
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


def _digits(part: Part) -> Iterator[tuple[Image.Image, int]]:
    for digit, label in zip(part.digits, part.labels, strict=True):
        large = np.asarray(_enlarged(digit, 32))
        yield Image.fromarray(np.pad(large, 2)).convert("RGB"), label


def _scenes(part: Part) -> Iterator[tuple[Image.Image, int]]:
    """73x73, of which the preprocessing takes the 64x64 that begin at pixel 4."""
    rng = np.random.default_rng(part.name == HELD_OUT)
    half = slice(320, None) if part.name == HELD_OUT else slice(0, 320)
    photos = [Image.fromarray(image[:, half]) for image in load_sample_images().images]
    for digit, label in zip(part.digits, part.labels, strict=True):
        for _ in range(_REPEATS if part.name == TRAIN else 1):
            yield _scene(digit, photos[rng.integers(len(photos))], rng), label


def _scene(digit: Grey, photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    size = int(rng.integers(73, 201))
    left, top = (int(rng.integers(side - size + 1)) for side in photo.size)
    piece = photo.crop((left, top, left + size, top + size)).resize((73, 73))
    pixels = np.asarray(piece, np.float64) * _DARKER
    side = int(rng.integers(_SIDES[0], _SIDES[1] + 1))
    ink = np.asarray(_enlarged(digit, side), np.float64)[..., None] / 255
    row, column = (int(4 + rng.integers(64 - side + 1)) for _ in range(2))
    under = pixels[row : row + side, column : column + side]
    under += ink * (255 - under)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def _enlarged(digit: Grey, side: int) -> Image.Image:
    return Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)


_WRITERS: Final[dict[str, Callable[[Part], Any]]] = {"digits": _digits, "scenes": _scenes}
