"""`vssm compare`: paired differences by hand, and the ways to name what is compared."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import MODEL, Run
from exports import exported, micro
from finetune_cases import write_pictures
from safetensors.torch import save_file

import vssm
from vssm.evaluation.evaluate import COLUMNS
from vssm.files.table import table_bytes
from vssm.studies.compare import _noise
from vssm.studies.paired import holm, own_names, paired_interval, share_interval


def results(path: Path, hits: str, *, unread: int | None = None, other: str = "") -> Path:
    """Results of so many images, class 0, of which "1" are right."""
    rows = [
        (f"n0/{other}{i:03}.png", 0, 1 - int(hit), "0 1", hit, 1, "0.75", "0.25", "")
        for i, hit in enumerate(hits)
    ]
    if unread is not None:
        rows[unread] = (*rows[unread][:2], "", "", "", "", "", "", "no image")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(table_bytes(COLUMNS, rows))
    return path


def test_pairs_by_hand(tmp_path: Path) -> None:
    a = results(tmp_path / "a" / "evaluate.csv", "1111110000")
    b = results(tmp_path / "b" / "evaluate.csv", "1100000011", unread=9)
    c = results(tmp_path / "c" / "evaluate.csv", "1111110000")
    report = vssm.compare([a, b, c], tmp_path / "out")
    assert [one.name for one in report.contestants] == [f"{n}/evaluate.csv" for n in "abc"]
    assert [one.correct for one in report.contestants] == [6, 3, 6]  # of the nine that all read
    first, same, last = report.pairs
    assert (first.better, first.worse, first.difference) == (4, 1, 3 / 9)
    assert first.p == last.p == 2 * (1 + 5) / 2**5
    assert (same.better, same.worse, same.p, same.p_adjusted) == (0, 0, 1.0, 1.0)
    assert first.p_adjusted == 1.0
    # Bonett and Price: one image more on each side.
    up, down = 5 / 11, 2 / 11
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 11)
    assert first.interval == pytest.approx((3 / 11 - half, 3 / 11 + half), abs=1e-6)
    assert report.disagreements == tuple(f"n0/{i:03}.png" for i in (2, 3, 4, 5, 8))
    assert report.facts["images"] == "9; 1 that not all could read"
    lines = (tmp_path / "out" / "disagreements.csv").read_text().splitlines()
    assert lines[1].split(",")[:4] == ["n0/002.png", "0", "0", "0.75"]
    assert len(lines) == 6
    assert "None is shown: give --images" in (tmp_path / "out" / "index.html").read_text()


def test_intervals() -> None:
    assert share_interval(0, 10)[0] == pytest.approx(0)
    assert share_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson's, printed
    low, high = paired_interval(0, 0, 100)
    assert low == -high < 0
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert own_names(["/x/a/f", "/x/b/f"]) == ["a/f", "b/f"]
    assert own_names(["/a", "/a"]) == ["number 1", "number 2"]


def test_exports_checkpoints_and_results(cli: Run, tmp_path: Path) -> None:
    """All three ways in one comparison; equal weights agree image by image."""
    data = write_pictures(tmp_path / "data")
    (data / "n3" / "notes.txt").write_text("no image")
    pruned, dense = exported(tmp_path / "pruned", micro()), exported(tmp_path / "d", micro(None))
    weights = tmp_path / "w.safetensors"
    save_file({k: v.contiguous() for k, v in micro(None).state_dict().items()}, weights)
    found = vssm.evaluate(pruned, data, results=tmp_path / "was.csv", workers=0)
    out = tmp_path / "out"
    what = [pruned.directory, weights, tmp_path / "was.csv", dense.directory]
    given = ["--images", data, f"--model={MODEL[0]}", *MODEL[1:], "--batch=7", "--workers=0"]
    end = ["--threads=1", "--show=3", "--json", tmp_path / "all.json", "-o", out]
    assert cli("compare", *what, *given, *end) == 0, cli.out
    report = json.loads((tmp_path / "all.json").read_text())
    rows = {Path(one["path"]).stem: one for one in report["contestants"]}
    assert rows["was"]["top1"] == found.top1
    untimed = [one["name"] for one in report["contestants"] if one["ms_per_image"] is None]
    assert [Path(name).name for name in untimed] == ["was.csv"]
    pairs = report["pairs"]
    assert len(pairs) == 6
    same = [(pair["better"], pair["worse"]) for pair in (pairs[1], pairs[4])]
    assert same == [(0, 0), (0, 0)]  # the export and its results, the weights and their export
    page = (out / "index.html").read_text()
    shown = min(3, len(report["disagreements"]))
    assert page.count("data:image/png;base64,") == shown > 0
    assert page.count("<svg") == 1
    assert report["facts"]["images"].startswith("42; 1 that not all could read")
    assert "paired differences" in cli.out


def test_refusals(cli: Run, tmp_path: Path) -> None:
    a, b = (results(tmp_path / f"{n}.csv", "1100") for n in "ab")
    other = results(tmp_path / "c.csv", "1100", other="x")
    torn = tmp_path / "torn.csv"
    torn.write_text("image,class\nx,1\n")
    file = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    link = tmp_path / "link.csv"
    link.symlink_to(a)
    moved = tmp_path / "moved.csv"
    moved.write_text(a.read_text().replace("n0/002.png,0", "n0/002.png,2"))
    cases: dict[str, list[object]] = {
        "contestants=1 is not two or more": [a],
        "a.csv is named twice": [a, a],
        "link.csv is named twice": [link, a],
        "images=nowhere is not a folder": [a, b, "--images", "nowhere"],
        "comparing answers image by image is for classification": [
            *(a, b, "--model=vim_tiny_upernet_ade20k"),
        ],
        "no.csv is not there": [a, tmp_path / "no.csv"],
        "lacks n0/000.png": [a, other],
        "moved.csv: n0/002.png is class 2 there and 0": [a, moved],
        "is not a result of a classifier's evaluation": [a, torn],
        "has no results yet; give --images": [a, tmp_path],
        "is a checkpoint, which does not say of what": [a, file, "--images", tmp_path],
        "--schedule without --model": [a, b, "--schedule", "1:0.7"],
        "batch=0 is below 1": [a, b, "--batch=0"],
        "batch=99999 is above 4096": [a, b, "--batch=99999"],
        "did you mean 'vim_tiny'": [a, b, "--model=vim_tinny"],
    }
    for message, arguments in cases.items():
        assert cli("compare", *arguments, "-o", tmp_path / "out") == 2
        assert message in cli.out, cli.out
    assert cli("compare", a, b, "-o", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: text.rindex(",0,1,")], "row 3 below the header: class '0'"),
        (lambda text: text[: text.rindex(",1,1,")] + "\n", "row 4 below the header"),
        (lambda text: text + text.splitlines()[1] + "\n", "row 5 below the header: its image has"),
        (lambda text: text.replace("0 1,1,1,0.75", "0 1,yes,1,0.75", 1), "correct 'yes'"),
        (lambda text: text.replace("0.75", "0,75", 1), "row 1 below the header: it has more cells"),
        (lambda text: text.replace("0.75", "75 %", 1), "probability '75 %' is not in"),
        (lambda text: text.replace("n0/001.png,0", "n0/001.png,cat"), "row 2 below the header: it"),
        (lambda text: text.replace(",", ";"), "separated by commas"),
    ],
)
def test_results_that_were_cut_or_changed(tmp_path: Path, change: Any, message: str) -> None:
    a, b = (results(tmp_path / f"{n}.csv", "1101") for n in "ab")
    b.write_text(change(a.read_text()))
    with pytest.raises(ValueError, match=re.escape(message)):
        vssm.compare([a, b], tmp_path / "out")


def test_results_that_a_spreadsheet_saved(tmp_path: Path) -> None:
    a, b = (results(tmp_path / f"{n}.csv", "1101") for n in "ab")
    b.write_bytes(b"\xef\xbb\xbf" + a.read_bytes().replace(b"\n", b"\r\n"))
    assert vssm.compare([a, b], tmp_path / "out").pairs[0].difference == 0


def test_times_of_an_export_with_open_sizes(tmp_path: Path) -> None:
    """Its images have the size that they were cropped to."""
    artifact = exported(tmp_path, micro())
    images = replace(artifact.manifest.inputs[0], shape=("batch", 3, "height", "width"))
    opened = replace(artifact, manifest=replace(artifact.manifest, inputs=(images,)))
    assert _noise(np.random.default_rng(0), opened, 2).shape == (2, 3, 48, 48)
