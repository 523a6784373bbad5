"""What every detector is: levels, a dense head on each, and heads that read regions of them.

Feature pyramid, region proposals, and the heads of RetinaNet and Mask R-CNN, in plain PyTorch, with
the keys of mmdetection. Sources: Lin et al., arXiv:1612.03144 and 1708.02002; Ren et al.,
arXiv:1506.01497; He et al., arXiv:1703.06870; and the numbers of the public code.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.models.base import ForwardDetails, details
from vssm.models.dense.base import DenseModel
from vssm.models.dense.heads import ConvNorm, Size
from vssm.models.layers import Linear, wide

DETECTION: Final = "detection"
RATIOS: Final = 3  # shapes of the anchors at a place
SCALES: Final = 3  # sizes of each, in RetinaNet
REGION: Final = 7  # side of what the box head reads of a region


class Detector(DenseModel):
    """Base of the detectors. A subclass fills `_levels` and gives `dense_head`.

    `forward` gives the class logits of every anchor, (batch, anchors, classes), of a region
    proposal network one class; `forward_details` all of the dense part by its official names. The
    heads that read regions are modules of the checkpoint: call them with what RoIAlign gives.

    Attributes:
        dense_names: outputs of the dense head, class logits and box deltas of each level in turn.
        anchors: at each place.
    """

    task = DETECTION
    dense_names: tuple[str, ...]
    anchors = RATIOS

    @property
    def output_groups(self) -> Mapping[str, tuple[str, ...]]:  # type: ignore[override]
        """The levels, or the levels and what the dense head says of them."""
        return {
            "features": self.feature_names,
            "dense": (*self.feature_names, *self.dense_names),
        }

    @property
    @abstractmethod
    def dense_head(self) -> nn.Module:
        """What a level goes through, to its logits and deltas."""

    def _forward(self, images: Tensor, with_blocks: bool) -> ForwardDetails:
        found = self._levels(images, with_blocks)
        pairs = [self.dense_head(found.tensors[name]) for name in self.feature_names]
        outputs = [output for pair in pairs for output in pair]
        dense = dict(zip(self.dense_names, outputs, strict=True))
        logits = torch.cat([self._by_anchor(pair[0]) for pair in pairs], dim=1)
        return details(logits, found.chosen, found.blocks, {**found.tensors, **dense})

    def _by_anchor(self, maps: Tensor) -> Tensor:
        """(batch, anchors * classes, height, width) to (batch, anchors of all places, classes)."""
        classes = maps.shape[1] // self.anchors
        return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, classes)

    def preprocessing(self) -> None:
        """None: images are resized with their ratio kept and padded, which nothing here does."""

    def head_cost(self) -> int:
        """Multiply-adds of the dense head, without the heads that read regions."""
        return sum(map(math.prod, self.level_sizes)) * conv_weights(self.dense_head)


class Conv(nn.Module):
    """A convolution with a bias under the key `conv`, and by default a relu."""

    def __init__(self, channels: int, width: int, kernel: int, *, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, width, height, width)."""
        y = self.conv(x.to(self.conv.weight.dtype))
        return torch.relu(y) if self.relu else y


class FeaturePyramid(nn.Module):
    """Lateral convolutions, sums from coarse to fine, a convolution of each sum, and more levels.

    Args:
        channels: widths of the levels that are read, finest first.
        width: of the pyramid's levels.
        norm: batch norms behind the convolutions; else they have a bias.
        strided: two more levels by convolutions of stride 2; else one, every second place of the
            last.
    """

    def __init__(
        self, channels: Sequence[int], width: int, *, norm: bool, strided: bool = False
    ) -> None:
        super().__init__()
        self.strided = strided

        def layer(inputs: int, kernel: int, stride: int = 1) -> nn.Module:
            if norm:
                return ConvNorm(inputs, width, kernel, stride=stride, relu=False)
            return Conv(inputs, width, kernel, relu=False)

        self.lateral_convs = nn.ModuleList(layer(c, 1) for c in channels)
        convs = [layer(width, 3) for _ in channels]
        # RetinaNet's two further levels are made from the one before them.
        convs += [layer(width, 3, 2) for _ in range(2)] if strided else []
        self.fpn_convs = nn.ModuleList(convs)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels (batch, channels, height, width), finest first, to the pyramid's, float32."""
        maps = [conv(x) for conv, x in zip(self.lateral_convs, levels, strict=True)]
        for i in range(len(maps) - 1, 0, -1):
            size = maps[i - 1].shape[2:]
            maps[i - 1] = maps[i - 1] + functional.interpolate(maps[i], size=size, mode="nearest")
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=False)]
        for conv in list(self.fpn_convs)[len(maps) :]:
            outputs.append(conv(outputs[-1]))
        if not self.strided:
            outputs.append(outputs[-1][:, :, ::2, ::2])
        return [wide(x) for x in outputs]

    def cost(self, sizes: Sequence[Size]) -> int:
        """Multiply-adds for levels of these sizes and, with strides, of the two further ones."""
        further = len(self.fpn_convs) - len(self.lateral_convs)
        areas = [math.prod(size) for size in halved(sizes, further)]
        both = (
            *zip(areas, self.lateral_convs, strict=False),
            *zip(areas, self.fpn_convs, strict=True),
        )
        return sum(area * conv_weights(conv) for area, conv in both)


def halved(sizes: Sequence[Size], more: int) -> tuple[Size, ...]:
    """Sizes, and so many further ones of half of the last each, rounded up."""
    found = list(sizes)
    for _ in range(more):
        found.append((math.ceil(found[-1][0] / 2), math.ceil(found[-1][1] / 2)))
    return tuple(found)


class ProposalHead(nn.Module):
    """A convolution, and for each anchor whether it holds something and how to move it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rpn_conv = nn.Conv2d(width, width, 3, padding=1)
        self.rpn_cls = nn.Conv2d(width, RATIOS, 1)
        self.rpn_reg = nn.Conv2d(width, 4 * RATIOS, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A level to logits (batch, anchors, ...) and deltas (batch, 4 * anchors, ...)."""
        x = torch.relu(self.rpn_conv(x.to(self.rpn_conv.weight.dtype)))
        return wide(self.rpn_cls(x)), wide(self.rpn_reg(x))


class RetinaHead(nn.Module):
    """Two towers of convolutions: the classes of every anchor, and how to move it."""

    def __init__(self, width: int, depth: int, anchors: int, num_classes: int) -> None:
        super().__init__()
        self.cls_convs = nn.ModuleList(Conv(width, width, 3) for _ in range(depth))
        self.reg_convs = nn.ModuleList(Conv(width, width, 3) for _ in range(depth))
        self.retina_cls = nn.Conv2d(width, anchors * num_classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(width, 4 * anchors, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A level to logits (batch, anchors * classes, ...), deltas (batch, 4 * anchors, ...)."""
        classes = boxes = x
        for conv in self.cls_convs:
            classes = conv(classes)
        for conv in self.reg_convs:
            boxes = conv(boxes)
        return wide(self.retina_cls(classes)), wide(self.retina_reg(boxes))


class BoxHead(nn.Module):
    """A region's features to its class and, for each class, its box.

    Args:
        channels: of the features.
        convs: convolutions with batch norms in front of the linear layers.
        linears: linear layers in front of the two last ones.
        width: of the linear layers.
        num_classes: without the background, which is the last one.
    """

    def __init__(
        self, channels: int, *, convs: int, linears: int, width: int, num_classes: int
    ) -> None:
        super().__init__()
        self.channels = channels
        if convs:
            self.shared_convs = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in range(convs))
        inputs = [channels * REGION**2, *[width] * (linears - 1)]
        self.shared_fcs = nn.ModuleList(Linear(size, width) for size in inputs)
        self.fc_cls = Linear(width, num_classes + 1)
        self.fc_reg = Linear(width, 4 * num_classes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(regions, channels, 7, 7) to logits (regions, classes + 1), deltas (regions, 4 each)."""
        x = features
        for conv in getattr(self, "shared_convs", ()):
            x = conv(x)
        x = x.flatten(1)
        for linear in self.shared_fcs:
            x = torch.relu(linear(x))
        return wide(self.fc_cls(x)), wide(self.fc_reg(x))


class MaskHead(nn.Module):
    """A region's features to a mask of twice their size for each class."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(Conv(channels, channels, 3) for _ in range(4))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(regions, channels, 14, 14) to logits (regions, classes, 28, 28)."""
        x = features
        for conv in self.convs:
            x = conv(x)
        return wide(self.conv_logits(torch.relu(self.upsample(x))))


class RegionHeads(nn.Module):
    """Mask R-CNN's two heads, under the key `roi_head`."""

    def __init__(self, bbox_head: BoxHead, mask_head: MaskHead) -> None:
        super().__init__()
        self.bbox_head, self.mask_head = bbox_head, mask_head


def conv_weights(module: nn.Module) -> int:
    """Elements of the convolutions below a module: its multiply-adds at one place."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))


class CocoDetector(Detector):
    """Base of the detectors with mmdetection's neck and heads."""

    neck: FeaturePyramid

    def _add_mask_rcnn(
        self, widths: Sequence[int], sizes: Sequence[Size], box: BoxHead, *, norm: bool
    ) -> None:
        """Five levels of the backbone's maps, region proposals, and the heads that read regions."""
        width = box.channels
        self.neck = FeaturePyramid(widths, width, norm=norm)
        self.rpn_head = ProposalHead(width)
        self.roi_head = RegionHeads(box, MaskHead(width, self.num_classes))
        self._name(sizes, 1, "rpn")

    def _add_retinanet(
        self, widths: Sequence[int], sizes: Sequence[Size], width: int, depth: int
    ) -> None:
        """Five levels of the backbone's maps, and RetinaNet's head."""
        self.neck = FeaturePyramid(widths, width, norm=True, strided=True)
        self.anchors = RATIOS * SCALES
        self.bbox_head = RetinaHead(width, depth, self.anchors, self.num_classes)
        self._name(sizes, 2, "head")

    def _name(self, sizes: Sequence[Size], more: int, head: str) -> None:
        self.level_sizes, self._read = halved(sizes, more), tuple(sizes)
        levels = range(len(self.level_sizes))
        self.feature_names = tuple(f"fpn{i}" for i in levels)
        self.dense_names = tuple(f"{head}.{part}{i}" for i in levels for part in ("cls", "reg"))

    @property
    def dense_head(self) -> nn.Module:
        """The region proposals' head, or RetinaNet's."""
        return self.rpn_head if hasattr(self, "rpn_head") else self.bbox_head

    def _pyramid(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """The neck's levels of the backbone's maps, by their names."""
        return dict(zip(self.feature_names, self.neck(maps), strict=True))

    def neck_cost(self) -> int:
        """Multiply-adds of the feature pyramid."""
        return self.neck.cost(self._read)
