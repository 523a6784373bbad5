"""Detections in images of any size: pixels of the image, masks, COCO's results, drawings."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vssm.artifact.data_sets import COCO
from vssm.artifact.manifest import Preprocessing
from vssm.evaluation.detect import (
    ImageDetections,
    coco_results,
    detect,
    drawn,
    packed,
    run_lengths,
    write_detections,
)
from vssm.runtimes.session import Session
from vssm.types import Array

SPEC = Preprocessing(
    12, (8, 12), interpolation="nearest", mean=(0.0,) * 3, std=(1.0,) * 3, fit="pad"
)


class _RedBox(Session):
    """One object, from the first to the last column of what is not padding; class 2, score 0.9."""

    def __init__(self, **changes: Any) -> None:
        self.manifest: Any = SimpleNamespace(
            name="red_box", gives_boxes=True, preprocessing=SPEC, **changes
        )
        self.sizes: list[list[int]] = []

    def run(self, images: Array, *, sizes: Array | None = None) -> dict[str, Array]:
        assert images.shape == (1, 3, 8, 12)
        assert sizes is not None
        height, width = sizes[0]
        assert not images[0, :, height:].any()
        assert not images[0, :, :, width:].any()
        self.sizes.append(sizes[0].tolist())
        return {
            "boxes": np.array([[0, 0, width, height], [0, 0, 1, 1]], np.float32),
            "scores": np.array([0.9, 0.2], np.float32),
            "labels": np.array([2, 0]),
            "masks": np.ones((2, 28, 28), np.float32),
        }

    def _run(self, feeds: Any) -> dict[str, Array]:
        raise NotImplementedError

    def close(self) -> None: ...


@pytest.fixture(autouse=True)
def _spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vssm.evaluation.detect.preprocessing_of", lambda manifest: SPEC)


def _picture(path: Path, width: int = 30, height: int = 20) -> Path:
    Image.new("RGB", (width, height), (200, 100, 0)).save(path)
    return path


def _one(box: list[float], size: tuple[int, int], mask: Array | None = None) -> ImageDetections:
    masks = None if mask is None else mask[None]
    return ImageDetections(size, np.array([box]), np.array([0.5]), np.array([1]), masks)


def test_boxes_are_in_pixels_of_the_image(tmp_path: Path) -> None:
    session = _RedBox()
    for width, height, size in ((30, 20, [8, 12]), (20, 30, [8, 5]), (60, 5, [1, 12])):
        found = detect(session, _picture(tmp_path / "x.png", width, height))
        assert session.sizes[-1] == size
        assert found.size == (height, width)
        np.testing.assert_allclose(found.boxes[0], [0, 0, width, height], rtol=1e-12)
        # All of it: the file's mask is 1 everywhere.
        top, left, inside = found.region(0)
        assert (top, left, inside.shape) == (0, 0, (height, width))
        assert inside.all()


def test_a_mask_is_read_as_by_bilinear_sampling() -> None:
    """The left half is inside; the pixel at the middle is where the probability falls to a half."""
    mask = np.zeros((28, 28))
    mask[:, :14] = 1
    top, left, inside = _one([2, 1, 12, 5], (8, 20), mask).region(0)
    assert (top, left, inside.shape) == (1, 2, (4, 10))
    assert inside.all(0).tolist() == inside.any(0).tolist() == [True] * 5 + [False] * 5
    # What lies outside the image is left out, and fractions of pixels count by their middles.
    top, left, inside = _one([-4.6, -3, 5.4, 5], (8, 20), np.ones((28, 28))).region(0)
    assert (top, left, inside.shape) == (0, 0, (5, 6))
    assert inside.all(0).tolist() == [True] * 5 + [False]
    assert _one([3, 3, 3, 5], (8, 20), mask).region(0)[2].size == 0
    with pytest.raises(ValueError, match="this detector gives boxes alone"):
        _one([3, 3, 4, 5], (8, 20)).region(0)


def _runs_by_hand(whole: Array) -> list[int]:
    counts, last = [0], False
    for pixel in whole.ravel(order="F").tolist():
        if pixel != last:
            counts.append(0)
            last = pixel
        counts[-1] += 1
    return counts


@pytest.mark.parametrize("seed", range(6))
def test_run_lengths_of_a_region_are_those_of_the_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 9, 2).tolist()
    rows, columns = rng.integers(1, [height + 1, width + 1]).tolist()
    top, left = rng.integers(0, [height - rows + 1, width - columns + 1]).tolist()
    inside = rng.random((rows, columns)) < rng.choice([0.0, 0.5, 0.9, 1.0])
    whole = np.zeros((height, width), bool)
    whole[top : top + rows, left : left + columns] = inside
    counts = run_lengths(top, left, inside, (height, width))
    assert counts == _runs_by_hand(whole)
    assert sum(counts) == height * width


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        # What pycocotools 2.0 gives for the same pixels.
        ([12], "<"),
        ([0, 12], "0<"),
        ([5, 2, 100, 1, 3], "52T3OoL"),
        ([100000, 3, 40000, 90000, 7], "PeQ33PRW1]lg2WnhN"),
    ],
)
def test_text_of_run_lengths(counts: list[int], text: str) -> None:
    assert packed(counts) == text


def test_results_in_cocos_format() -> None:
    found = _one([2.0, 1.0, 12.0, 5.0], (8, 20), np.ones((28, 28)))
    (row,) = coco_results(found, 139)
    assert row["bbox"] == [2.0, 1.0, 10.0, 4.0]
    assert (row["image_id"], row["category_id"], row["score"]) == (139, 2, 0.5)
    assert row["segmentation"]["size"] == [8, 20]
    assert (
        coco_results(
            ImageDetections((8, 20), found.boxes, found.scores, np.array([79])), 1, names=COCO
        )[0]["category_id"]
        == 90
    )
    assert "segmentation" not in coco_results(_one([2, 1, 12, 5], (8, 20)), 1)[0]


def test_files_of_images(tmp_path: Path) -> None:
    files = [_picture(tmp_path / "000139.png"), tmp_path / "bad.png", _picture(tmp_path / "b.png")]
    files[1].write_text("no image")
    names = ["sky", "sea", "rose"]
    seen: list[tuple[str, int, int]] = []
    rows = write_detections(
        _RedBox(), files, tmp_path / "out", names=names, progress=lambda *step: seen.append(step)
    )
    assert seen[-1][1:] == (3, 3)
    assert [row["error"] is None for row in rows] == [True, False, True]
    # 0.2 is below what is told.
    (told,) = rows[0]["detections"]
    assert (told["label"], told["class"], told["score"]) == ("rose", 2, pytest.approx(0.9))
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [row["image_id"] for row in results] == [139, 139, "b.png", "b.png"]
    assert [row["category_id"] for row in results[:2]] == [3, 1]
    with Image.open(rows[0]["picture"]) as picture:
        assert picture.size == (30, 20)
        # Half of the image, half of the class's colour, which is also the box's.
        assert picture.getpixel((15, 19)) == (128, 128, 0)
        assert picture.getpixel((15, 17)) == (164, 114, 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000139.detections.png",
        "b.detections.png",
        "detections.json",
    ]
    rows = write_detections(_RedBox(), files[:1], tmp_path / "out", least=0.1, top=1)
    assert [d["label"] for d in rows[0]["detections"]] == ["2"]


def test_a_drawing_without_masks() -> None:
    image = Image.new("RGB", (40, 30))
    picture = drawn(image, _one([4, 10, 30, 28], (30, 40)), None, np.array([0]))
    assert picture.getpixel((4, 27)) == (0, 128, 0)
    assert picture.getpixel((20, 25)) == (0, 0, 0)
    assert image.getpixel((4, 27)) == (0, 0, 0)


def test_refusals(tmp_path: Path) -> None:
    file = _picture(tmp_path / "x.png")
    session, out = _RedBox(), tmp_path / "out"
    with pytest.raises(ValueError, match="top=0 is below 1"):
        write_detections(session, [file], out, top=0)
    with pytest.raises(ValueError, match=r"score=1.5 is outside \[0, 1\]"):
        write_detections(session, [file], out, least=1.5)
    with pytest.raises(ValueError, match="two are called x but for folder and ending"):
        write_detections(session, [file, tmp_path / "x.jpg"], out)
    assert not out.exists()
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        write_detections(session, [tmp_path / "bad.png"], out)
    session.manifest.gives_boxes = False
    with pytest.raises(ValueError, match="does not give boxes; export a detector with --outputs"):
        detect(session, file)
