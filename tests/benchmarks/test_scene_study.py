"""The composed scenes, a whole run of one step, and the page's tables from the kept results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmarks import digit_scenes, scene_study
from checkout import ROOT

from vssm.artifact.preprocessing import open_classes, open_rgb

PAGE = ROOT / "docs" / "segmentation_experiment.md"
RESULTS = ROOT / "benchmarks" / "results" / "scenes.csv"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    digit_scenes.main([str(folder), "--training", "4", "--validation", "3"])
    return folder


def test_scenes(scenes, tmp_path):
    again = tmp_path / "again"
    digit_scenes.main([str(again), "--training", "4", "--validation", "3"])
    files = sorted(file.relative_to(scenes) for file in scenes.rglob("*.png"))
    assert len(files) == 2 * (4 + 3)
    assert all((scenes / file).read_bytes() == (again / file).read_bytes() for file in files)
    for file in files:
        if file.parts[0] == "annotations":
            classes = open_classes(scenes / file)
            assert classes.shape == (64, 64)
            # All pixels have a class, and some digit is there.
            assert classes.min() == 1
            assert 2 <= classes.max() <= len(digit_scenes.LABELS)
            image = np.asarray(open_rgb(scenes / "images" / file.relative_to("annotations")))
            assert image.shape == (64, 64, 3)
    with pytest.raises(SystemExit):
        digit_scenes.main([str(again)])


def test_digits_by_token():
    classes = np.zeros((1, 64, 64), np.uint8)
    classes[0, 8:16, 56:64] = 3
    classes[0, 63, 0] = 1
    found = scene_study._digits_by_token(classes)
    assert found.shape == (1, 64)
    assert found.nonzero()[:, 1].tolist() == [15, 56]
    assert found[0, [15, 56]].tolist() == [64, 1]


FEW = ["--seeds=2", "--batch=2", "--steps=1", "--further=1", "--ratios", "0.5"]


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    """A whole run of one step for every training."""
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("run")
    scene_study.main([str(scenes), "-o", str(out), *FEW])
    torch.set_num_threads(threads)
    return out


def test_whole(scenes, run, monkeypatch):
    text = (run / "scenes.csv").read_text()
    rows = scene_study.read_rows(run / "scenes.csv")
    # Two seeds, zero-shot and fine-tuned: dense, three ways to restore, plain removal.
    assert len(rows) == 2 * 2 * 5
    assert scene_study.to_csv(rows) == text
    assert all(row.seen == 100 for row in rows if row.ratio == "1")
    assert all(row.seen < 100 for row in rows if row.ratio != "1")
    # Everything is there, so nothing is trained, and the same is written.
    monkeypatch.setattr(scene_study, "_train", None)
    scene_study.main([str(scenes), "-o", str(run), *FEW])
    assert (run / "scenes.csv").read_text() == text
    assert (run / "scenes.md").read_text() == "\n".join(scene_study.tables(rows))


@pytest.mark.slow
def test_pictures(scenes, run, tmp_path):
    scene_study.main([str(scenes), "-o", str(run), *FEW, "--pictures", str(tmp_path)])
    for name in ("scenes.png", "scenes_left.png"):
        assert (tmp_path / name).stat().st_size < 60_000


def test_tables_of_the_page():
    page = PAGE.read_text()
    for table in scene_study.tables(scene_study.read_rows(RESULTS)):
        assert table in page
