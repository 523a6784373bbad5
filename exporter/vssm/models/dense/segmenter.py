"""What every segmenter is: a backbone that gives four levels, and UPerNet's head on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from vssm.artifact.manifest import Preprocessing
from vssm.models.base import ForwardDetails, details
from vssm.models.dense.base import DenseModel
from vssm.models.dense.heads import AuxiliaryHead, UPerHead, upsample

SEGMENTATION: Final = "segmentation"


class Segmenter(DenseModel):
    """Base of the segmenters. A subclass makes `backbone`, calls `_add_heads`, fills `_levels`.

    The logits of `forward` are (batch, num_classes, height, width) of the finest level;
    the output `labels` holds classes of the input's size. The auxiliary head belongs to the
    checkpoints and to training; neither `forward` nor an export runs it.

    Attributes:
        auxiliary_level: index of the one that the auxiliary head reads.
        own_parts: what keys of the backbone begin with that a classifier does not have.
        classifier_parts: what keys of a classifier begin with that the backbone does not have.
    """

    task = SEGMENTATION
    auxiliary_level: int
    own_parts: tuple[str, ...]
    classifier_parts: tuple[str, ...]

    def _add_heads(self, channels: tuple[int, ...], width: int, auxiliary_width: int) -> None:
        self.decode_head = UPerHead(channels, width, self.num_classes)
        self.auxiliary_head = AuxiliaryHead(
            channels[self.auxiliary_level], auxiliary_width, self.num_classes
        )

    def _forward(self, images: Tensor, with_blocks: bool) -> ForwardDetails:
        found = self._levels(images, with_blocks)
        logits = self.decode_head([found.tensors[name] for name in self.feature_names])
        tensors = {**found.tensors, "decode_logits": logits}
        return details(logits, found.chosen, found.blocks, tensors)

    def training_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, classes, height, width) of both heads, at the input's size."""
        found = self.forward_details(images)
        level = found.tensors[self.feature_names[self.auxiliary_level]]
        auxiliary = self.auxiliary_head(level)
        return upsample(found.logits, self.image_size), upsample(auxiliary, self.image_size)

    @property
    def output_groups(self) -> Mapping[str, tuple[str, ...]]:  # type: ignore[override]
        """The logits, the labels of every pixel beside them, or the levels alone."""
        return {
            "logits": ("logits",),
            "labels": ("logits", "labels"),
            "features": self.feature_names,
        }

    def output(self, name: str, found: ForwardDetails) -> Tensor:
        """`labels`: the class of every pixel, (batch, height, width) int32 of the input's size."""
        if name != "labels":
            return super().output(name, found)
        return upsample(found.logits, self.image_size).argmax(1).to(torch.int32)

    def classifier_part(self) -> ClassifierPart:
        """What `load_checkpoint` fills from a classifier's file."""
        return ClassifierPart(self)

    def adapt_classifier(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A classifier's tensors made to fit the backbone, such as a table of positions."""
        return state

    def preprocessing(self) -> Preprocessing:
        """The shorter side to the model's, bilinear, and the middle of the image."""
        return Preprocessing(max(self.image_size), self.image_size, interpolation="bilinear")

    def head_cost(self) -> int:
        """Multiply-adds of the head, without the auxiliary one."""
        return self.decode_head.cost(self.level_sizes)


@dataclass(frozen=True)
class ClassifierPart:
    """What a segmenter and a classifier of the same sizes share, under the classifier's keys."""

    model: Segmenter

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the backbone that a classifier has too."""
        own, backbone = self.model.own_parts, self.model.get_submodule("backbone")
        return {k: v for k, v in backbone.state_dict().items() if not k.startswith(own)}

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A classifier's tensors made to fit these."""
        return self.model.adapt_classifier(state)

    def ignores(self, key: str) -> bool:
        """Whether a key is of a classifier's head, or of what else the backbone does not have."""
        return key.startswith(self.model.classifier_parts)
