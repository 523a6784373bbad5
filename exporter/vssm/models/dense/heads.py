"""UPerNet's head and the layers of dense heads, in plain PyTorch with the official keys.

Source: Xiao et al., "Unified Perceptual Parsing", arXiv:1807.10221, and the numbers of the public
code. Batch norms are folded into their convolution with the stored statistics, but in training they
take those of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.models.layers import fold_batch_norm, wide

POOL_SCALES: Final = (1, 2, 3, 6)

Size = tuple[int, int]


class ConvNorm(nn.Module):
    """A convolution without bias, a batch norm and, by default, a relu; keys `conv` and `bn`.

    Its parameters stay float32 in a half-precision export: they are folded there and rounded once.
    """

    def __init__(
        self, channels: int, width: int, kernel: int, *, stride: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, width, ...), in the dtype of `x`."""
        if self.training:
            y = self.bn(self.conv(x))
            return torch.relu(y) if self.relu else y
        weight, bias = (part.to(x.dtype) for part in fold_batch_norm(self.conv, self.bn))
        y = functional.conv2d(x, weight, bias, self.conv.stride, self.conv.padding)
        return torch.relu(y) if self.relu else y


def upsample(x: Tensor, size: Size) -> Tensor:
    """A map resized to `size`, bilinear, align_corners=False."""
    if tuple(x.shape[2:]) == size:
        return x
    if tuple(x.shape[2:]) == (1, 1):
        # The one value everywhere: no runtime need interpolate.
        return x.expand(-1, -1, *size)
    return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)


def average_pool(x: Tensor, side: int) -> Tensor:
    """Adaptive average pooling of a map to (side, side), as two products with constant matrices.

    Windows overlap where `side` does not divide the map, which exporters write as dozens of nodes
    or not at all; two products are exact and fast everywhere.
    """
    rows, columns = (_averages(n, side, x) for n in x.shape[2:])
    return rows @ x @ columns.T


def _averages(length: int, windows: int, like: Tensor) -> Tensor:
    """(windows, length): window i is the mean of places i*length//windows up to the next start."""
    window = torch.arange(windows, device=like.device)[:, None]
    place = torch.arange(length, device=like.device)
    first = window * length // windows
    behind = ((window + 1) * length + windows - 1) // windows
    inside = ((place >= first) & (place < behind)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


class Pooling(nn.ModuleDict):
    """The mean of each of (side, side) windows, mixed, at the map's size again."""

    def __init__(self, channels: int, width: int, side: int) -> None:
        # The official Sequential has the pooling, which has no weights, as entry 0.
        super().__init__({"1": ConvNorm(channels, width, 1)})
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, width, height, width)."""
        return upsample(self["1"](average_pool(x, self.side)), _size(x))


class UPerHead(nn.Module):
    """Pyramid pooling of the coarsest level, a feature pyramid, and a classifier of every place.

    Args:
        channels: widths of the levels, finest first.
        width: of everything inside.
        num_classes: of the logits.

    Attributes:
        dropout: share of the channels in front of the classifier that training leaves out.
    """

    dropout = 0.0

    def __init__(self, channels: Sequence[int], width: int, num_classes: int) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(Pooling(channels[-1], width, s) for s in POOL_SCALES)
        self.bottleneck = ConvNorm(channels[-1] + len(POOL_SCALES) * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvNorm(c, width, 1) for c in channels[:-1])
        self.fpn_convs = nn.ModuleList(ConvNorm(width, width, 3) for _ in channels[:-1])
        self.fpn_bottleneck = ConvNorm(len(channels) * width, width, 3)
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels (batch, channels, height, width), finest first, to logits of the first's size."""
        dtype = self.conv_seg.weight.dtype
        *finer, coarsest = (level.to(dtype) for level in levels)
        maps = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        maps.append(self._pooled(coarsest))
        for i in range(len(maps) - 1, 0, -1):
            # What was added to a level goes on to the finer ones.
            maps[i - 1] = maps[i - 1] + upsample(maps[i], _size(maps[i - 1]))
        maps[:-1] = [conv(x) for conv, x in zip(self.fpn_convs, maps[:-1], strict=True)]
        size = _size(maps[0])
        fused = self.fpn_bottleneck(torch.cat([upsample(x, size) for x in maps], dim=1))
        return wide(self.conv_seg(thinned(fused, self)))

    def _pooled(self, x: Tensor) -> Tensor:
        pooled = [pooling(x) for pooling in self.psp_modules]
        mixed: Tensor = self.bottleneck(torch.cat([x, *pooled], dim=1))
        return mixed

    def cost(self, sizes: Sequence[Size]) -> int:
        """Multiply-adds for levels of these sizes, finest first."""
        areas = [math.prod(size) for size in sizes]
        pools = sum(side**2 for side in POOL_SCALES) * conv_weights(self.psp_modules[0])
        total = pools + areas[-1] * conv_weights(self.bottleneck)
        for area, lateral, conv in zip(areas, self.lateral_convs, self.fpn_convs, strict=False):
            total += area * (conv_weights(lateral) + conv_weights(conv))
        return total + areas[0] * (conv_weights(self.fpn_bottleneck) + self.conv_seg.weight.numel())


class AuxiliaryHead(nn.Module):
    """A convolution and a classifier on one level: it helps training, and inference leaves it out.

    Its keys belong to the official checkpoints.

    Attributes:
        dropout: as for `UPerHead`.
    """

    dropout = 0.0

    def __init__(self, channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([ConvNorm(channels, width, 3)])
        self.conv_seg = nn.Conv2d(width, num_classes, 1)

    def forward(self, level: Tensor) -> Tensor:
        """Logits of a level (batch, channels, height, width), of its size."""
        x = self.convs[0](level.to(self.conv_seg.weight.dtype))
        return wide(self.conv_seg(thinned(x, self)))


def thinned(x: Tensor, head: UPerHead | AuxiliaryHead) -> Tensor:
    """A map with some channels left out, in training."""
    # Asked here, not left to dropout2d: an export would have a node that does nothing.
    return functional.dropout2d(x, head.dropout) if head.training and head.dropout else x


def _size(x: Tensor) -> Size:
    return x.shape[2], x.shape[3]


def conv_weights(module: nn.Module) -> int:
    """Elements of the convolutions below a module: its multiply-adds at one place."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))
