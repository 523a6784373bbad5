"""What every segmenter is: a backbone that gives four levels, and UPerNet's head on them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from vssm.artifact.manifest import Preprocessing
from vssm.errors import UnsupportedError
from vssm.models.base import ForwardDetails, VisionModel, details, refuse_merging
from vssm.models.dense.heads import AuxiliaryHead, ConvNorm, Size, UPerHead, upsample
from vssm.pruning.schedule import PruneSchedule, Schedule, Stage
from vssm.pruning.select import StageResult

SEGMENTATION: Final = "segmentation"


@dataclass(frozen=True)
class Levels:
    """What a backbone and its neck give.

    Attributes:
        tensors: every map (batch, channels, height, width) by its official name.
        chosen: what each stage of the schedule kept.
        blocks: the blocks' outputs, where asked for.
    """

    tensors: Mapping[str, Tensor]
    chosen: list[StageResult] = field(default_factory=list)
    blocks: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)


class Segmenter(VisionModel):
    """Base of the segmenters. A subclass makes `backbone`, calls `_add_heads`, fills `_levels`.

    The logits of `forward` are (batch, num_classes, height, width) of the finest level;
    the output `labels` holds classes of the input's size. The auxiliary head belongs to the
    checkpoints and to training; neither `forward` nor an export runs it.

    Attributes:
        feature_names: the maps that the head reads, finest first.
        level_sizes: their (height, width).
        auxiliary_level: index of the one that the auxiliary head reads.
    """

    task = SEGMENTATION
    schedule: PruneSchedule | None  # none of them merges
    stages: dict[int, Stage]
    feature_names: tuple[str, ...]
    level_sizes: tuple[Size, ...]
    auxiliary_level: int

    def _add_heads(self, channels: tuple[int, ...], width: int, auxiliary_width: int) -> None:
        self.decode_head = UPerHead(channels, width, self.num_classes)
        self.auxiliary_head = AuxiliaryHead(
            channels[self.auxiliary_level], auxiliary_width, self.num_classes
        )

    @abstractmethod
    def _levels(self, images: Tensor, with_blocks: bool) -> Levels:
        """The levels under `feature_names`, and what else has a name."""

    def _forward(self, images: Tensor, with_blocks: bool) -> ForwardDetails:
        found = self._levels(images, with_blocks)
        logits = self.decode_head([found.tensors[name] for name in self.feature_names])
        tensors = {**found.tensors, "decode_logits": logits}
        return details(logits, found.chosen, found.blocks, tensors)

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

    def preprocessing(self) -> Preprocessing:
        """The shorter side to the model's, bilinear, and the middle of the image."""
        return Preprocessing(max(self.image_size), self.image_size, interpolation="bilinear")

    def stays_wide(self, name: str) -> bool:
        """What the backbone says, and convolutions that are folded with their norm."""
        owner, _, _ = name.rpartition(".")
        above = self.get_submodule(owner.rpartition(".")[0])
        return isinstance(above, ConvNorm) or isinstance(self.get_submodule(owner), nn.BatchNorm2d)

    def head_cost(self) -> int:
        """Multiply-adds of the head, without the auxiliary one."""
        return self.decode_head.cost(self.level_sizes)


def check_taps(taps: tuple[int, ...], depth: int) -> None:
    """Refuse blocks that the four levels cannot be read after.

    Raises:
        ValueError: there are not four, in order, the last block the last of them.
    """
    if len(taps) != 4 or list(taps) != sorted({*taps}) or taps[0] < 1 or taps[-1] != depth:
        raise ValueError(
            f"taps={list(taps)} are not four of the blocks 1 to {depth} in order, the last being "
            f"{depth}; give them, counted from 1"
        )


def check_positive(config: Any, *names: str) -> None:
    """Refuse sizes below 1.

    Raises:
        ValueError: one is.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} is below 1; give a positive size")


def only_pruning(schedule: Schedule | None) -> PruneSchedule | None:
    """The schedule of a dense model, whose tokens leave.

    Raises:
        UnsupportedError: they merge, or stay in the sequence as zeros.
    """
    pruning = refuse_merging(
        "a dense head needs the place of every token, and a merged one has none", schedule
    )
    if pruning is not None and pruning.alignment == "masked":
        raise UnsupportedError(
            "alignment='masked' keeps every token in its place, so there is nothing for a dense "
            "head to restore; use alignment='gap', 'constant' or 'none'"
        )
    return pruning
