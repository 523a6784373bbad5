"""How a segmenter is trained further: the published recipes as numbers, and what follows from them.

Source: the configurations and scripts of Vim and PlainMamba for mmsegmentation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vssm.training.recipe import Draw, Numbers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True)
class SceneRecipe(Numbers):
    """The numbers of a segmenter's training run; `published` gives those of a model.

    Attributes:
        iterations: steps of the whole run.
        lr: learning rate that the warm-up leads to, of the layers that learn fastest.
        min_lr: what the schedule ends at.
        power: of the share of the run that is left, which the rate falls with; 1 is a line.
        warm_up_steps: steps over which the rate grows in a line.
        warm_up_ratio: what they begin at, as a share.
        weight_decay: AdamW's, for matrices alone.
        layer_decay: what the rate of a block is multiplied by for each block behind it; 1 for none.
        ema: decay of the averaged weights, a step; 0 makes them the weights themselves.
        auxiliary: weight of the auxiliary head's loss.
        dropout: share of the channels in front of the classifiers that are left out.
        smallest: least side that images are resized to, in shorter sides of the model's input.
        largest: most.
        uniform: no crop whose labelled pixels are of one class by more than this share, if ten
            tries find another.
        flip: share of the images that are mirrored, left to right.
        distortion: whether brightness, contrast, saturation and hue are changed.

    Raises:
        ValueError: a number is out of its range.
    """

    batch: int = 16
    seed: int = 0
    iterations: int = 160_000
    lr: float = 6e-5
    min_lr: float = 0.0
    power: float = 1.0
    warm_up_steps: int = 1500
    warm_up_ratio: float = 1e-6
    weight_decay: float = 0.01
    layer_decay: float = 1.0
    ema: float = 0.0
    auxiliary: float = 0.4
    dropout: float = 0.1
    smallest: float = 0.5
    largest: float = 2.0
    uniform: float = 0.75
    flip: float = 0.5
    distortion: bool = True

    def __post_init__(self) -> None:
        for name in ("batch", "iterations"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "min_lr", "warm_up_steps", "weight_decay", "auxiliary", "seed"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("ema", "uniform", "flip", "warm_up_ratio"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._check("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self._check("layer_decay", 0 < self.layer_decay <= 1, "in (0, 1]")
        self._check("power", self.power > 0, "above 0")
        self._check("smallest", self.smallest > 0, "above 0")
        self._check("largest", self.largest >= self.smallest, "no less than `smallest`")

    @classmethod
    def published(cls, name: str, values: Mapping[str, Any] | None = None) -> SceneRecipe:
        """The recipe of a model by its name, with some numbers changed; errors as `of`'s."""
        return cls.of({**_PUBLISHED.get(name, {}), **(values or {})})

    def total(self, images: int) -> int:
        """Steps of the whole run, however many images there are."""
        return self.iterations

    def rate_at(self, step: int, images: int) -> float:
        """Learning rate of a step, counted from 0: mmcv's polynomial with its linear warm-up."""
        left = math.pow(1 - step / self.iterations, self.power)
        rate = (self.lr - self.min_lr) * left + self.min_lr
        if step >= self.warm_up_steps:
            return rate
        missing = (1 - step / self.warm_up_steps) * (1 - self.warm_up_ratio)
        return rate * (1 - missing)

    def order(self, epoch: int, images: int) -> npt.NDArray[np.int64]:
        """Images (steps, batch) of an epoch, shuffled."""
        steps = self.steps(images)
        shuffled = self.generator(Draw.ORDER, epoch).permutation(images)
        return shuffled[: steps * self.batch].reshape(steps, self.batch)

    def scale(self, key: str, blocks: int) -> float:
        """What the learning rate of a parameter is multiplied by.

        Args:
            key: its name.
            blocks: of the backbone.
        """
        parts = key.split(".")
        if parts[:2] == ["backbone", "layers"]:
            behind = blocks - int(parts[2])
        elif parts[:2] in (["backbone", "patch_embed"], ["backbone", "pos_embed"]):
            behind = blocks + 1
        else:
            behind = 0
        return float(self.layer_decay**behind)


_VIM: Final = {"batch": 32, "iterations": 60_000}
_PUBLISHED: Final[dict[str, dict[str, Any]]] = {
    # The numbers of the script where they are not those of the configuration that it takes.
    "vim_tiny_upernet_ade20k": {**_VIM, "lr": 2e-4, "weight_decay": 0.1, "layer_decay": 0.92},
    "vim_small_upernet_ade20k": {**_VIM, "lr": 1e-4, "weight_decay": 0.05, "layer_decay": 0.95},
}
