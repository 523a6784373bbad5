"""How a pruned model is trained further: the published recipe as numbers, and what follows from it.

Source: the released scripts and logs of Zhan et al., "Exploring Token Pruning in Vision State
Space Models", NeurIPS 2024, arXiv:2409.18962, which train with the settings of DeiT
(arXiv:2012.12877). Random numbers are functions of the seed and of the place they are used at, so
a run that goes on after a stop draws what it would have drawn.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

from vssm.errors import check_choice

if TYPE_CHECKING:  # `vssm finetune --help` shows these numbers, without numpy
    import numpy as np
    import numpy.typing as npt


class Draw(IntEnum):
    """What random numbers are drawn for; each has streams of its own."""

    ORDER = 0
    IMAGE = 1
    MIX = 2
    DROPOUT = 3


_Recipe = TypeVar("_Recipe", bound="Numbers")


@dataclass(frozen=True)
class Numbers:
    """What every recipe has: a batch, a seed, and what follows from them.

    Attributes:
        batch: images of a step, of all processes together.
        seed: of everything that is drawn.
    """

    batch: int
    seed: int

    def _check(self, name: str, holds: bool, rule: str) -> None:
        value = getattr(self, name)
        # Not math.isfinite, which makes a float of an integer and so fails for a large one.
        if not holds or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name}={value} must be {rule}; see docs/finetune.md")

    @classmethod
    def of(cls: type[_Recipe], values: dict[str, Any]) -> _Recipe:
        """From values by name, as the command line has them; a whole number will do for a float.

        Raises:
            ValueError: a name is unknown, or a value out of its range.
            TypeError: a value is of another type.
        """
        # By the defaults, as annotations are texts here.
        kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(cls)}
        for name in values:
            check_choice("recipe", name, kinds)
        for name, value in values.items():
            kind = kinds[name]
            # bool is a kind of int, but `lr=true` is a mistake.
            allowed = (int, float) if kind is float else (kind,)
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
                raise TypeError(
                    f"recipe: {name}={value!r} is not of type {kind.__name__}; give one"
                )
        return cls(**{name: kinds[name](value) for name, value in values.items()})

    def generator(self, what: Draw, *where: int) -> np.random.Generator:
        """The random numbers for one purpose at one place."""
        import numpy as np

        # numpy hashes the list, so seeds and places that are neighbours give unrelated streams.
        return np.random.Generator(np.random.PCG64([self.seed, what, *where]))

    def steps(self, images: int) -> int:
        """Steps of an epoch; what does not fill a batch is left out, other images each time.

        Raises:
            ValueError: there are fewer images than a batch has.
        """
        if images < self.batch:
            raise ValueError(
                f"batch={self.batch} is more than the {images} images; give a smaller one"
            )
        return images // self.batch


@dataclass(frozen=True)
class Recipe(Numbers):
    """The numbers of a training run; the defaults are the published ones.

    Attributes:
        epochs: passes; with repeats each sees a part of the images.
        batch: images of a step, of all processes together.
        lr: learning rate that the warm-up leads to and the cosine starts from; not scaled by batch.
        min_lr: what the cosine ends at (the published one is above lr: the rate rises).
        warm_up_epochs: epochs that lead from warm_up_lr to lr.
        warm_up_lr: of the first epoch.
        weight_decay: AdamW's, for matrices alone.
        ema: decay of the averaged weights, a step.
        smoothing: share of a target that is spread over all classes.
        mixup: alpha of mixup's Beta distribution; 0 for none.
        cutmix: likewise of cutmix; where both are on, each step takes one of them by chance.
        rand_augment: whether images go through m9-mstd0.5-inc1.
        color_jitter: strength, where rand_augment is off (as in timm, which knows one or other).
        erasing: share of the images that lose a rectangle to noise.
        crop: least share of the image's area that a random crop has.
        flip: share of the images that are mirrored, left to right.
        repeats: how often an image is in a batch, each time augmented anew.
        distil: weight of the dense model's prediction in the loss; 0 trains without it.
        temperature: what both logits are divided by there.
        seed: of everything that is drawn.

    Raises:
        ValueError: a number is out of its range.
    """

    epochs: int = 30
    batch: int = 512
    lr: float = 5e-6
    min_lr: float = 1e-5
    warm_up_epochs: int = 5
    warm_up_lr: float = 1e-5
    weight_decay: float = 1e-8
    ema: float = 0.99996
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    rand_augment: bool = True
    color_jitter: float = 0.3
    erasing: float = 0.25
    crop: float = 0.08
    flip: float = 0.5
    repeats: int = 3
    distil: float = 0.0
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        # NaN fails every comparison, and `_check` refuses infinity as well.
        for name in ("epochs", "batch", "repeats"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warm_up_epochs", "lr", "min_lr", "warm_up_lr", "weight_decay", "seed"):
            self._check(name, getattr(self, name) >= 0, "0 or more")
        for name in ("mixup", "cutmix", "color_jitter"):
            self._check(name, getattr(self, name) >= 0, "0, which is none, or more")
        for name in ("smoothing", "erasing", "flip", "distil", "ema"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._check("crop", 0 < self.crop <= 1, "in (0, 1]")
        self._check("temperature", self.temperature > 0, "above 0")
        if (self.mixup > 0 or self.cutmix > 0) and self.batch % 2:
            raise ValueError(
                f"batch={self.batch} is odd, but mixup and cutmix pair the images of a batch; give "
                "an even one, or mixup=0 and cutmix=0"
            )

    @property
    def harder(self) -> str:
        """What makes the training loss larger than that of plain images, in words; "" if nothing.

        Crops and mirrored images are left out: they move it little, and either way.
        """
        altered = self.rand_augment or self.color_jitter > 0 or self.erasing > 0
        found = {
            "mixed images": self.mixup > 0 or self.cutmix > 0,
            "smoothed classes": self.smoothing > 0,
            "altered images": altered,
        }
        return ", ".join(text for text, is_on in found.items() if is_on)

    def learning_rate(self, epoch: int) -> float:
        """Of an epoch, counted from 0: timm's cosine, stepped once an epoch as DeiT does.

        The warm-up takes the place of the cosine's first epochs and does not shift it.
        """
        if epoch < self.warm_up_epochs:
            # Not shifted: after the warm-up the cosine goes on from where it would be by then.
            return self.warm_up_lr + epoch * (self.lr - self.warm_up_lr) / self.warm_up_epochs
        way = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self.min_lr + (self.lr - self.min_lr) * way

    def scale(self, key: str, blocks: int) -> float:
        """What the learning rate of a parameter is multiplied by: all learn alike."""
        return 1.0

    def total(self, images: int) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps(images)

    def rate_at(self, step: int, images: int) -> float:
        """Learning rate of a step, counted from 0."""
        return self.learning_rate(step // self.steps(images))

    def order(self, epoch: int, images: int) -> npt.NDArray[np.int64]:
        """Images (steps, batch) of an epoch: shuffled, each `repeats` times in a row.

        An epoch has as many steps as without repeats, and so ends before it has seen every image
        (repeated augmentation as DeiT has it). Process r of n takes [r::n] of a batch.
        """
        import numpy as np

        steps = self.steps(images)
        shuffled = self.generator(Draw.ORDER, epoch).permutation(images)
        # Cut to the steps of an epoch: with 3 repeats it sees a third of the images.
        return np.repeat(shuffled, self.repeats)[: steps * self.batch].reshape(steps, self.batch)
