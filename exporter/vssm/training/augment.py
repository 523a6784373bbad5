"""One image file to one training input: crop, flip, colours, normalisation, erasing.

No torch: worker processes run this. The rules are those of timm's training transform with DeiT's
arguments; what is drawn comes from the generator alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vssm.artifact.manifest import IMAGENET_MEAN, IMAGENET_STD
from vssm.artifact.preprocessing import FloatArray, open_rgb
from vssm.training.recipe import Draw, Recipe

# timm's "rand-m9-mstd0.5-inc1", which DeiT trains with; the numbers are in the name or timm's own.
LAYERS: Final = 2  # operations drawn for an image, with replacement
MAGNITUDE: Final = 9.0
MAGNITUDE_STD: Final = 0.5
MAX_MAGNITUDE: Final = 10.0
PROBABILITY: Final = 0.5  # that an operation drawn is applied
# What normalisation makes 0, as timm fills what a rotation or a shift leaves open.
_FILL: Final = tuple(round(255 * x) for x in IMAGENET_MEAN)
_DEGREES, _SHEAR, _TRANSLATE, _ENHANCE = 30.0, 0.3, 0.45, 0.9  # at the greatest magnitude
_BICUBIC: Final = Image.Resampling.BICUBIC

Rng = np.random.Generator
Operation = Callable[[Image.Image, float, Rng], Image.Image]


def rand_augment(image: Image.Image, rng: Rng) -> Image.Image:
    """Apply up to two operations, each with a magnitude of its own."""
    for choice in rng.integers(len(OPERATIONS), size=LAYERS):
        if rng.random() >= PROBABILITY:
            continue
        magnitude = float(np.clip(rng.normal(MAGNITUDE, MAGNITUDE_STD), 0, MAX_MAGNITUDE))
        image = list(OPERATIONS.values())[choice](image, magnitude / MAX_MAGNITUDE, rng)
    return image


def _signed(value: float, rng: Rng) -> float:
    return -value if rng.random() < 0.5 else value


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=_BICUBIC, fillcolor=_FILL
    )


def _rotate(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    return image.rotate(_signed(level * _DEGREES, rng), resample=_BICUBIC, fillcolor=_FILL)


def _shear_x(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    return _affine(image, 1, _signed(level * _SHEAR, rng), 0, 0, 1, 0)


def _shear_y(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    return _affine(image, 1, 0, 0, _signed(level * _SHEAR, rng), 1, 0)


def _translate_x(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    return _affine(image, 1, 0, _signed(level * _TRANSLATE, rng) * image.width, 0, 1, 0)


def _translate_y(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, _signed(level * _TRANSLATE, rng) * image.height)


def _auto_contrast(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    return ImageOps.invert(image)


def _posterize(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    """Keep 4 bits a channel, down to none."""
    # "inc1": a greater level changes more, so it leaves fewer bits.
    dropped = 0xFF >> (4 - int(level * 4))
    return image.point([value & ~dropped for value in range(256)] * 3)


def _solarize(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    # Likewise: a greater level inverts from a lower value on.
    return ImageOps.solarize(image, 256 - int(level * 256))


def _solarize_add(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    added = int(level * 110)
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def operation(image: Image.Image, level: float, rng: Rng) -> Image.Image:
        # timm's bound: at 0 every image would be the same grey or black.
        return kind(image).enhance(max(0.1, 1 + _signed(level * _ENHANCE, rng)))

    return operation


OPERATIONS: Final[dict[str, Operation]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}


_RATIO: Final = (3 / 4, 4 / 3)
_ERASED: Final = (0.02, 1 / 3)  # of the input's area
_ERASED_RATIO: Final = (0.3, 10 / 3)
_ATTEMPTS: Final = 10


@dataclass(frozen=True)
class Example:
    """One image of a batch: its file, and the epoch and place that its draws belong to."""

    file: str
    epoch: int
    place: int


def load_batch(examples: Sequence[Example], *, recipe: Recipe, size: tuple[int, int]) -> FloatArray:
    """Inputs (images, 3, height, width) of a batch.

    Raises:
        ValueError: an image cannot be read; training does without none of them.
    """
    return np.stack([_load(example, recipe, size) for example in examples])


def _load(example: Example, recipe: Recipe, size: tuple[int, int]) -> FloatArray:
    rng = recipe.generator(Draw.IMAGE, example.epoch, example.place)
    return augment(open_rgb(example.file), recipe, size, rng)


def augment(image: Image.Image, recipe: Recipe, size: tuple[int, int], rng: Rng) -> FloatArray:
    """An RGB image as a training input (3, height, width) of `size` (height, width)."""
    image = random_crop(image, size, rng, least=recipe.crop)
    if rng.random() < recipe.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if recipe.rand_augment:
        image = rand_augment(image, rng)
    elif recipe.color_jitter > 0:
        image = jitter(image, recipe.color_jitter, rng)
    # Erasing comes after this, as in timm: its noise has the spread of normalised pixels.
    pixels = np.asarray(image, np.float32) / np.float32(255)
    scaled = (pixels - np.asarray(IMAGENET_MEAN, np.float32)) / np.asarray(IMAGENET_STD, np.float32)
    result = np.ascontiguousarray(scaled.transpose(2, 0, 1))
    if rng.random() < recipe.erasing:
        erase(result, rng)
    return result


def random_crop(
    image: Image.Image, size: tuple[int, int], rng: Rng, *, least: float
) -> Image.Image:
    """A rectangle of `least` to all of the area, resized to `size` by PIL's bicubic filter."""
    left, top, width, height = _rectangle(image.width, image.height, rng, least)
    box = (left, top, left + width, top + height)
    return image.crop(box).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def _rectangle(width: int, height: int, rng: Rng, least: float) -> tuple[int, int, int, int]:
    """Left, top, width and height."""
    # As torchvision crops: by chance a few times, then in the middle.
    for _ in range(_ATTEMPTS):
        w, h = _shape(width * height * rng.uniform(least, 1.0), _RATIO, rng)
        if 1 <= w <= width and 1 <= h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # The largest one in the middle whose shape is allowed.
    w = min(width, max(1, round(height * _RATIO[1])))
    h = min(height, max(1, round(width / _RATIO[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def _shape(area: float, ratio: tuple[float, float], rng: Rng) -> tuple[int, int]:
    """Width and height of this area, their ratio drawn between two on a logarithmic scale."""
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))


def jitter(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
    """Brightness, contrast and saturation by factors around 1, in random order."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for choice in rng.permutation(len(kinds)):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        image = kinds[choice](image).enhance(factor)
    return image


def erase(pixels: FloatArray, rng: Rng) -> None:
    """Put normal noise, a value a pixel, into one rectangle of (3, height, width), in place."""
    _, height, width = pixels.shape
    for _ in range(_ATTEMPTS):
        h, w = _shape(width * height * rng.uniform(*_ERASED), _ERASED_RATIO, rng)
        # Smaller than the image, unlike a crop, which may be all of it.
        if 1 <= w < width and 1 <= h < height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            noise = rng.standard_normal((3, h, w), np.float32)
            pixels[:, top : top + h, left : left + w] = noise
            return
