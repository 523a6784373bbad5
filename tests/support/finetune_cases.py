"""Small training runs that the tests of `vssm finetune` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from exports import MICRO, MICRO_PLAIN, SCHEDULE
from PIL import Image

from vssm import FinetuneRequest, ModelSource, Recipe, Resources

CLASSES = 7
IMAGES = 42
# Everything on, at rates that move weights; 14 steps.
RECIPE: dict[str, Any] = {"epochs": 2, "batch": 6, "warm_up_epochs": 1, "lr": 1e-3, "ema": 0.9}
PLAIN: dict[str, Any] = {"mixup": 0, "cutmix": 0, "rand_augment": False, "erasing": 0, "repeats": 1}
OPTIONS = {key: value for key, value in MICRO.items() if key != "num_classes"}
OPTIONS_PLAIN = {key: value for key, value in MICRO_PLAIN.items() if key != "num_classes"}


def write_pictures(root: Path, *, told_apart: bool = False) -> Path:
    """Images of odd sizes in a folder a class, of noise or of a colour a class with some noise."""
    make = np.random.default_rng(0)
    colours = make.integers(40, 216, (CLASSES, 3))
    for i in range(IMAGES):
        size = tuple(int(n) for n in make.integers(50, 70, 2))
        pixels = make.integers(0, 256, (*size, 3))
        if told_apart:
            pixels = np.clip(colours[i % CLASSES] + pixels // 8, 0, 255)
        (root / f"n{i % CLASSES}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"n{i % CLASSES}" / f"{i:02}.png")
    return root


def model_source(checkpoint: Path | None = None, **changes: Any) -> ModelSource:
    """A micro Vim, pruned after blocks 1 and 2."""
    given = {"schedule": SCHEDULE, "num_classes": CLASSES, "options": OPTIONS, **changes}
    return ModelSource(given.pop("name", "vim_tiny"), checkpoint, **given)


def request(
    data: Path,
    output: Path,
    *,
    what: ModelSource | None = None,
    resources: dict[str, Any] | None = None,
    resume: bool = False,
    **numbers: Any,
) -> FinetuneRequest:
    """A run of 14 steps, its state saved at the end of an epoch: that takes as long as a step."""
    recipe = Recipe(**{**RECIPE, **numbers})
    laid_out = Resources(**{"workers": 0, **(resources or {})})
    return FinetuneRequest(what or model_source(), data, output, recipe, None, resume, laid_out)
