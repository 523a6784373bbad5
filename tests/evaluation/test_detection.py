"""`vssm evaluate` of detectors: numbers known by hand and pycocotools' own, masks, bad input."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from command import Run
from exports import exported
from official_dense import micro_detector
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import decode

import vssm
from vssm.artifact.data_sets import COCO as COCO_NAMES
from vssm.artifact.manifest import Preprocessing, TensorInfo
from vssm.errors import ArtifactError
from vssm.evaluation.coco import match_categories, open_coco
from vssm.evaluation.detect import ImageDetections, coco_results
from vssm.evaluation.detection import COLUMNS, Detection, Journal

SPEC = Preprocessing(64, (48, 64), interpolation="bilinear", fit="pad")
# Category numbers with gaps, not in order, as COCO's.
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]

ONE = pytest.approx(1)  # pycocotools adds the least float to what it divides by


def _annotation(number, image, category, box, **more):
    x, y, w, h = box
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        **more,
    }


def _write(root, annotations, *, images=None, categories=None):
    """Two images of 48 x 32 pixels, which fill the model's 64 x 48 but for some rows."""
    (root / "val2017").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    records = images or [
        {"id": number, "file_name": f"{number:03}.png", "height": 32, "width": 48}
        for number in (12, 5)
    ]
    for record in records:
        Image.new("RGB", (48, 32), "grey").save(root / "val2017" / record["file_name"])
    document = {
        "images": records,
        "categories": categories or CATEGORIES,
        "annotations": annotations,
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    return root


class _Told:
    """Says of image after image what it was made with, in pixels of the model's input."""

    info = "told"

    def __init__(self, *found):
        self.found, self.sizes = list(found), []

    def run(self, images, *, sizes):
        assert images.shape == (1, 3, 48, 64)
        self.sizes.append(sizes.tolist())
        rows = self.found.pop(0)
        boxes = np.array([box for box, _, _ in rows], np.float32).reshape(-1, 4)
        return {
            "boxes": boxes,
            "scores": np.array([score for _, score, _ in rows], np.float32),
            "labels": np.array([label for _, _, label in rows], np.int64),
            "masks": np.ones((len(rows), 28, 28), np.float32),
        }


def _measure(root, session, tmp_path, *, stop=None, masks=True):
    what = Detection(open_coco(root, "val2017", 2, labels=None), SPEC, masks, 0)

    def tell(phase, done, total, note=""):
        if done == stop:
            raise KeyboardInterrupt

    with Journal(tmp_path / "found.csv.journal", what.header) as journal:
        return what.run(session, journal, tmp_path / "found.csv", tell)


# In the file's pixels; in the model's everything is 4 / 3 as large.
CAT, DOG = [6, 6, 12, 12], [24, 12, 18, 15]


def _inside(box, score, label):
    x, y, w, h = (part * 4 / 3 for part in box)
    return [x, y, x + w, y + h], score, label


@pytest.fixture
def coco(tmp_path):
    return _write(tmp_path / "coco", [_annotation(1, 5, 3, CAT), _annotation(2, 12, 7, DOG)])


def test_perfect_detections_have_ap_1(coco, tmp_path):
    # By the order of the numbers: class 0 is cat (3), class 1 dog (7); image 5 comes first.
    session = _Told([_inside(CAT, 0.9, 0)], [_inside(DOG, 0.8, 1)])
    report = _measure(coco, session, tmp_path)
    assert session.sizes == [[[43, 64]], [[43, 64]]]
    # The input has whole pixels: 32 rows became 43 and not 42.67, which moves a box a little.
    assert report.box.ap50 == report.box.ap75 == ONE
    assert [score.name for score in report.classes] == ["cat", "dog"]
    assert [score.objects for score in report.classes] == [1, 1]
    assert report.rule == "by the order of the categories' numbers"
    assert report.box.ap_small == report.box.ap
    assert (report.box.ap_medium, report.box.ap_large) == (None, None)
    assert report.mask.ap50 == ONE
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["image"] for row in rows] == ["val2017/005.png", "val2017/012.png"]
    assert [row["found"] for row in rows] == ["1", "1"]
    found = json.loads((tmp_path / "found.coco.json").read_text())
    assert [row["category_id"] for row in found] == [3, 7]
    assert found[0]["bbox"] == pytest.approx(CAT, abs=0.2)


def test_an_overlap_known_by_hand(tmp_path):
    # A square image keeps its shape, so that boxes come back exactly: 48 rows of 48.
    record = {"id": 5, "file_name": "a.png", "height": 48, "width": 48}
    root = _write(tmp_path / "coco", [_annotation(1, 5, 3, [0, 0, 20, 20])], images=[record])
    Image.new("RGB", (48, 48)).save(root / "val2017" / "a.png")
    # 20 x 13 of 20 x 20: an overlap of 0.65, which passes 0.5, 0.55, 0.6 and 0.65, of ten bars.
    session = _Told([([0, 0, 20, 13.2], 0.9, 0)])
    report = _measure(root, session, tmp_path)
    assert report.box.ap == pytest.approx(0.4)
    assert (report.box.ap50, report.box.ap75) == (ONE, 0)
    # A dog is in no image, so it has no precision and is in no mean.
    assert [score.box_ap for score in report.classes] == [pytest.approx(0.4), None]


def test_a_false_find_of_a_higher_score_halves_the_precision(coco, tmp_path):
    wrong = _inside([30, 1, 5, 5], 0.95, 0)
    session = _Told([wrong, _inside(CAT, 0.9, 0)], [])
    report = _measure(coco, session, tmp_path)
    assert report.box.ap50 == pytest.approx((0.5 + 0) / 2)
    assert report.box.ar1 == 0


def test_nothing_found_is_0(coco, tmp_path):
    report = _measure(coco, _Told([], []), tmp_path)
    assert (report.box.ap, report.mask.ap, report.box.ar100) == (0, 0, 0)


def _own_numbers(root, rows, kind):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(root / "annotations" / "instances_val2017.json"))
        judge = COCOeval(truth, truth.loadRes(rows), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return [None if number < 0 else number for number in judge.stats]


def test_numbers_are_those_of_pycocotools(tmp_path):
    """Many objects and finds, crowds among them; masks that are not their boxes."""
    make = np.random.default_rng(0)
    annotations, found = [], []
    for image in (5, 12):
        rows = []
        for _ in range(12):
            x, y = make.uniform(0, 30), make.uniform(0, 15)
            w, h = make.uniform(6, 16, 2)
            category = int(make.choice([3, 7]))
            annotations.append(_annotation(len(annotations) + 1, image, category, [x, y, w, h]))
            moved = np.array([x, y, w, h]) + make.normal(0, 1, 4)
            rows.append(_inside(moved, float(make.uniform()), int(category == 7)))
        found.append(rows)
    crowd = {"size": [32, 48], "counts": [0, 32 * 48]}
    annotations[0] |= {"iscrowd": 1, "segmentation": crowd}
    root = _write(tmp_path / "coco", annotations)
    report = _measure(root, _Told(*found), tmp_path)
    rows = json.loads((tmp_path / "found.coco.json").read_text())
    assert len(rows) == 24
    assert list(vars(report.box).values()) == _own_numbers(root, rows, "bbox")
    masks = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
    assert list(vars(report.mask).values()) == _own_numbers(root, masks, "segm")
    assert 0.1 < report.box.ap < 0.9
    assert report.box.ap == pytest.approx(np.mean([c.box_ap for c in report.classes]))


def test_a_stopped_run_goes_on(coco, tmp_path):
    found = ([_inside(CAT, 0.9, 0)], [_inside(DOG, 0.8, 1)])
    names = ("found.csv", "found.coco.json")
    whole = _measure(coco, _Told(*found), tmp_path)
    kept = [(tmp_path / name).read_bytes() for name in names]
    (tmp_path / "found.csv.journal").unlink()
    with pytest.raises(KeyboardInterrupt):
        _measure(coco, _Told(*found), tmp_path, stop=1)
    report = _measure(coco, _Told(found[1]), tmp_path)
    assert report.resumed == 1
    assert [(tmp_path / name).read_bytes() for name in names] == kept
    assert report.box == whole.box
    _write(coco, [_annotation(1, 5, 3, CAT)])
    with pytest.raises(ArtifactError, match="is of another evaluation: images="):
        _measure(coco, _Told(*found), tmp_path)


def test_an_image_that_cannot_be_read_counts_nowhere(coco, tmp_path):
    (coco / "val2017" / "012.png").write_text("no image")
    report = _measure(coco, _Told([_inside(CAT, 0.9, 0)]), tmp_path)
    assert [path for path, _ in report.unreadable] == ["val2017/012.png"]
    # The dog in it is not missed.
    assert report.box.ap50 == ONE


def test_annotations_without_masks(tmp_path):
    annotation = _annotation(1, 5, 3, CAT)
    del annotation["segmentation"]
    root = _write(tmp_path / "coco", [annotation])
    report = _measure(root, _Told([_inside(CAT, 0.9, 0)], []), tmp_path)
    assert (report.mask, report.box.ap50) == (None, ONE)
    assert "no masks" in report.notes[0]


def test_a_mask_is_pasted_as_the_public_code_does():
    import torch

    make = np.random.default_rng(0)
    mask = make.uniform(size=(28, 28)).astype(np.float32)
    for box in ([3.3, 2.1, 30.7, 17.9], [0, 0, 48, 32], [40.2, 25, 48, 32], [10, 5, 11.2, 6]):
        x0, y0, x1, y1 = box
        x = (torch.arange(48, dtype=torch.float64) + 0.5 - x0) / (x1 - x0) * 2 - 1
        y = (torch.arange(32, dtype=torch.float64) + 0.5 - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack([x.expand(32, 48), y[:, None].expand(32, 48)], dim=-1)[None]
        whole = torch.from_numpy(mask)[None, None].double()
        want = torch.nn.functional.grid_sample(whole, grid, align_corners=False)[0, 0] >= 0.5
        found = ImageDetections((32, 48), np.array([box]), np.ones(1), np.zeros(1, int), mask[None])
        (row,) = coco_results(found, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pycocotools' own, of NumPy 2
            assert (decode(row["segmentation"]) == want.numpy()).all()


def test_categories_and_classes():
    categories = [(i + 1, name) for i, name in enumerate(reversed(COCO_NAMES))]
    found, rule = match_categories(categories, 80, COCO_NAMES)
    assert found[0] == (80, "person")
    assert rule == "80 categories, matched by name"
    some, _ = match_categories([(9, "cat")], 80, COCO_NAMES)
    assert some == {15: (9, "cat")}
    with pytest.raises(ValueError, match="categories: 'kat' of 1 are not among the model's 80"):
        match_categories([(9, "kat")], 80, COCO_NAMES)
    with pytest.raises(ValueError, match="categories: 1 for the model's 7 classes, which have no"):
        match_categories([(9, "cat")], 7, None)


def test_a_class_without_a_category_is_in_no_result(tmp_path):
    root = _write(tmp_path / "coco", [_annotation(1, 5, 3, CAT)], categories=CATEGORIES[1:])
    folder = open_coco(root, "val2017", 2, labels=("dog", "cat"))
    what = Detection(folder, SPEC, False, 0)
    session = _Told([_inside(CAT, 0.9, 1), _inside(DOG, 0.99, 0)], [])
    with Journal(tmp_path / "journal", what.header) as journal:
        report = what.run(session, journal, tmp_path / "found.csv", lambda *_: None)
    assert (report.box.ap50, len(report.classes)) == (ONE, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category_id": 99}, r"an object \(id 2\) of category 99, which is not one of its 2"),
        ({"image_id": 6}, r"an object \(id 2\) in image 6, which is not one of its 2"),
        ({"bbox": [1, 2, -3, 4]}, r"an object \(id 2\) with the box \[1, 2, -3, 4\], which is not"),
        ({"bbox": [1, 2, 3]}, r"with the box \[1, 2, 3\], which is not x, y and a width"),
        ({"bbox": [1, float("nan"), 3, 4]}, r"with the box \[1, nan, 3, 4\]"),
    ],
)
def test_an_annotation_out_of_range(tmp_path, changes, message):
    annotations = [_annotation(1, 5, 3, CAT), _annotation(2, 12, 7, DOG) | changes]
    root = _write(tmp_path / "coco", annotations)
    with pytest.raises(ValueError, match=message):
        open_coco(root, "val2017", 2, labels=None)


@pytest.mark.parametrize("spoil", ["split", "file", "json", "annotation", "image", "size"])
def test_folders_that_do_not_fit(coco, tmp_path, spoil):
    file = coco / "annotations" / "instances_val2017.json"
    message = {
        "split": "there is no .*train2017; give the folder that holds SPLIT",
        "file": "there is no .*instances_val2017.json",
        "json": r"instances_val2017.json is not a file of COCO's instances \(JSONDecodeError",
        "annotation": r"not a file of COCO's instances \(KeyError: 'bbox'\)",
        "image": r"1 of the 2 images of instances_val2017.json are not there: val2017/012\.png",
        "size": r"012\.png has 9x9 pixels, but its annotation says 48x32",
    }[spoil]
    if spoil == "file":
        file.unlink()
    if spoil == "json":
        file.write_text("{")
    if spoil == "annotation":
        document = json.loads(file.read_text())
        del document["annotations"][0]["bbox"]
        file.write_text(json.dumps(document))
    if spoil == "image":
        (coco / "val2017" / "012.png").unlink()
    if spoil == "size":
        Image.new("RGB", (9, 9)).save(coco / "val2017" / "012.png")
        with pytest.raises(ValueError, match=message):
            _measure(coco, _Told([], []), tmp_path)
        return
    split = "train2017" if spoil == "split" else "val2017"
    with pytest.raises(ValueError, match=message):
        open_coco(coco, split, 2, labels=None)


def test_of_an_export(coco, monkeypatch):
    monkeypatch.setattr("vssm.evaluation.detection.preprocessing_of", lambda manifest: SPEC)
    manifest = SimpleNamespace(
        config={"num_classes": 2},
        labels=None,
        outputs=[TensorInfo("boxes", "float32", ("detections", 4))],
    )
    what = Detection.of(manifest, coco, "val2017", 0)
    assert (what.spec.crop, what.masks) == ((48, 64), False)


# The export that tests/onnx/test_detectors.py makes too.
@pytest.fixture(scope="module")
def export(tmp_path_factory):
    told = {"level_proposals": 120, "proposals": 60, "most": 20, "score": 0.2}
    model = micro_detector("vim", "rope_96_padded", **told)
    model.name = "vim_tiny_cascade_mask_rcnn_coco"
    return exported(tmp_path_factory.mktemp("detector"), model, outputs="boxes")


def test_an_export_in_two_runtimes(export, tmp_path, cli: Run):
    classes = export.manifest.config["num_classes"]
    categories = [{"id": i + 1, "name": f"class {i}"} for i in range(classes)]
    root, make = tmp_path / "coco", np.random.default_rng(0)
    # What the PyTorch model finds is the truth, so everything else must find it.
    _write(root, [_annotation(1, 5, 1, CAT)], categories=categories)
    for file in (root / "val2017").iterdir():
        pixels = make.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    given = {"workers": 0, "threads": 1}
    first = vssm.evaluate(export, root, "torch", results=tmp_path / "torch.csv", **given)
    rows = json.loads((tmp_path / "torch.coco.json").read_text())
    assert len(rows) > 0
    annotations = [
        _annotation(i + 1, row["image_id"], row["category_id"], row["bbox"])
        | {"segmentation": row["segmentation"]}
        for i, row in enumerate(rows)
    ]
    assert first.box.ap < 0.5
    _write(tmp_path / "again", annotations, categories=categories)
    for file in (root / "val2017").iterdir():
        (tmp_path / "again" / "val2017" / file.name).write_bytes(file.read_bytes())
    arguments = ("--results", tmp_path / "ort.csv", "--workers", 0, "--threads", 1)
    assert cli("evaluate", export.directory, tmp_path / "again", *arguments) == 0, cli.out
    assert "COCO's numbers" in cli.out
    written = json.loads((tmp_path / "ort.json").read_text())
    assert written["box"]["ap"] == written["box"]["ap75"] == ONE
    # This model's masks are empty where nothing was trained.
    assert written["mask"]["ap50"] is not None
    assert cli("evaluate", export.directory, root, "--batch", 4) == 2
    assert "batch=4: a detector does not take it" in cli.out
    assert cli("evaluate", export.directory, root, "--split", "train2017") == 2
    assert "is not laid out as COCO: there is no" in cli.out


def _stop(phase, done, images, note=""):
    if done:
        raise KeyboardInterrupt


def test_bad_input_ends_with_2(export, tmp_path, cli: Run):
    """An object of no category, and what a stopped run has left of other annotations."""
    classes = export.manifest.config["num_classes"]
    categories = [{"id": i + 1, "name": f"class {i}"} for i in range(classes)]
    root = _write(tmp_path / "coco", [_annotation(1, 5, 99, CAT)], categories=categories)
    found = tmp_path / "found.csv"
    given = ("evaluate", export.directory, root, "--results", found, "--threads", 1)
    assert cli(*given) == 2
    assert "an object (id 1) of category 99, which is not one of its 7" in cli.out
    _write(root, [_annotation(1, 5, 1, CAT)], categories=categories)
    with pytest.raises(KeyboardInterrupt):
        vssm.evaluate(export, root, results=found, workers=0, threads=1, progress=_stop)
    _write(root, [_annotation(1, 5, 2, CAT)], categories=categories)
    assert cli(*given, "--workers", 0) == 2
    assert "is of another evaluation: images=" in cli.out
    assert "begin anew with --restart" in cli.out
