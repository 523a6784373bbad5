"""What detectors do with boxes, in standard operators: TopK, NonMaxSuppression and RoiAlign."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from onnxscript import values

# Importing it defines the operators that are translated here.
from vssm.models.dense import regions  # noqa: F401

# No score: NonMaxSuppression leaves out what is not above it, so also what is marked by -inf.
_LOWEST: Final = float(np.finfo(np.float32).min)


def region_translations(opset: int) -> Mapping[Any, Callable[..., Any]]:
    """How the operators of `models.dense.regions` are written, by operator."""
    written = _Regions(opset)

    def function(method: Callable[..., Any]) -> Callable[..., Any]:
        def translate(*operands: Any, **options: Any) -> Any:
            return method(*operands, **options)

        # The exporter notes things on what it is given, which a method does not allow.
        return translate

    return {
        getattr(torch.ops.vssm_regions, name).default: function(getattr(written, name))
        for name in ("best", "best_boxes", "read")
    }


class _Regions:
    """The translations with the standard operators of one version."""

    def __init__(self, opset: int) -> None:
        self.op = values.Opset("", opset)

    def _ints(self, *numbers: int) -> Any:
        return self.op.Constant(value_ints=list(numbers))

    def best(self, scores: Any, most: int) -> Any:
        """TopK gives the lower index first of equals, as a stable sort does."""
        count = self.op.Min(self.op.Shape(scores), self._ints(most))
        _, index = self.op.TopK(scores, count, axis=0, largest=1, sorted=1)
        return index

    def best_boxes(
        self, boxes: Any, scores: Any, group: Any, *, overlap: float, groups: int, most: int
    ) -> Any:
        """Groups are the classes of one NonMaxSuppression: a box has a score in its own alone."""
        op, first = self.op, self._ints(0)
        lowest = op.Constant(value_float=_LOWEST)
        own = op.Equal(
            op.Unsqueeze(self._ints(*range(groups)), self._ints(1)), op.Unsqueeze(group, first)
        )
        by_group = op.Where(own, op.Unsqueeze(scores, first), lowest)
        chosen = op.NonMaxSuppression(
            op.Unsqueeze(boxes, first),
            op.Unsqueeze(by_group, first),
            self._ints(most),
            op.Constant(value_float=overlap),
            lowest,
        )
        index = op.Gather(chosen, op.Constant(value_int=2), axis=1)  # image, class, box
        return op.Gather(index, self.best(op.Gather(scores, index), most))

    def read(
        self, levels: Sequence[Any], strides: Sequence[int], boxes: Any, side: int, index: Any
    ) -> Any:
        """Each level reads its own boxes; then what was read is put into the boxes' order."""
        op, parts, places = self.op, [], []
        for number, (level, stride) in enumerate(zip(levels, strides, strict=True)):
            own = op.NonZero(op.Equal(index, op.Constant(value_int=number)))
            place = op.Reshape(own, self._ints(-1))
            image = op.Mul(place, op.Constant(value_int=0))
            part = op.RoiAlign(
                op.Unsqueeze(level, self._ints(0)),
                op.Gather(boxes, place),
                image,
                coordinate_transformation_mode="half_pixel",
                output_height=side,
                output_width=side,
                sampling_ratio=0,
                spatial_scale=1 / stride,
            )
            parts.append(part)
            places.append(place)
        place = op.Concat(*places, axis=0)
        _, order = op.TopK(place, op.Shape(place), axis=0, largest=0, sorted=1)
        return op.Gather(op.Concat(*parts, axis=0), order)
