"""Agreement of what a detector finds with what the float64 oracle finds, box by box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from vssm.artifact.manifest import BOXES, DETECTIONS
from vssm.types import Array


@dataclass(frozen=True)
class DetectionTolerance:
    """What the detections of an export in one dtype may differ from the oracle's by.

    Attributes:
        boxes: pixels of a coordinate.
        scores: of a score; detections this near to the least score, or to the last of as many as
            may be told, may be missing.
        masks: of a part's probability.
        found: share of the others that must be found, on either side.
    """

    boxes: float
    scores: float
    masks: float
    found: float


# float32 as the official numbers are held against. float16 from a small Mask R-CNN of fixture
# weights, whose proposals change places where their logits are near: of 96 clear detections in six
# images 86 were found this near, in the worst image 80 %. With a wider margin of the scores fewer
# are clear, with a narrower one more are lost by a score alone.
# No runtime here has run bfloat16: it is three bits shorter.
DETECTION_TOLERANCES: Final[Mapping[str, DetectionTolerance]] = {
    "float32": DetectionTolerance(boxes=0.05, scores=1e-3, masks=1e-3, found=1.0),
    "float16": DetectionTolerance(boxes=3.0, scores=3e-2, masks=1e-1, found=0.75),
    "bfloat16": DetectionTolerance(boxes=8.0, scores=6e-2, masks=3e-1, found=0.4),
}


@dataclass(frozen=True)
class DetectionComparison:
    """Detections of all images.

    Attributes:
        name: which run, in words.
        clear: those of the oracle that rounding cannot make appear or vanish.
        found: of these, those that the session has too: class, box and score.
        extra: clear detections of the session that the oracle does not have.
        disordered: neighbours in the session's order that the oracle's scores clearly reverse.
        boxes: largest error of a coordinate of those found, in pixels.
        scores: largest error of their scores.
        masks: largest error of their masks.
        passed: whether all of it is within the tolerance.
    """

    name: str
    clear: int
    found: int
    extra: int
    disordered: int
    boxes: float
    scores: float
    masks: float
    passed: bool

    def __str__(self) -> str:
        return (
            f"{self.found} of {self.clear} clear detections found, {self.extra} others, "
            f"{self.disordered} out of order, masks off by {self.masks:.1e}"
        )


def compare_detections(
    name: str,
    got: Mapping[str, Array],
    want: Sequence[Mapping[str, Array]],
    rules: Mapping[str, float],
    tolerance: DetectionTolerance,
    *,
    images: Sequence[int],
) -> DetectionComparison:
    """Match the detections of some images with the oracle's.

    Args:
        name: of the run, in words.
        got: the session's outputs, images one behind the other; "detections" has how many of each.
        want: the oracle's outputs of each image.
        rules: the least "score", and how many are told at "most".
        tolerance: what may differ.
        images: which of them are compared.
    """
    ends = np.cumsum(got[DETECTIONS])[:-1]
    names = [key for key in (BOXES, "scores", "labels", "masks") if key in got]
    parts = {key: np.split(got[key], ends) for key in names}
    found = _Found()
    for image in images:
        found.add({key: parts[key][image] for key in names}, want[image], rules, tolerance)
    lost = max(found.clear - found.found, found.extra)
    enough = lost <= (1 - tolerance.found) * found.clear
    right = enough and not found.disordered and found.masks <= tolerance.masks
    return DetectionComparison(name=name, passed=right, **vars(found))


class _Found:
    """Counts and largest errors so far, in the words of `DetectionComparison`."""

    def __init__(self) -> None:
        self.clear = self.found = self.extra = self.disordered = 0
        self.boxes = self.scores = self.masks = 0.0

    def add(
        self,
        got: Mapping[str, Array],
        want: Mapping[str, Array],
        rules: Mapping[str, float],
        tolerance: DetectionTolerance,
    ) -> None:
        pairs = _pairs(got, want, tolerance)
        clear, other = (_clear(side["scores"], rules, tolerance.scores) for side in (want, got))
        self.clear += int(clear.sum())
        self.found += sum(bool(clear[ours]) for ours in pairs)
        self.extra += int(other.sum()) - sum(bool(other[theirs]) for theirs in pairs.values())
        # In the session's order, the oracle's scores fall, but for those that nearly tie.
        order = [ours for ours, _ in sorted(pairs.items(), key=lambda pair: pair[1])]
        self.disordered += int((np.diff(want["scores"][order]) > 2 * tolerance.scores).sum())
        for key in (BOXES, "scores", "masks"):
            if key in got and pairs:
                theirs, ours = got[key][list(pairs.values())], want[key][list(pairs)]
                worst = float(np.abs(theirs - ours).max())
                setattr(self, key, max(getattr(self, key), worst))


def _pairs(
    got: Mapping[str, Array], want: Mapping[str, Array], tolerance: DetectionTolerance
) -> dict[int, int]:
    """Index of the session's detection for each of the oracle's that it has, nearest box first."""
    free = np.ones(len(got["scores"]), bool)
    found = {}
    for i, label in enumerate(want["labels"]):
        box = np.abs(got[BOXES] - want[BOXES][i]).max(1, initial=0)
        score = np.abs(got["scores"] - want["scores"][i])
        fits = free & (got["labels"] == label)
        fits &= (box <= tolerance.boxes) & (score <= tolerance.scores)
        if fits.any():
            found[i] = int(np.where(fits, box, np.inf).argmin())
            free[found[i]] = False
    return found


def _clear(scores: Array, rules: Mapping[str, float], margin: float) -> Array:
    """(n,) whether a detection is there by more than rounding."""
    least = rules["score"]
    if len(scores) >= rules["most"]:
        least = max(least, float(scores.min()))
    clear: Array = scores - least > margin
    return clear
