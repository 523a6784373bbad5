"""RandAugment with the policy that timm calls rand-m9-mstd0.5-inc1, on PIL images.

Source: Cubuk et al., "RandAugment", arXiv:1909.13719; the operations and ranges of that policy are
documented in timm. The pixels are Pillow's work (ImageOps, ImageEnhance, Image.transform).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vssm.artifact.manifest_types import IMAGENET_MEAN

LAYERS: Final = 2  # operations drawn for an image, with replacement
MAGNITUDE: Final = 9.0
MAGNITUDE_STD: Final = 0.5
MAX_MAGNITUDE: Final = 10.0
PROBABILITY: Final = 0.5  # that an operation drawn is applied
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
    dropped = 0xFF >> (4 - int(level * 4))
    return image.point([value & ~dropped for value in range(256)] * 3)


def _solarize(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(level * 256))


def _solarize_add(image: Image.Image, level: float, rng: Rng) -> Image.Image:
    added = int(level * 110)
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    def operation(image: Image.Image, level: float, rng: Rng) -> Image.Image:
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
