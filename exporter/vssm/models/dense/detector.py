"""What every detector is: levels, a dense head on each, and heads that read regions of them.

Feature pyramid, region proposals, and the heads of RetinaNet and Mask R-CNN, in plain PyTorch, with
the keys of mmdetection. Sources: Lin et al., arXiv:1612.03144 and 1708.02002; Ren et al.,
arXiv:1506.01497; He et al., arXiv:1703.06870; and the numbers of the public code.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.artifact.manifest import Preprocessing
from vssm.models.base import ForwardDetails, details
from vssm.models.dense.base import DenseModel
from vssm.models.dense.heads import ConvNorm, Size, conv_weights
from vssm.models.dense.regions import (
    RATIOS,
    DetectionRules,
    Detections,
    anchors,
    best,
    best_boxes,
    clipped,
    corner,
    filled,
    moved,
    read_regions,
)
from vssm.models.layers import Linear, wide

DETECTION: Final = "detection"
DETECTIONS: Final = ("boxes", "scores", "labels", "masks")  # fields of `Detections`
ANCHORS: Final = len(RATIOS)  # at a place
STRIDES: Final = (4, 8, 16, 32, 64)  # of the levels that proposals are made from
ANCHOR: Final = 8  # side of a proposal's square anchor, in strides
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
        gives_masks: whether it says which part of a box belongs to the object.
    """

    task = DETECTION
    config: DetectionRules
    dense_names: tuple[str, ...]
    anchors = ANCHORS
    gives_masks = True

    @property
    def output_groups(self) -> Mapping[str, tuple[str, ...]]:  # type: ignore[override]
        """The levels, the levels and what the dense head says of them, or what is in an image."""
        return {
            "features": self.feature_names,
            "dense": (*self.feature_names, *self.dense_names),
            "boxes": DETECTIONS if self.gives_masks else DETECTIONS[:-1],
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

    def detect(
        self,
        images: Tensor,
        sizes: Sequence[Size] | None = None,
        *,
        rules: DetectionRules | None = None,
    ) -> list[Detections]:
        """What is in images (batch, 3, height, width), normalised and padded.

        Args:
            images: as for `forward`.
            sizes: (height, width) of each image before it was padded; None if none was.
            rules: which boxes are kept; None for those of the configuration.

        Raises:
            ValueError: there is not one size for each image, or one is larger than the images.
        """
        sizes = [self.image_size] * len(images) if sizes is None else list(sizes)
        height, width = self.image_size
        if len(sizes) != len(images) or any(
            not (0 < h <= height and 0 < w <= width) for h, w in sizes
        ):
            raise ValueError(
                f"sizes={sizes} for {len(images)} images of {height} x {width}: give the height "
                "and width of each before it was padded"
            )
        found = self.forward_details(images)
        return self.told(found, torch.tensor(sizes, device=images.device), rules)

    def told(
        self, found: ForwardDetails, sizes: Tensor, rules: DetectionRules | None = None
    ) -> list[Detections]:
        """What is in each image of a pass.

        Args:
            found: of that pass.
            sizes: (batch, 2) int64, height and width before the images were padded.
            rules: which boxes are kept; None for those of the configuration.
        """
        return [
            self._told(found, image, size, rules or self.config)
            for image, size in enumerate(sizes.unbind())
        ]

    def detected(self, found: ForwardDetails, sizes: Tensor) -> ForwardDetails:
        """A pass of one image with what is in it among the tensors, under `DETECTIONS`.

        Args:
            found: of that pass.
            sizes: (1, 2) int64, height and width before the image was padded.
        """
        (told,) = self.told(found, sizes)
        named = {name: getattr(told, name) for name in self.output_groups["boxes"]}
        return replace(found, tensors={**found.tensors, **named})

    def _told(
        self, found: ForwardDetails, image: int, size: Tensor, rules: DetectionRules
    ) -> Detections:
        levels = [found.tensors[name][image] for name in self.feature_names]
        dense = [found.tensors[name][image] for name in self.dense_names]
        limits = corner(size).to(levels[0].dtype)
        return self._detect(levels, list(zip(dense[::2], dense[1::2], strict=True)), limits, rules)

    @abstractmethod
    def _detect(
        self,
        levels: Sequence[Tensor],
        dense: Sequence[tuple[Tensor, Tensor]],
        limits: Tensor,
        rules: DetectionRules,
    ) -> Detections:
        """What is in one image: its levels, their logits and deltas, and the `corner` of it."""

    def _proposals(
        self,
        dense: Sequence[tuple[Tensor, Tensor]],
        limits: Tensor,
        rules: DetectionRules,
        least: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Boxes (n, 4) that may hold something, and their logits (n,), best first."""
        places, moves, logits, level = [], [], [], []
        for number, (maps, deltas) in enumerate(dense):
            stride = STRIDES[number]
            scores = by_anchor(maps, 1)[:, 0]
            some = best(scores, rules.level_proposals)
            sizes = maps.shape[1], maps.shape[2]
            places.append(anchors(sizes, stride, [ANCHOR * stride], maps)[some])
            moves.append(by_anchor(deltas, 4)[some])
            logits.append(scores[some])
            level.append(torch.full_like(some, number))
        box = clipped(moved(torch.cat(places), torch.cat(moves), least=least), limits)
        score, group = torch.cat(logits), torch.cat(level)
        keep = best_boxes(
            box,
            torch.where(filled(box), score, -math.inf),
            group,
            rules.proposal_overlap,
            groups=len(dense),
            most=rules.proposals,
        )
        return box[keep], score[keep]

    def preprocessing(self) -> Preprocessing:
        """The whole image as large as it fits, bilinear, padded at the bottom and the right."""
        longest = max(self.image_size)
        return Preprocessing(longest, self.image_size, interpolation="bilinear", fit="pad")

    def head_cost(self) -> int:
        """Multiply-adds of the dense head, without the heads that read regions."""
        return sum(map(math.prod, self.level_sizes)) * conv_weights(self.dense_head)


def by_anchor(maps: Tensor, width: int) -> Tensor:
    """A level's (anchors * width, height, width) as (anchors of all places, width)."""
    return maps.permute(1, 2, 0).reshape(-1, width)


def final(boxes: Tensor, scores: Tensor, rules: DetectionRules) -> tuple[Tensor, Tensor, Tensor]:
    """The boxes that are told, their scores and classes, best first.

    Args:
        boxes: (regions, classes or 1, 4), inside the image.
        scores: (regions, classes).
        rules: which are kept.
    """
    classes = scores.shape[1]
    region, label = (scores > rules.score).nonzero(as_tuple=True)
    box = boxes.expand(-1, classes, -1)[region, label]
    score = scores[region, label]
    keep = best_boxes(box, score, label, rules.overlap, groups=classes, most=rules.most)
    return box[keep], score[keep], label[keep]


def of_label(masks: Tensor, label: Tensor) -> Tensor:
    """Masks (n, classes, height, width) of one class each, (n, height, width)."""
    index = label[:, None, None, None].expand(-1, 1, *masks.shape[2:])
    return masks.gather(1, index)[:, 0]


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
        self.rpn_cls = nn.Conv2d(width, ANCHORS, 1)
        self.rpn_reg = nn.Conv2d(width, 4 * ANCHORS, 1)

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


class CocoDetector(Detector):
    """Base of the detectors with mmdetection's neck and heads."""

    neck: FeaturePyramid

    def preprocessing(self) -> Preprocessing:
        """As for every detector; 1344 stands for mmdetection's 1333, padded to a multiple of 32."""
        spec = super().preprocessing()
        return replace(spec, resize=1333) if spec.resize == 1344 else spec

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
        self.anchors, self.gives_masks = ANCHORS * SCALES, False
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

    def _detect(
        self,
        levels: Sequence[Tensor],
        dense: Sequence[tuple[Tensor, Tensor]],
        limits: Tensor,
        rules: DetectionRules,
    ) -> Detections:
        if not self.gives_masks:
            return self._retinanet(dense, limits, rules)
        least = -math.log(1000 / 16)
        regions, _ = self._proposals(dense, limits, rules, least)
        classes, deltas = self.roi_head.bbox_head(self.read(levels, regions, REGION))
        deltas = deltas.unflatten(1, (self.num_classes, 4))
        boxes = clipped(moved(regions, deltas, least=least, weights=(10, 5)), limits)
        box, score, label = final(boxes, classes.softmax(1)[:, :-1], rules)
        masks = self.roi_head.mask_head(self.read(levels, box, 2 * REGION)).sigmoid()
        return Detections(box, score, label, of_label(masks, label))

    def _retinanet(
        self, dense: Sequence[tuple[Tensor, Tensor]], limits: Tensor, rules: DetectionRules
    ) -> Detections:
        places, moves, scores, labels = [], [], [], []
        for number, (logits, deltas) in enumerate(dense):
            stride = 2 * STRIDES[number]
            # Three sides to a doubling.
            sides = [ANCHOR / 2 * 2 ** (i / SCALES) * stride for i in range(SCALES)]
            shares = by_anchor(logits, self.num_classes).sigmoid()
            anchor, label = (shares > rules.score).nonzero(as_tuple=True)
            score = shares[anchor, label]
            some = best(score, rules.level_proposals)
            anchor = anchor[some]
            places.append(
                anchors((logits.shape[1], logits.shape[2]), stride, sides, logits)[anchor]
            )
            moves.append(by_anchor(deltas, 4)[anchor])
            scores.append(score[some])
            labels.append(label[some])
        least = -math.log(1000 / 16)
        box = clipped(moved(torch.cat(places), torch.cat(moves), least=least), limits)
        share, kind = torch.cat(scores), torch.cat(labels)
        # Unlike proposals, boxes without an area count here, as in the official code.
        keep = best_boxes(box, share, kind, rules.overlap, groups=self.num_classes, most=rules.most)
        return Detections(box[keep], share[keep], kind[keep])

    def read(self, levels: Sequence[Tensor], boxes: Tensor, side: int) -> Tensor:
        """What the region heads read of boxes (n, 4): (n, channels, side, side).

        Args:
            levels: the first four or more of one image, (channels, height, width).
            boxes: in pixels of the image.
            side: 7 for the box head, 14 for the mask head.
        """
        lengths = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        index = (lengths / 56 + 1e-6).log2().floor().clamp(0, 3).long()
        return read_regions(levels[:4], STRIDES[:4], boxes, side, index)
