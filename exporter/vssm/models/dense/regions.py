"""Boxes: anchors, deltas, overlaps, and what a head reads of a region. Plain PyTorch, one image.

Boxes are (n, 4): x and y of the top left corner, then of the bottom right one, in pixels of the
image. Sources: Ren et al., arXiv:1506.01497; He et al., arXiv:1703.06870.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from vssm.errors import check_least
from vssm.models.dense.heads import Size

RATIOS: Final = (0.5, 1.0, 2.0)  # height over width of the anchors at a place
_AT_ONCE: Final = 32  # regions read together, which bounds the memory


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first.

    Attributes:
        boxes: (n, 4) in pixels of the model's input.
        scores: (n,) in [0, 1].
        labels: (n,) int64, indices of classes.
        masks: (n, 28, 28), the probability that a part of its box belongs to the object; None for
            detectors without masks.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class DetectionRules:
    """How many boxes are kept, and of which; the defaults are those of the official tests.

    Attributes:
        score: boxes of lower scores are left out.
        overlap: of two boxes of one class that overlap by more, the worse is left out.
        most: boxes of an image.
        level_proposals: best proposals, or RetinaNet's best boxes, that each level gives.
        proposals: best proposals of all levels.
        proposal_overlap: as `overlap`, for proposals of one level.
    """

    score: float = 0.05
    overlap: float = 0.5
    most: int = 100
    level_proposals: int = 1000
    proposals: int = 1000
    proposal_overlap: float = 0.7

    def __post_init__(self) -> None:
        self.check_rules()

    def check_rules(self) -> None:
        """Refuse numbers that are no shares, or no numbers of boxes.

        Raises:
            ValueError: there is one.
        """
        for name in ("score", "overlap", "proposal_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]; give a share")
        check_least(1, most=self.most, proposals=self.proposals)
        check_least(1, level_proposals=self.level_proposals)


def anchors(size: Size, stride: int, sides: Sequence[float], like: Tensor) -> Tensor:
    """Anchors (places * ratios * sides, 4) of a level: by row, column, ratio, side.

    Args:
        size: (height, width) of the level.
        stride: pixels between places; the first centre is pixel 0.
        sides: of the square anchors; the others have the same area.
        like: says device and dtype.
    """
    # The sides in float32 whatever the model's dtype, as in the official code.
    tall = torch.sqrt(torch.tensor(RATIOS))
    lengths = torch.tensor(sides)
    widths, heights = (((x[:, None] * lengths) / 2).flatten() for x in (1 / tall, tall))
    cell = torch.stack([-widths, -heights, widths, heights], dim=1)
    rows, columns = (torch.arange(n) * stride for n in size)
    x, y = columns.repeat(size[0]), rows.repeat_interleave(size[1])
    places = torch.stack([x, y, x, y], dim=1).to(like)
    return (places[:, None] + cell.to(like)).reshape(-1, 4)


def moved(
    boxes: Tensor, deltas: Tensor, *, least: float | None, weights: tuple[float, float] = (1, 1)
) -> Tensor:
    """Boxes (n, 4) moved and resized by deltas (n, ..., 4), (n, ..., 4).

    Args:
        boxes: what the deltas are relative to.
        deltas: of the centre, over width and height, and the logarithms of the sides' ratios.
        least: bound of these from below, None for none; from above it is log(1000 / 16).
        weights: that the deltas of the centre, and those of the sides, are divided by.
    """
    boxes = boxes.reshape(-1, *[1] * (deltas.dim() - 2), 4)
    first, last = boxes[..., :2], boxes[..., 2:]
    sides = last - first
    centre = (first + last) / 2 + deltas[..., :2] / weights[0] * sides
    ratios = (deltas[..., 2:] / weights[1]).clamp(least, math.log(1000 / 16)).exp()
    half = sides * ratios / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def corner(size: Tensor) -> Tensor:
    """The largest box (4,) that `clipped` leaves in an image of `size`, (height, width)."""
    return size.flip(0).repeat(2)


def clipped(boxes: Tensor, limits: Tensor) -> Tensor:
    """Boxes (..., 4) inside an image, whose `corner` is given, in their dtype."""
    return torch.minimum(boxes.clamp(0), limits)


def filled(boxes: Tensor) -> Tensor:
    """(n,) whether a box has an area."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def best(scores: Tensor, most: int) -> Tensor:
    """Indices of the highest scores (n,), at most so many, best first; of equals the lower one."""
    found: Tensor = torch.ops.vssm_regions.best(scores, most)
    return found


def best_boxes(
    boxes: Tensor, scores: Tensor, group: Tensor, overlap: float, *, groups: int, most: int
) -> Tensor:
    """Indices of the boxes that no better one of their group overlaps by more, best first.

    Args:
        boxes: (n, 4).
        scores: (n,); a box of -inf is left out.
        group: (n,) int64; boxes of different groups do not see each other.
        overlap: area of the intersection over that of the union.
        groups: how many there are.
        most: boxes that are kept.
    """
    found: Tensor = torch.ops.vssm_regions.best_boxes(
        boxes, scores, group, overlap=overlap, groups=groups, most=most
    )
    return found


@torch.library.custom_op("vssm_regions::best", mutates_args=())
def _best(scores: Tensor, most: int) -> Tensor:
    # A copy: what an operator returns may not be a part of something larger.
    return scores.argsort(descending=True, stable=True)[:most].clone()


@_best.register_fake
def _best_of_known_size(scores: Tensor, most: int) -> Tensor:
    size = scores.shape[0]
    # How many are above a threshold is known only when the model runs.
    count = min(size, most) if isinstance(size, int) else torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty(count, dtype=torch.int64)


@torch.library.custom_op("vssm_regions::best_boxes", mutates_args=())
def _best_boxes(
    boxes: Tensor, scores: Tensor, group: Tensor, *, overlap: float, groups: int, most: int
) -> Tensor:
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] > -math.inf]
    left = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for one in range(groups):
        members = (group[order] == one).nonzero()[:, 0]
        left[members] = _alone(boxes[order[members]], overlap)
    return order[left][:most].clone()


@_best_boxes.register_fake
def _some_boxes(
    boxes: Tensor, scores: Tensor, group: Tensor, *, overlap: float, groups: int, most: int
) -> Tensor:
    return group.new_empty(torch.library.get_ctx().new_dynamic_size())


def _alone(boxes: Tensor, overlap: float) -> Tensor:
    """(n,) whether a box stays, of boxes best first: those before it win if they stay."""
    left = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for i in range(len(boxes)):
        if not left[i]:
            continue
        later = boxes[i + 1 :]
        width = torch.minimum(boxes[i, 2], later[:, 2]) - torch.maximum(boxes[i, 0], later[:, 0])
        height = torch.minimum(boxes[i, 3], later[:, 3]) - torch.maximum(boxes[i, 1], later[:, 1])
        both = width.clamp(0) * height.clamp(0)
        left[i + 1 :] &= both <= overlap * (area[i] + area[i + 1 :] - both)
    return left


def read_regions(
    levels: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, side: int, index: Tensor
) -> Tensor:
    """RoIAlign: (n, channels, side, side) of levels (channels, height, width), a level a box.

    Sample points are as many as a part of the region has pixels, rounded up, and the map's pixels
    are centred in their squares ("aligned", sampling ratio 0).

    Args:
        levels: of one image.
        strides: of the levels.
        boxes: (n, 4).
        side: of what is read.
        index: (n,) int64, which level each box reads.
    """
    found: Tensor = torch.ops.vssm_regions.read(levels, strides, boxes, side, index)
    return found


@torch.library.custom_op("vssm_regions::read", mutates_args=())
def _read(
    levels: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, side: int, index: Tensor
) -> Tensor:
    found = levels[0].new_zeros(len(boxes), levels[0].shape[0], side, side)
    for number, (level, stride) in enumerate(zip(levels, strides, strict=True)):
        for some in (index == number).nonzero()[:, 0].split(_AT_ONCE):
            # A bilinear read is a product of one along the rows and one along the columns.
            scaled = boxes[some] / stride - 0.5
            rows = _reads(scaled[:, 1], scaled[:, 3], side, level.shape[1])
            columns = _reads(scaled[:, 0], scaled[:, 2], side, level.shape[2])
            found[some] = torch.einsum("nih,chw,njw->ncij", rows, level, columns)
    return found


@_read.register_fake
def _read_shape(
    levels: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, side: int, index: Tensor
) -> Tensor:
    return levels[0].new_empty(boxes.shape[0], levels[0].shape[0], side, side)


def _reads(start: Tensor, end: Tensor, side: int, length: int) -> Tensor:
    """(n, side, length): how much of each pixel along an axis a part of a region reads."""
    part = (end - start) / side
    points = part.ceil().clamp(min=0)  # a region without extent reads nothing
    most = int(points.max().item()) if len(points) else 0
    number = torch.arange(most, device=start.device)
    # Of each part, at the middles of equal pieces.
    offset = (number + 0.5) / points.clamp(min=1)[:, None]
    place = torch.arange(side, device=start.device)[:, None] + offset[:, None]
    point = start[:, None, None] + place * part[:, None, None]
    # A point that is more than a pixel outside reads zero; nearer, the border's pixel.
    inside = (number < points[:, None])[:, None] & (point >= -1) & (point <= length)
    pixel = torch.arange(length, device=start.device)
    near = 1 - (point.clamp(0, length - 1)[..., None] - pixel).abs()
    weight = near.clamp(0) * inside[..., None]
    return weight.sum(2) / points.clamp(min=1)[:, None, None]
