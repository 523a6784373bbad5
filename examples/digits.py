"""The digits example's data and settings, shared by its training script and the demo.

Data: the handwritten digits that scikit-learn carries (8x8 pixels, grey from 0 to 16), a part of
the UCI set "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

IMAGE_SIZE: Final = 32
# ImageNet's statistics, not the digits' own: what an export writes into model.json by itself.
MEAN: Final = (0.485, 0.456, 0.406)
STD: Final = (0.229, 0.224, 0.225)
MODEL_NAME: Final = "vim_tiny"
MODEL: Final[dict[str, Any]] = {
    "num_classes": 10,
    "image_size": IMAGE_SIZE,
    "patch_size": 4,
    "stride": 4,
    "depth": 6,
    "d_model": 64,
    "d_state": 8,
}
SCHEDULE: Final = "2:0.75,4:0.75"
CHECKPOINT: Final = Path(__file__).with_name("vim_digits.safetensors")

_HELD_OUT: Final = 0.25
_WHITE: Final = 16  # the data set's brightest grey
# An export's preprocessing resizes to image size / 0.875 and crops the centre, as ImageNet's
# evaluations do. A file with this black margin already has that size, so what is cropped out of
# it is exactly the held-out image.
_FILE_MARGIN: Final = 2


class DigitsSplit(NamedTuple):
    """Images (n, 32, 32, 3) uint8 with three equal channels, labels (n,) int64 from 0 to 9."""

    train_images: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.int64]


def load_digits_split() -> DigitsSplit:
    """All 1,797 digits at 32x32: 1,347 to train with and 450 held out, each digit in proportion."""
    data = load_digits()
    images = np.stack([_upscale(image) for image in data.images])
    labels = data.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=_HELD_OUT, stratify=labels, random_state=0
    )
    return DigitsSplit(images[train], labels[train], images[test], labels[test])


def normalise(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Images (n, 32, 32, 3) uint8 to model input (n, 3, 32, 32) float32: (x / 255 - MEAN) / STD."""
    pixels = images.astype(np.float32) / np.float32(255)
    normal = (pixels - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
    return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))


def write_test_images(directory: Path, count: int | None = None) -> list[tuple[Path, int]]:
    """Write the first `count` held-out images (None: all 450) as PNG files, and `labels.csv`.

    The files are 36x36: the image in a black margin, which the preprocessing of an export crops
    away again, so that its result equals `normalise` of the held-out images.

    Returns:
        Each file's path and label, in the order of `load_digits_split().test_images`.

    Raises:
        ValueError: `count` is not in [1, 450].
    """
    split = load_digits_split()
    written = _write(directory, split.test_images, split.test_labels, count)
    with (directory / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label"])
        writer.writerows((path.name, label) for path, label in written)
    return written


def write_train_images(directory: Path, count: int) -> Path:
    """Write the first `count` training images in the same form, and return their folder.

    Raises:
        ValueError: `count` is not in [1, 1347].
    """
    split = load_digits_split()
    _write(directory, split.train_images, split.train_labels, count)
    return directory


def _write(
    directory: Path,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    count: int | None,
) -> list[tuple[Path, int]]:
    total = len(labels)
    count = total if count is None else count
    if not 1 <= count <= total:
        raise ValueError(f"count={count} is outside [1, {total}], the images of the split")
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for index, label in enumerate(labels[:count].tolist()):
        path = directory / f"digit_{index:03d}_is_{label}.png"
        margin = ((_FILE_MARGIN,) * 2, (_FILE_MARGIN,) * 2, (0, 0))
        Image.fromarray(np.pad(images[index], margin)).save(path)
        written.append((path, label))
    return written


def _upscale(image: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """A digit (8, 8) of values 0 to 16 as (32, 32, 3) uint8, by PIL's bicubic filter."""
    grey = Image.fromarray(np.round(image * (255 / _WHITE)).astype(np.uint8))
    large = grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(large.convert("RGB"))
