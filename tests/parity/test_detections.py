"""Detections held against the oracle's: what counts as found, as missing, and as rounding."""

from __future__ import annotations

import numpy as np
import pytest

from vssm.parity.detections import (
    DETECTION_TOLERANCES,
    DetectionComparison,
    DetectionTolerance,
    compare_detections,
)

Detections = dict[str, np.ndarray]
RULES = {"score": 0.05, "most": 4}
TOLERANCE = DetectionTolerance(boxes=0.05, scores=1e-3, masks=1e-3, found=1.0)


def _detections(*rows: tuple[float, int, float]) -> Detections:
    """Of each (left edge, class, score)."""
    left, labels, scores = (np.array(part) for part in zip(*rows, strict=True))
    boxes = left[:, None] + np.array([0.0, 0, 10, 10])
    masks = np.zeros((len(rows), 28, 28))
    return {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}


WANT = _detections((5, 1, 0.9), (50, 2, 0.5), (50.2, 1, 0.3))


def _compared(
    *images: Detections, want: list[Detections] | None = None, **options: float
) -> DetectionComparison:
    got = {key: np.concatenate([image[key] for image in images]) for key in images[0]}
    got["detections"] = np.array([len(image["boxes"]) for image in images])
    tolerance = DetectionTolerance(**{**vars(TOLERANCE), **options})
    return compare_detections(
        "run", got, want or [WANT], RULES, tolerance, images=range(len(images))
    )


def _numbers(found: DetectionComparison) -> tuple[int, int, int, int]:
    return found.clear, found.found, found.extra, found.disordered


def test_the_same_detections_pass() -> None:
    found = _compared(WANT, WANT, want=[WANT, WANT])
    assert found.passed
    assert _numbers(found) == (6, 6, 0, 0)
    assert (found.boxes, found.scores, found.masks) == (0, 0, 0)


def test_errors_within_the_tolerance_are_told() -> None:
    moved = {**WANT, "boxes": WANT["boxes"] + 0.04, "scores": WANT["scores"] - 5e-4}
    found = _compared(moved)
    assert found.passed
    assert found.boxes == pytest.approx(0.04)
    assert found.scores == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("rows", "numbers"),
    [
        # One is missing; one is too much; another class; a box, and a score, too far off.
        ([(5, 1, 0.9), (50, 2, 0.5)], (3, 2, 0, 0)),
        ([(5, 1, 0.9), (50, 2, 0.5), (50.2, 1, 0.3), (80, 1, 0.2)], (3, 3, 0, 0)),
        ([(5, 1, 0.9), (50, 2, 0.5), (50.2, 3, 0.3)], (3, 2, 1, 0)),
        ([(5, 1, 0.9), (50.06, 2, 0.5), (50.2, 1, 0.3)], (3, 2, 1, 0)),
        ([(5, 1, 0.9), (50, 2, 0.502), (50.2, 1, 0.3)], (3, 2, 1, 0)),
        ([(5, 1, 0.9), (50.2, 1, 0.3), (50, 2, 0.5)], (3, 3, 0, 1)),
    ],
)
def test_others_do_not_pass(
    rows: list[tuple[float, int, float]], numbers: tuple[int, int, int, int]
) -> None:
    found = _compared(_detections(*rows))
    assert _numbers(found) == numbers
    # The last of as many as may be told is no clear one: four of four here.
    assert found.passed == (numbers == (3, 3, 0, 0))


def test_near_the_threshold_one_may_be_missing_or_more() -> None:
    near = _detections((5, 1, 0.9), (50, 2, 0.5), (50.2, 1, 0.3), (70, 1, 0.0505))
    assert _compared(near).passed
    assert _compared(WANT, want=[near]).passed


def test_scores_that_tie_have_no_order() -> None:
    tied = _detections((5, 1, 0.5004), (50, 2, 0.5))
    other = _detections((50, 2, 0.5004), (5, 1, 0.5))
    assert _compared(other, want=[tied]).passed


def test_masks_count_too() -> None:
    masks = WANT["masks"].copy()
    masks[1, 3, 4] = 0.002
    found = _compared({**WANT, "masks": masks})
    assert found.masks == 0.002
    assert not found.passed


def test_a_share_may_be_lost_in_half_precision() -> None:
    fewer = _detections((5, 1, 0.9), (50, 2, 0.5))
    assert _compared(fewer, found=0.6).passed
    assert not _compared(fewer, found=0.7).passed
    assert DETECTION_TOLERANCES["float32"].found == 1


def test_nothing_found() -> None:
    nothing = {key: value[:0] for key, value in WANT.items()}
    assert _compared(nothing, want=[nothing]).passed
    assert not _compared(nothing).passed
    assert not _compared(WANT, want=[nothing]).passed
