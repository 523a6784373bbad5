"""One scene to one training input: resize, crop, flip, colours, normalisation, padding.

No torch: worker processes run this. The rules are those of mmsegmentation's pipeline for ADE20K;
what is drawn comes from the generator alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from vssm.artifact.manifest import IMAGENET_MEAN, IMAGENET_STD
from vssm.artifact.preprocessing import FloatArray, open_rgb
from vssm.evaluation.scenes import UNLABELLED, ClassMap, read_classes
from vssm.training.recipe import Draw
from vssm.training.scene_recipe import SceneRecipe

_LONGEST: Final = 4  # times the shorter side that the longer one may have: 2048 of 512
_TRIES: Final = 10
_BRIGHTNESS: Final = 32.0
_FACTORS: Final = (0.5, 1.5)
_HUE: Final = 18 / 180  # of the circle

Rng = np.random.Generator
Size = tuple[int, int]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SceneExample:
    """One scene of a batch: its files, and the epoch and place that its draws belong to."""

    image: str
    annotation: str
    epoch: int
    place: int


def load_scenes(
    examples: Sequence[SceneExample], *, recipe: SceneRecipe, size: Size, num_classes: int
) -> tuple[FloatArray, ClassMap]:
    """Inputs (images, 3, height, width) and classes (images, height, width) of a batch.

    Raises:
        ValueError: an image cannot be read, or its annotation does not fit.
    """
    found = [_load(example, recipe, size, num_classes) for example in examples]
    return np.stack([pixels for pixels, _ in found]), np.stack([classes for _, classes in found])


def _load(
    example: SceneExample, recipe: SceneRecipe, size: Size, num_classes: int
) -> tuple[FloatArray, ClassMap]:
    rng = recipe.generator(Draw.IMAGE, example.epoch, example.place)
    image = open_rgb(example.image)
    classes = read_classes(Path(example.annotation), num_classes, (image.height, image.width))
    return augment_scene(image, classes, recipe, size, rng)


def augment_scene(
    image: Image.Image, classes: ClassMap, recipe: SceneRecipe, size: Size, rng: Rng
) -> tuple[FloatArray, ClassMap]:
    """An RGB image and its classes as a training input of `size` (height, width)."""
    sides = _resized(image.size, min(size) * rng.uniform(recipe.smallest, recipe.largest))
    image = image.resize(sides, Image.Resampling.BILINEAR)
    classes = np.array(Image.fromarray(classes).resize(sides, Image.Resampling.NEAREST))
    rows, columns = _crop(classes, size, recipe.uniform, rng)
    pixels, classes = np.asarray(image)[rows, columns], classes[rows, columns]
    if rng.random() < recipe.flip:
        pixels, classes = pixels[:, ::-1], classes[:, ::-1]
    if recipe.distortion:
        pixels = distort(pixels, rng)
    scaled = pixels.astype(np.float32) / np.float32(255)
    scaled = (scaled - np.asarray(IMAGENET_MEAN, np.float32)) / np.asarray(IMAGENET_STD, np.float32)
    # Padded after normalisation, so with the mean colour.
    whole, known = np.zeros((3, *size), np.float32), np.full(size, UNLABELLED, np.uint8)
    height, width = classes.shape
    whole[:, :height, :width], known[:height, :width] = scaled.transpose(2, 0, 1), classes
    return whole, known


def _resized(sides: Size, shorter: float) -> Size:
    """Width and height with this shorter side, unless the longer one would be too long."""
    scale = min(shorter / min(sides), _LONGEST * shorter / max(sides))
    width, height = (max(1, int(side * scale + 0.5)) for side in sides)
    return width, height


def _crop(classes: ClassMap, size: Size, uniform: float, rng: Rng) -> tuple[slice, slice]:
    """Rows and columns of a crop that is not nearly all of one class, if some tries find one."""
    for _ in range(_TRIES):
        rows, columns = (
            slice(start := int(rng.integers(max(have - want, 0) + 1)), start + want)
            for have, want in zip(classes.shape, size, strict=True)
        )
        some = classes[rows, columns]
        counts = np.bincount(some[some != UNLABELLED])
        if (counts > 0).sum() > 1 and counts.max() < uniform * counts.sum():
            break
    return rows, columns


def distort(pixels: Pixels, rng: Rng) -> Pixels:
    """Brightness, contrast, saturation and hue of (height, width, 3), each by an even chance."""
    if rng.random() < 0.5:
        pixels = _scaled(pixels, offset=rng.uniform(-_BRIGHTNESS, _BRIGHTNESS))
    # Contrast comes before the colours or after them, as often.
    early = rng.random() < 0.5
    if early:
        pixels = _contrast(pixels, rng)
    saturation = rng.uniform(*_FACTORS) if rng.random() < 0.5 else 1.0
    hue = rng.uniform(-_HUE, _HUE) if rng.random() < 0.5 else 0.0
    if saturation != 1 or hue != 0:
        planes = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
        planes[..., 1] = _scaled(planes[..., 1], factor=saturation)
        # A byte is the whole circle, and wraps as the circle does.
        planes[..., 0] += np.uint8(round(hue * 256) % 256)
        painted = Image.frombytes("HSV", planes.shape[1::-1], planes.tobytes())
        pixels = np.asarray(painted.convert("RGB"))
    return pixels if early else _contrast(pixels, rng)


def _contrast(pixels: Pixels, rng: Rng) -> Pixels:
    return _scaled(pixels, factor=rng.uniform(*_FACTORS)) if rng.random() < 0.5 else pixels


def _scaled(pixels: Pixels, *, factor: float = 1.0, offset: float = 0.0) -> Pixels:
    changed: Pixels = np.clip(pixels.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)
    return changed
