"""`vssm evaluate` of segmenters: numbers known by hand, results, stopped runs, and bad input."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from command import Run
from exports import exported, micro_segmenter
from PIL import Image

import vssm
from vssm.artifact.manifest import Preprocessing, TensorInfo
from vssm.errors import ArtifactError
from vssm.evaluation.scenes import UNLABELLED, check_class_count, open_scenes, read_classes
from vssm.evaluation.segmentation import (
    COLUMNS,
    Journal,
    Segmentation,
    Tally,
    image_areas,
)

SPEC = Preprocessing(8, (8, 8), interpolation="nearest", mean=(0.0,) * 3, std=(1.0,) * 3)


def _mmseg(predicted, classes, num_classes):
    """mmsegmentation's definition, in other words: sums of histograms, then means without NaN."""
    total = np.zeros((3, num_classes))
    for guesses, truths in zip(predicted, classes, strict=True):
        guess, truth = guesses[truths != 255], truths[truths != 255]
        kinds = (guess[guess == truth], guess, truth)
        total += [np.bincount(kind, minlength=num_classes) for kind in kinds]
    found, given, true = total
    with np.errstate(invalid="ignore"):
        iou, acc = found / (given + true - found), found / true
    return np.nanmean(iou), np.nanmean(acc), found.sum() / true.sum(), iou, acc


def test_numbers_known_by_hand():
    # Classes of two images side by side; 255 is unlabelled.
    truth = [np.array([[0, 0, 1, 1]], np.uint8), np.array([[1, 255, 255, 0]], np.uint8)]
    guess = [np.array([[0, 1, 1, 1]]), np.array([[2, 3, 0, 0]])]
    tally = Tally(5)
    for predicted, classes in zip(guess, truth, strict=True):
        tally.add(image_areas(predicted, classes, 5))
    # Class 0: 2 found of 2 predicted, 3 labelled. Class 1: 2 of 3 and 3. Class 2: predicted once,
    # labelled never. Class 3 is predicted where nothing is labelled, and class 4 nowhere.
    zero, one, two, three, four = tally.classes(list("abcde"))
    assert (zero.iou, zero.accuracy, zero.labelled, zero.predicted) == (2 / 3, 2 / 3, 3, 2)
    assert (one.iou, one.accuracy) == (2 / 4, 2 / 3)
    assert (two.name, two.iou, two.accuracy) == ("c", 0.0, None)
    assert (three.iou, four.iou) == (None, None)
    miou, macc, aacc = tally.means()
    assert miou == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert macc == pytest.approx(2 / 3)
    assert aacc == 4 / 6


def test_numbers_are_those_of_mmsegmentation():
    make = np.random.default_rng(0)
    truth = [make.integers(0, 9, size).astype(np.uint8) for size in ((5, 7), (8, 3), (2, 2))]
    for classes in truth:
        classes[classes == 8] = UNLABELLED  # so class 8 is in no annotation
        classes[classes == 6] = 5
    guess = [make.integers(0, 8, classes.shape) for classes in truth]
    tally = Tally(11)
    for predicted, classes in zip(guess, truth, strict=True):
        tally.add(image_areas(predicted, classes, 11))
    *means, iou, acc = _mmseg(guess, truth, 11)
    assert tally.means() == pytest.approx(means)
    found = tally.classes(None)
    assert [s.iou for s in found] == [None if np.isnan(x) else x for x in iou]
    assert [s.accuracy for s in found] == [None if np.isnan(x) else x for x in acc]


class _ByColour:
    """Class 2 where red is more than a half, else class 0; of three."""

    info = "by colour"
    manifest = SimpleNamespace(
        name="by_colour",
        inputs=[TensorInfo("images", "float32", ("batch", 3, 8, 8))],
        outputs=[TensorInfo("logits", "float32", ("batch", 3, 8, 8))],
        main_output=TensorInfo("logits", "float32", ("batch", 3, 8, 8)),
    )

    def __init__(self):
        self.runs = 0

    def run(self, images):
        self.runs += 1
        red = images[:, :1]
        return {"logits": np.concatenate([0.5 - red, np.full_like(red, -9), red - 0.5], axis=1)}


def _scene(root, name, numbers, *, split="validation"):
    """16 x 24 pixels, the left third red; the annotation as it is in the file."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :8, 0] = 255
    for kind, array in (("images", pixels), ("annotations", np.asarray(numbers, np.uint8))):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / kind / split / f"{name}.png")


def _numbers():
    """Rose on the left, then two columns of nothing, sky, and at the right four columns of sea."""
    numbers = np.ones((16, 24), np.uint8)
    numbers[:, :8] = 3
    numbers[:, 8:10] = 0
    numbers[:, 20:] = 2
    return numbers


@pytest.fixture
def scenes(tmp_path):
    root = tmp_path / "scenes"
    _scene(root, "a", _numbers())
    _scene(root, "b", np.full((16, 24), 3, np.uint8))
    _scene(root, "c", np.full((16, 24), 255, np.uint8))
    return root


def _run(root, tmp_path, session, *, stop=None):
    labels = ("sky", "sea", "rose")
    what = Segmentation(open_scenes(root, "validation"), SPEC, 3, labels, 0)
    told = []

    def tell(*step):
        told.append(step)
        if step[1] == stop:
            raise KeyboardInterrupt

    with Journal(tmp_path / "found.csv.journal", what.header) as journal:
        return what.run(session, journal, tmp_path / "found.csv", tell), told


def test_an_evaluation_known_by_hand(scenes, tmp_path):
    report, told = _run(scenes, tmp_path, _ByColour())
    # a: 128 rose found; 160 sky found, 64 sea called sky. b: 128 of 384 rose, 256 called sky.
    sky, sea, rose = report.classes
    assert (rose.labelled, rose.predicted) == (512, 256)
    assert (rose.iou, rose.accuracy) == (256 / 512, 256 / 512)
    assert (sky.iou, sky.accuracy) == (160 / (160 + 64 + 256), 1.0)
    assert (sea.iou, sea.accuracy) == (0.0, 0.0)
    assert report.miou == pytest.approx((0.5 + 1 / 3 + 0) / 3)
    assert report.macc == pytest.approx((0.5 + 1 + 0) / 3)
    assert report.aacc == (128 + 160 + 128) / (22 * 16 + 384)
    assert [score.name for score in report.classes] == ["sky", "sea", "rose"]
    assert report.images == 3
    assert [step[:3] for step in told] == [("evaluating images", n, 3) for n in range(4)]
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["image"] for row in rows] == [f"images/validation/{x}.png" for x in "abc"]
    assert rows[0]["areas"] == "0:160:224:160 1:0:0:64 2:128:128:128"
    assert rows[1]["accuracy"] == f"{1 / 3:.6f}"
    # Nothing is labelled there, so there is nothing to say.
    assert (rows[2]["pixels"], rows[2]["accuracy"], rows[2]["areas"]) == ("0", "", "")


@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_run_goes_on(scenes, tmp_path, stop):
    _run(scenes, tmp_path, _ByColour())
    whole = (tmp_path / "found.csv").read_bytes()
    (tmp_path / "found.csv.journal").unlink()
    with pytest.raises(KeyboardInterrupt):
        _run(scenes, tmp_path, _ByColour(), stop=stop)
    session = _ByColour()
    report, _ = _run(scenes, tmp_path, session)
    assert report.resumed == stop
    assert (tmp_path / "found.csv").read_bytes() == whole
    other = _ByColour()
    again, _ = _run(scenes, tmp_path, other)
    assert (other.runs, again.images_per_s) == (0, None)
    assert session.runs == (3 - stop) * 2  # two windows each
    assert again.miou == report.miou


def test_results_of_another_set_are_refused(scenes, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _run(scenes, tmp_path, _ByColour(), stop=1)
    _scene(scenes, "d", _numbers())
    with pytest.raises(ArtifactError, match="is of another evaluation: images="):
        _run(scenes, tmp_path, _ByColour())


def test_an_image_that_cannot_be_read_counts_nowhere(scenes, tmp_path):
    good, _ = _run(scenes, tmp_path, _ByColour())
    (tmp_path / "found.csv.journal").unlink()
    _scene(scenes, "bad", _numbers())
    (scenes / "images" / "validation" / "bad.png").write_text("no image")
    report, _ = _run(scenes, tmp_path, _ByColour())
    assert [path for path, _ in report.unreadable] == ["images/validation/bad.png"]
    assert (report.images, report.miou) == (4, good.miou)


@pytest.mark.parametrize("spoil", ["value", "negative", "size", "mode", "damaged"])
def test_an_annotation_that_does_not_fit(tmp_path, spoil):
    file = tmp_path / "a.png"
    numbers = np.ones((4, 6), np.uint8)
    message = {
        "value": r"a\.png has the value 4 in row 2, column 5, but the model has the classes 1 to 3",
        "negative": r"has the value -1 in row 0, column 0",
        "size": r"a\.png has 6x4 pixels, its image 6x5; give the annotation of this image",
        "mode": r"a\.png has pixels of mode RGB, not one number each",
        "damaged": r"annotation=.*a\.png cannot be read as an image",
    }[spoil]
    if spoil == "value":
        numbers[2, 5] = 4
    Image.fromarray(numbers).save(file)
    if spoil == "negative":
        file = tmp_path / "a.tiff"
        Image.fromarray(np.full((4, 6), -1, np.int32)).save(file)
    if spoil == "mode":
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(file)
    if spoil == "damaged":
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=message):
        read_classes(file, 3, (5 if spoil == "size" else 4, 6))


def test_numbers_in_the_file(tmp_path):
    numbers = np.array([[0, 1, 3, 255]], np.uint8)
    plain, colours = tmp_path / "plain.png", tmp_path / "palette.png"
    Image.fromarray(numbers).save(plain)
    painted = Image.new("P", (4, 1))
    painted.putdata(numbers.ravel().tolist())
    painted.putpalette([255 - i // 3 for i in range(768)])
    painted.save(colours)
    for file in (plain, colours):
        assert read_classes(file, 3, (1, 4)).tolist() == [[UNLABELLED, 0, 2, UNLABELLED]]


def test_folders_that_do_not_fit(scenes, tmp_path):
    with pytest.raises(ValueError, match=r"validation is not a folder, and .* holds no folders"):
        open_scenes(tmp_path, "validation")
    with pytest.raises(ValueError, match=r"training is not a folder, and .* holds validation;"):
        open_scenes(scenes, "training")
    (scenes / "annotations" / "validation" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"has no annotation for 1 of 3 images: b\.png; put the"):
        open_scenes(scenes, "validation")
    (scenes / "images" / "validation" / "b.png").unlink()
    Image.new("L", (4, 4)).save(scenes / "annotations" / "validation" / "z.png")
    assert open_scenes(scenes, "validation").notes == (
        "annotations without an image are not read: 1",
    )
    for file in (scenes / "images" / "validation").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="holds no images in"):
        open_scenes(scenes, "validation")
    with pytest.raises(ValueError, match="classes=255 are more than the 254"):
        check_class_count(255)


def test_nothing_labelled_is_refused(tmp_path):
    root = tmp_path / "scenes"
    _scene(root, "a", np.zeros((16, 24), np.uint8))
    with pytest.raises(ValueError, match="no pixel of any of them has a class"):
        _run(root, tmp_path, _ByColour())


# The export that test_segmenters.py makes too.
@pytest.fixture(scope="module")
def export(tmp_path_factory):
    model = micro_segmenter("vim_small", "1:0.8,3:0.7", {}, num_classes=7)
    return exported(tmp_path_factory.mktemp("segmenter"), model, outputs="labels", dtype="float32")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two images, at and above the model's size, with annotations of seven classes."""
    root, make = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for kind in ("images", "annotations"):
        (root / kind).mkdir()
    for name, size in (("a", (96, 96)), ("b", (50, 70))):
        pixels = make.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{name}.jpg")
        numbers = make.integers(0, 8, size, dtype=np.uint8)
        Image.fromarray(numbers).save(root / "annotations" / f"{name}.png")
    return root


def test_an_export_in_two_runtimes(export, pictures, tmp_path, cli: Run):
    given = ("evaluate", export.directory, pictures, "--split", ".", "--threads", 1)
    found = tmp_path / "found.csv"
    assert cli(*given, "--results", found, "--workers", 0) == 0, cli.out
    assert "mIoU" in cli.out
    written = json.loads(found.with_suffix(".json").read_text())
    assert len(written["classes"]) == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.csv", "found.json"]
    report = vssm.evaluate(
        export, pictures, "torch", split=".", workers=0, threads=1, results=tmp_path / "torch.csv"
    )
    assert report.info.runtime == "torch"
    assert report.miou == pytest.approx(written["miou"], abs=0.01)
    truth, guess = [], []
    with vssm.open_session(export, threads=1) as session:
        for image in sorted((pictures / "images").iterdir()):
            with Image.open(image) as opened:
                size = (opened.height, opened.width)
            annotation = pictures / "annotations" / f"{image.stem}.png"
            truth.append(read_classes(annotation, 7, size))
            spec = export.manifest.preprocessing
            with Image.open(image) as opened:
                sides = [max(96, int(96 * side / min(size))) for side in reversed(size)]
                pixels = np.asarray(opened.resize(sides, Image.Resampling.BILINEAR), np.float32)
            pixels = (pixels / 255 - np.float32(spec.mean)) / np.float32(spec.std)
            planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])
            guess.append(vssm.segment(session, planes, size=size)[0].argmax(0))
    *means, _, _ = _mmseg(guess, truth, 7)
    assert [written[key] for key in ("miou", "macc", "aacc")] == pytest.approx(means, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", 4), "batch=4: a segmenter does not take it"),
        (("--classes", "text"), "classes=text: a segmenter does not take it"),
        (("--split", "training"), "training is not a folder"),
    ],
)
def test_wrong_options_end_with_2(export, pictures, cli: Run, options, message):
    assert cli("evaluate", export.directory, pictures, *options) == 2
    assert message in cli.out


def test_an_annotation_out_of_range_ends_with_2(export, pictures, tmp_path, cli: Run):
    for kind, name in (("images", "a.jpg"), ("annotations", "a.png")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_bytes((pictures / kind / name).read_bytes())
    Image.fromarray(np.full((96, 96), 8, np.uint8)).save(tmp_path / "annotations" / "a.png")
    given = ("--split", ".", "--threads", 1, "--results", tmp_path / "found.csv")
    assert cli("evaluate", export.directory, tmp_path, *given) == 2
    assert "has the value 8 in row 0, column 0" in cli.out


def test_results_of_another_set_end_with_2(export, pictures, tmp_path, cli: Run):
    def stop(phase, done, images, note=""):
        if done:
            raise KeyboardInterrupt

    found = tmp_path / "found.csv"
    with pytest.raises(KeyboardInterrupt):
        vssm.evaluate(
            export, pictures, split=".", results=found, workers=0, threads=1, progress=stop
        )
    for kind, name in (("images", "b.jpg"), ("annotations", "b.png")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_bytes((pictures / kind / name).read_bytes())
    given = ("--split", ".", "--threads", 1, "--workers", 0, "--results", found)
    assert cli("evaluate", export.directory, tmp_path, *given) == 2
    assert "is of another evaluation: images=" in cli.out
    assert "begin anew with --restart" in cli.out
