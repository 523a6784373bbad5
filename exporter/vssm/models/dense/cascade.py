"""Cascade Mask R-CNN as Vim's detection code has it: norms over channels, detectron2's keys.

Source: Li et al., "ViTDet", arXiv:2203.16527; Cai & Vasconcelos, arXiv:1712.00726; and the numbers
of Vim's public code.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.models.dense.detector import ANCHORS, REGION
from vssm.models.dense.heads import Size, conv_weights
from vssm.models.layers import LayerNorm, Linear, wide

_EPS: Final = 1e-6
# What each stage's deltas of the centre, and those of the sides, are divided by.
CASCADE_WEIGHTS: Final = ((10, 5), (20, 10), (30, 15))
STAGES: Final = len(CASCADE_WEIGHTS)


class MapNorm(LayerNorm):
    """A norm over the channels of a map, at each place by itself; float32 or wider."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=_EPS)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.LayerNorm has
        """(batch, channels, height, width) to the same."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedConv(nn.Conv2d):
    """A convolution without bias, and a norm of its channels under the key `norm`."""

    def __init__(self, channels: int, width: int, kernel: int) -> None:
        super().__init__(channels, width, kernel, padding=kernel // 2, bias=False)
        self.norm = MapNorm(width)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Conv2d has
        """(batch, channels, height, width) to (batch, width, height, width), float32 or wider."""
        normed: Tensor = self.norm(super().forward(input.to(self.weight.dtype)))
        return normed


class Doubled(nn.ConvTranspose2d):
    """A transposed convolution that makes four places of each."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width, 2, 2)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        """(batch, channels, height, width) to (batch, width, 2 * height, 2 * width)."""
        return wide(super().forward(input.to(self.weight.dtype), output_size))


class SimpleFeaturePyramid(nn.Module):
    """p2 to p6 of one map of stride 16.

    Keys are indices of the official sequences, whose GELU and pooling have no weights.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.simfp_2 = nn.ModuleDict(
            {
                "0": Doubled(channels, half),
                "1": MapNorm(half),
                "3": Doubled(half, quarter),
                "4": NormedConv(quarter, width, 1),
                "5": NormedConv(width, width, 3),
            }
        )
        self.simfp_3 = nn.ModuleDict(
            {
                "0": Doubled(channels, half),
                "1": NormedConv(half, width, 1),
                "2": NormedConv(width, width, 3),
            }
        )
        self.simfp_4 = nn.ModuleDict(
            {"0": NormedConv(channels, width, 1), "1": NormedConv(width, width, 3)}
        )
        self.simfp_5 = nn.ModuleDict(
            {"1": NormedConv(channels, width, 1), "2": NormedConv(width, width, 3)}
        )

    def levels(self, x: Tensor) -> list[Tensor]:
        """The map (batch, channels, height, width) to five, finest first."""
        finest = x
        for key, module in self.simfp_2.items():
            finest = module(finest)
            if key == "1":
                finest = functional.gelu(finest)
        maps = [finest]
        for source, layers in (
            (x, self.simfp_3),
            (x, self.simfp_4),
            (functional.max_pool2d(x, 2), self.simfp_5),
        ):
            level = source
            for module in layers.values():
                level = module(level)
            maps.append(level)
        return [*maps, maps[-1][:, :, ::2, ::2]]

    def cost(self, size: Size) -> int:
        """Multiply-adds for a map of this size."""
        area = math.prod(size)
        quarter = math.prod(side // 2 for side in size)
        total = 0
        for scales, layers in (
            ((1, 0, 4, 16, 16), self.simfp_2),
            ((1, 4, 4), self.simfp_3),
            ((1, 1), self.simfp_4),
        ):
            for scale, module in zip(scales, layers.values(), strict=True):
                total += scale * area * _own(module)
        return total + quarter * conv_weights(self.simfp_5)


def _own(module: nn.Module) -> int:
    return module.weight.numel() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) else 0


class CascadeProposalHead(nn.Module):
    """Two convolutions, and for each anchor whether it holds something and how to move it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.ModuleDict(
            {f"conv{i}": nn.Conv2d(width, width, 3, padding=1) for i in range(2)}
        )
        self.objectness_logits = nn.Conv2d(width, ANCHORS, 1)
        self.anchor_deltas = nn.Conv2d(width, 4 * ANCHORS, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A level to logits (batch, anchors, ...) and deltas (batch, 4 * anchors, ...)."""
        x = x.to(self.objectness_logits.weight.dtype)
        for conv in self.conv.values():
            x = torch.relu(conv(x))
        return wide(self.objectness_logits(x)), wide(self.anchor_deltas(x))


class CascadeBoxHead(nn.Module):
    """Four convolutions and a linear layer on a region's features."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        for i in range(1, 5):
            self.add_module(f"conv{i}", NormedConv(channels, channels, 3))
        self.fc1 = Linear(channels * REGION**2, width)

    def forward(self, features: Tensor) -> Tensor:
        """(regions, channels, 7, 7) to (regions, width)."""
        x = features
        for i in range(1, 5):
            x = torch.relu(self.get_submodule(f"conv{i}")(x))
        return torch.relu(self.fc1(x.flatten(1)))


class BoxPredictor(nn.Module):
    """A region's class and one box, whatever the class; the background is the last class."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = Linear(width, num_classes + 1)
        self.bbox_pred = Linear(width, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(regions, width) to logits (regions, classes + 1) and deltas (regions, 4)."""
        return wide(self.cls_score(features)), wide(self.bbox_pred(features))


class CascadeMaskHead(nn.Module):
    """A region's features to a mask of twice their size for each class."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        for i in range(1, 5):
            self.add_module(f"mask_fcn{i}", NormedConv(channels, channels, 3))
        self.deconv = Doubled(channels, channels)
        self.predictor = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(regions, channels, 14, 14) to logits (regions, classes, 28, 28)."""
        x = features
        for i in range(1, 5):
            x = torch.relu(self.get_submodule(f"mask_fcn{i}")(x))
        x = torch.relu(self.deconv(x))
        return wide(self.predictor(x.to(self.predictor.weight.dtype)))


class CascadeHeads(nn.Module):
    """Three stages of box heads, each for the boxes of the one before it, and a mask head."""

    def __init__(self, channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.box_head = nn.ModuleList(CascadeBoxHead(channels, width) for _ in range(STAGES))
        self.box_predictor = nn.ModuleList(BoxPredictor(width, num_classes) for _ in range(STAGES))
        self.mask_head = CascadeMaskHead(channels, num_classes)
