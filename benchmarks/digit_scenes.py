"""Write scenes to train and measure a small segmenter with: digits on photographs.

    python benchmarks/digit_scenes.py FOLDER

Both come with scikit-learn: 1,797 handwritten digits of 8x8 greys, and two photographs. A scene is
a crop of a photograph with one or two digits painted on it, light on what is dark and dark on
what is light, of any colour, size and place where they do not overlap. A pixel at most four away
from one that is more ink than photograph is of the class "digit", whichever it is, as if somebody
had traced the digits with a broad brush; the others are "photograph". Digits and parts of
photographs that are trained with are not in the held-out scenes. The folder is laid out as ADE20K;
the same call writes the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

Pixels = npt.NDArray[np.uint8]

SIDE: Final = 64
LABELS: Final = ("photograph", "digit")
_HELD_OUT: Final = 0.25  # of the digits
_BORDER: Final = 448  # photographs are trained with to the left of this column, of 640
_CROPS: Final = (64, 192)  # least and most side of what is cut out of a photograph
_DIGITS: Final = (28, 44)  # and of a digit in a scene
_BRUSH: Final = 9  # pixels across
_MOST: Final = 2
_TRIES: Final = 20
_WHITE: Final = 16  # of scikit-learn's greys


def main(argv: Sequence[str] | None = None) -> None:
    """Write both splits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--training", type=int, default=2000, help="scenes to train with")
    parser.add_argument("--validation", type=int, default=200, help="scenes that are held out")
    options = parser.parse_args(argv)
    # Not above, where whoever reads LABELS would wait for it.
    from sklearn.datasets import load_digits, load_sample_images
    from sklearn.model_selection import train_test_split

    if options.folder.exists():
        parser.error(f"folder={options.folder} exists; name a new one")
    data = load_digits()
    # One split for everybody, whatever the seed of a model.
    parts = train_test_split(
        np.arange(len(data.target)), test_size=_HELD_OUT, stratify=data.target, random_state=0
    )
    photographs = load_sample_images().images
    for number, split in enumerate(("training", "validation")):
        chosen = parts[number]
        columns = slice(_BORDER) if split == "training" else slice(_BORDER, None)
        backgrounds = [photograph[:, columns] for photograph in photographs]
        rng = np.random.default_rng(number)
        for index in range(getattr(options, split)):
            photograph = backgrounds[rng.integers(len(backgrounds))]
            pixels, classes = _scene(data.images[chosen], photograph, rng)
            for kind, array in (("images", pixels), ("annotations", classes)):
                file = options.folder / kind / split / f"{index:04}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(file)


def _scene(
    digits: npt.NDArray[np.float64], photograph: Pixels, rng: np.random.Generator
) -> tuple[Pixels, Pixels]:
    """Pixels (side, side, 3) and the numbers of their classes (side, side), from 1 on."""
    pixels = _crop(photograph, rng).astype(np.float64)
    classes = np.ones((SIDE, SIDE), np.uint8)
    for _ in range(rng.integers(1, _MOST + 1)):
        size = int(rng.integers(_DIGITS[0], _DIGITS[1] + 1))
        place = _free(classes, size, rng)
        if place is None:
            continue
        ink = _enlarged(digits[rng.integers(len(digits))], size)[..., None]
        here = pixels[place]
        low = 200 if here.mean() < 128 else 0
        here[:] = (1 - ink) * here + ink * rng.integers(low, low + 56, 3)
        # All of the square counts as taken until the scene is whole.
        classes[place] = np.where(_traced(ink[..., 0]), 2, 0)
    classes[classes == 0] = 1
    return np.round(pixels).astype(np.uint8), classes


def _crop(photograph: Pixels, rng: np.random.Generator) -> Pixels:
    size = int(rng.integers(_CROPS[0], _CROPS[1] + 1))
    top, left = (int(rng.integers(extent - size + 1)) for extent in photograph.shape[:2])
    crop = Image.fromarray(photograph[top : top + size, left : left + size])
    return np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def _free(classes: Pixels, size: int, rng: np.random.Generator) -> tuple[slice, slice] | None:
    """A square with nothing on it but photograph, if some tries find one."""
    for _ in range(_TRIES):
        top, left = (int(n) for n in rng.integers(0, SIDE - size + 1, 2))
        place = slice(top, top + size), slice(left, left + size)
        if (classes[place] == 1).all():
            return place
    return None


def _enlarged(digit: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """A digit's ink (size, size) from 0 to 1."""
    grey = Image.fromarray(np.round(digit * (255 / _WHITE)).astype(np.uint8))
    return np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC)) / 255


def _traced(ink: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    strokes = Image.fromarray((ink > 0.5).astype(np.uint8))
    return np.asarray(strokes.filter(ImageFilter.MaxFilter(_BRUSH))) > 0


if __name__ == "__main__":
    main()
