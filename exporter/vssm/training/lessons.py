"""What a run teaches: which examples a step has, how they are loaded, and what the loss is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.artifact.preprocessing import FloatArray
from vssm.evaluation.data import ImageFolder
from vssm.evaluation.scenes import UNLABELLED, SceneFolder
from vssm.models.base import VisionModel
from vssm.models.dense.segmenter import Segmenter
from vssm.training.augment import Example, load_batch
from vssm.training.mix import loss_of, mix
from vssm.training.recipe import Draw, Recipe
from vssm.training.scene_augment import SceneExample, load_scenes
from vssm.training.scene_recipe import SceneRecipe
from vssm.types import Array

Load = Callable[[Sequence[Any]], tuple[FloatArray, Array]]


class Lesson(Protocol):
    """What is taught; a frozen dataclass."""

    @property
    def recipe(self) -> Recipe | SceneRecipe:
        """The numbers."""

    @property
    def images(self) -> int:
        """Of the data set."""

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes for weights that have none, where the data set has them."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What one should know about the folder and the loss."""

    def example(self, index: int, epoch: int, place: int) -> Any:
        """What a worker loads: image `index`, augmented as the draws of this place have it."""

    def loader(self) -> Load:
        """Inputs and targets of some examples; runs in worker processes."""

    def prepare(self, model: VisionModel) -> None:
        """Set what the model does in training alone."""

    def mixed(self, images: Tensor, targets: Tensor, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a process's share of a step, as the passes take them."""

    def loss(self, model: VisionModel, batch: tuple[Tensor, Tensor], teacher: Any) -> Tensor:
        """Of one pass, summed over its images."""


@dataclass(frozen=True)
class Pictures:
    """The class of images.

    Attributes:
        recipe: the numbers.
        folder: the images and their classes.
        size: (height, width) of the model's input.
    """

    recipe: Recipe
    folder: ImageFolder
    size: tuple[int, int]

    @property
    def images(self) -> int:
        """Of the data set."""
        return len(self.folder.pictures)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the folders."""
        return self.folder.classes

    @property
    def rule(self) -> str:
        """How classes were found."""
        return self.folder.rule

    @property
    def notes(self) -> tuple[str, ...]:
        """What else is in the folder, and what the loss is of."""
        made = self.recipe.harder
        if not made:
            return self.folder.notes
        loss = f"the training loss is that of {made}, so it stays above that of plain images"
        return (*self.folder.notes, loss)

    def example(self, index: int, epoch: int, place: int) -> tuple[Example, int]:
        """The image and its class."""
        picture = self.folder.pictures[index]
        return Example(str(self.folder.root / picture.path), epoch, place), picture.target

    def loader(self) -> Load:
        """Inputs and classes (images,)."""
        return functools.partial(_load_pictures, recipe=self.recipe, size=self.size)

    def prepare(self, model: VisionModel) -> None:
        """Nothing: these models are trained as they are."""

    def mixed(self, images: Tensor, targets: Tensor, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """By mixup or cutmix, with smoothed classes."""
        # By rank: each process mixes the images that it has.
        rng = self.recipe.generator(Draw.MIX, step, rank)
        return mix(images, targets, len(self.folder.classes), self.recipe, rng)

    def loss(
        self, model: VisionModel, batch: tuple[Tensor, Tensor], teacher: nn.Module | None
    ) -> Tensor:
        """Cross-entropy, and the divergence from the teacher's prediction."""
        images, goals = batch
        taught = None
        if teacher is not None:
            with torch.no_grad():
                taught = teacher(images)
        return loss_of(model(images), goals, taught, self.recipe)


def _load_pictures(
    examples: Sequence[tuple[Example, int]], *, recipe: Recipe, size: tuple[int, int]
) -> tuple[FloatArray, Array]:
    pixels = load_batch([example for example, _ in examples], recipe=recipe, size=size)
    return pixels, np.array([target for _, target in examples])


@dataclass(frozen=True)
class Scenes:
    """The class of every pixel.

    Attributes:
        recipe: the numbers.
        folder: the images and their annotations.
        size: (height, width) of the model's input.
        num_classes: of the model.
        labels: their names.
    """

    recipe: SceneRecipe
    folder: SceneFolder
    size: tuple[int, int]
    num_classes: int
    labels: tuple[str, ...] | None

    @property
    def images(self) -> int:
        """Of the data set."""
        return len(self.folder.scenes)

    @property
    def rule(self) -> str:
        """How classes were found."""
        return f"numbers from 1 on in annotations/{self.folder.split}, 0 for none"

    @property
    def notes(self) -> tuple[str, ...]:
        """What else is in the folder."""
        return self.folder.notes

    def example(self, index: int, epoch: int, place: int) -> SceneExample:
        """The image and its annotation."""
        scene, root = self.folder.scenes[index], self.folder.root
        return SceneExample(str(root / scene.image), str(root / scene.annotation), epoch, place)

    def loader(self) -> Load:
        """Inputs and classes (images, height, width)."""
        return functools.partial(
            load_scenes, recipe=self.recipe, size=self.size, num_classes=self.num_classes
        )

    def prepare(self, model: VisionModel) -> None:
        """Both heads leave channels out."""
        segmenter = cast(Segmenter, model)
        for head in (segmenter.decode_head, segmenter.auxiliary_head):
            head.dropout = self.recipe.dropout

    def mixed(self, images: Tensor, targets: Tensor, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """As they are."""
        return images, targets.long()

    def loss(self, model: VisionModel, batch: tuple[Tensor, Tensor], teacher: None) -> Tensor:
        """Cross-entropy of the head's and the auxiliary head's logits at the input's size.

        The mean over all pixels of an image, those without a class counted as 0, as
        mmsegmentation has it by default.
        """
        images, goals = batch
        logits, auxiliary = cast(Segmenter, model).training_logits(images)
        weights = (1.0, self.recipe.auxiliary)
        pixels = goals.shape[1] * goals.shape[2]
        losses = [
            weight
            * functional.cross_entropy(some, goals, ignore_index=UNLABELLED, reduction="sum")
            / pixels
            for some, weight in zip((logits, auxiliary), weights, strict=True)
        ]
        return losses[0] + losses[1]
