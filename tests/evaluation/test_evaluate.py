"""`vssm evaluate`: accuracies, results, unreadable images, and what a stopped run leaves."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from checkout import PYTHONPATH, ROOT
from command import Run
from crashes import running_in
from exports import exported, micro
from PIL import Image

import vssm
from vssm.artifact.manifest import TensorInfo
from vssm.errors import ArtifactError, VssmError
from vssm.evaluation import data as evaluate_data
from vssm.evaluation.data import load, load_in_order, open_images
from vssm.evaluation.evaluate import COLUMNS, _refuse_parts
from vssm.evaluation.journal import ImageResult, Journal

CLASSES = 7
PER_CLASS = 9


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("evaluate"), micro())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """63 images of odd sizes in 7 folders, one of them nested."""
    root = tmp_path_factory.mktemp("pictures")
    make = np.random.default_rng(0)
    for i in range(CLASSES * PER_CLASS):
        size = tuple(int(n) for n in make.integers(50, 90, 2))
        folder = root / f"n{i % CLASSES:03}" / ("more" if i == 10 else "")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = make.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return root


def _evaluate(export, pictures, tmp_path, **options):
    given = {"batch": 8, "workers": 0, "threads": 1, "results": tmp_path / "found.csv", **options}
    return vssm.evaluate(export, pictures, **given)


def _rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_accuracy_is_that_of_the_session(export, pictures, tmp_path):
    report = _evaluate(export, pictures, tmp_path)
    files = sorted(pictures.rglob("*.png"))
    with vssm.open_session(export) as session:
        logits = session.run(vssm.preprocess(list(files), export))["logits"]
    targets = np.array([int(file.relative_to(pictures).parts[0][1:]) for file in files])
    best = np.argsort(-logits, axis=1, kind="stable")
    assert report.top1 == np.mean(best[:, 0] == targets)
    assert report.top5 == np.mean((best[:, :5] == targets[:, None]).any(1))
    assert 0 < report.top1 < report.top5 < 1
    rows = _rows(tmp_path / "found.csv")
    assert tuple(rows[0]) == COLUMNS
    assert [r["image"] for r in rows] == [f.relative_to(pictures).as_posix() for f in files]
    assert [int(r["class"]) for r in rows] == targets.tolist()
    assert [int(r["predicted"]) for r in rows] == best[:, 0].tolist()
    assert [list(map(int, r["top5"].split())) for r in rows] == best[:, :5].tolist()
    assert np.mean([int(r["correct"]) for r in rows]) == report.top1
    assert np.mean([int(r["correct_top5"]) for r in rows]) == report.top5
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    found = [float(r["probability_of_class"]) for r in rows]
    assert found == pytest.approx(shares[np.arange(len(rows)), targets], abs=1e-5)
    assert report.images == len(files)
    assert report.images_per_s > 0
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["top1"] == report.top1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.csv", "found.json"]


@pytest.mark.parametrize(
    ("runtime", "backend"), [("ort-cpu", "body"), ("torch", "kernel"), ("torch", "reference")]
)
def test_every_runtime_finds_the_same(export, pictures, tmp_path, runtime, backend):
    kernel = _evaluate(export, pictures, tmp_path)
    other = _evaluate(
        export,
        pictures,
        tmp_path,
        runtime=runtime,
        backend=backend,
        results=tmp_path / "other.csv",
    )
    assert (other.top1, other.top5) == (kernel.top1, kernel.top5)
    assert other.info.runtime == runtime


def test_workers_change_nothing(export, pictures, tmp_path):
    _evaluate(export, pictures, tmp_path)
    report = _evaluate(export, pictures, tmp_path, workers=2, results=tmp_path / "two.csv")
    assert report.workers == 2
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "found.csv").read_bytes()


def _copy(pictures, target, *, every=1):
    for file in sorted(pictures.rglob("*.png"))[::every]:
        place = target / file.relative_to(pictures)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    return target


def test_unreadable_images_are_reported_and_counted(export, pictures, tmp_path, cli: Run):
    good = _evaluate(export, pictures, tmp_path, results=tmp_path / "good.csv", batch=1)
    spoiled = _copy(pictures, tmp_path / "spoiled")
    file = spoiled / "n002" / "002.png"
    file.write_bytes(file.read_bytes()[:200])
    (spoiled / "n003" / "notes.txt").write_text("no image")
    (spoiled / "n003" / ".hidden").write_text("not looked at")
    report = _evaluate(export, spoiled, tmp_path, batch=1)
    assert [path for path, _ in report.unreadable] == ["n002/002.png", "n003/notes.txt"]
    assert report.images == good.images + 1
    rows = {r["image"]: r for r in _rows(tmp_path / "found.csv")}
    for path, error in report.unreadable:
        assert rows[path]["predicted"] == ""
        assert rows[path]["error"] == error
        assert "cannot be read as an image" in error
    kept = [r for r in rows.values() if not r["error"]]
    assert kept == [r for r in _rows(tmp_path / "good.csv") if r["image"] != "n002/002.png"]
    assert report.top1 == np.mean([int(r["correct"]) for r in kept])
    arguments = ("--workers=0", "--batch=16", "--json", tmp_path / "report.json")
    assert cli("evaluate", export.directory, spoiled, *arguments) == 0, cli.out
    assert json.loads((tmp_path / "report.json").read_text())["images"] == report.images
    assert "images that cannot be read │ 2" in cli.out
    assert "not read: n003/notes.txt" in cli.out
    assert (export.directory / "evaluate.csv").exists()


class _StopError(Exception):
    pass


def _stop_after(batches):
    def progress(phase, done, total, note=""):
        assert (phase, total) == ("evaluating images", 63)
        assert (done == 0) or note.startswith("top-1 ")
        if done == 8 * batches:
            raise _StopError

    return progress


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("torn", [b"", b"[[[1, 2", b"[[[1,2,3,4,5],0.5,0.5,null]]"])
def test_a_stopped_evaluation_goes_on(export, pictures, tmp_path, torn, workers):
    whole = _evaluate(export, pictures, tmp_path, results=tmp_path / "whole.csv")
    with pytest.raises(_StopError):
        _evaluate(export, pictures, tmp_path, workers=workers, progress=_stop_after(3))
    journal = tmp_path / "found.csv.journal"
    assert not (tmp_path / "found.csv").exists()
    assert len(journal.read_bytes().splitlines()) == 4
    with journal.open("ab") as file:
        file.write(torn)
    report = _evaluate(export, pictures, tmp_path)
    assert report.resumed == 24
    assert (report.top1, report.top5) == (whole.top1, whole.top5)
    assert (tmp_path / "found.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not journal.exists()


def test_what_was_stopped_must_be_the_same_evaluation(export, pictures, tmp_path):
    with pytest.raises(_StopError):
        _evaluate(export, pictures, tmp_path, progress=_stop_after(2))
    with pytest.raises(ArtifactError, match=r"batch=8, now 4; run it to its end as it was"):
        _evaluate(export, pictures, tmp_path, batch=4)
    with pytest.raises(ArtifactError, match=r"another evaluation: backend=kernel, now body;"):
        _evaluate(export, pictures, tmp_path, backend="body")
    other = _copy(pictures, tmp_path / "other")
    Image.new("RGB", (60, 60)).save(other / "n001" / "one_more.png")
    with pytest.raises(ArtifactError, match=r"another evaluation: images=[0-9a-f]{64}, now"):
        _evaluate(export, other, tmp_path)
    report = _evaluate(export, pictures, tmp_path, batch=4, restart=True)
    assert report.resumed == 0


_LOOP = """
import sys
import vssm

if __name__ == "__main__":
    directory, pictures, results, workers = sys.argv[1:]
    vssm.evaluate(
        directory, pictures, batch=2, threads=1, workers=int(workers), results=results
    )
"""


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_kill_9_loses_nothing(export, pictures, tmp_path, workers):
    """Killed as soon as the journal has grown, again and again, until a run gets to its end."""
    _evaluate(export, pictures, tmp_path, batch=2, results=tmp_path / "whole.csv")
    home = tmp_path / "home"
    home.mkdir()
    script, results = home / "loop.py", home / "found.csv"
    journal = home / "found.csv.journal"
    script.write_text(_LOOP)
    command = [sys.executable, script, export.directory, pictures, results, str(workers)]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    kills = 0
    for stop in (1, 12, 25, 10_000):
        process = subprocess.Popen(command, cwd=home, env=environment)
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") > stop:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        kills += process.wait(60) == -signal.SIGKILL
    assert kills >= 2
    assert results.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not journal.exists()
    deadline = time.monotonic() + 20
    while (left := running_in(home)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == [], "workers outlived their parent"


_CRASHES = """
import sys
from pathlib import Path
import onnxruntime
from crashes import torn
from PIL import Image
import vssm
import vssm.evaluation.evaluate

Image.init()  # imports what every child would
directory, pictures, output = map(Path, sys.argv[1:])


def evaluate(folder):
    results = folder / "found.csv"
    vssm.evaluate(directory, pictures, batch=6, threads=1, workers=0, results=results)


torn(evaluate, output)
"""


def test_a_crash_at_every_change_of_a_file(export, pictures, tmp_path):
    script, few = tmp_path / "crash.py", _copy(pictures, tmp_path / "few", every=3)
    script.write_text(_CRASHES)
    done = subprocess.run(
        [sys.executable, script, export.directory, few, tmp_path / "runs"],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = sorted((tmp_path / "runs").iterdir())
    assert len(runs) > 12
    whole = (tmp_path / "runs" / "whole" / "found.csv").read_bytes()
    for run in runs:
        assert (run / "found.csv").read_bytes() == whole, run
        assert json.loads((run / "found.json").read_text())["images"] == CLASSES * PER_CLASS // 3
        assert sorted(file.name for file in run.iterdir()) == ["found.csv", "found.json"]


def test_a_killed_worker_is_an_error(export, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_data, "_begin_worker", _fall)
    with pytest.raises(VssmError, match=r"workers=1: one was killed.*which goes on where this"):
        _evaluate(export, pictures, tmp_path, workers=1)


def _fall():
    os.kill(os.getpid(), signal.SIGKILL)


def test_journal_refuses_a_second_writer_and_damage(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, {"batch": "2"}) as journal:
        journal.append([ImageResult((1, 0), 0.5, 0.25), ImageResult(error="torn")])
        with pytest.raises(ArtifactError, match=r"is in use by another evaluation"):
            Journal(path, {"batch": "2"})
    with Journal(path, {"batch": "2"}) as journal:
        assert journal.done == [[ImageResult((1, 0), 0.5, 0.25), ImageResult(error="torn")]]
    path.write_bytes(path.read_bytes().replace(b"[[[1", b"[[[x"))
    with pytest.raises(ArtifactError, match=r"is damaged .*; begin anew with --restart"):
        Journal(path, {"batch": "2"})
    path.write_text("[1]\n")
    with pytest.raises(ArtifactError, match=r"is damaged \(its first line is not an object\)"):
        Journal(path, {"batch": "2"})
    with Journal(path, {"batch": "2"}, restart=True) as journal:
        assert journal.done == []
    with pytest.raises(ArtifactError, match=r"cannot be written \(No such file"):
        Journal(tmp_path / "nowhere" / "journal", {})


def test_pictures_of_folders(pictures, tmp_path):
    found = open_images(pictures, CLASSES)
    assert len(found.pictures) == CLASSES * PER_CLASS
    assert {p.path.split("/")[0]: p.target for p in found.pictures} == {
        f"n{i:03}": i for i in range(CLASSES)
    }
    assert found.notes == ("folders inside class folders count for the class: n003/more",)
    with pytest.raises(ValueError, match=r"is not a folder; give one that holds"):
        open_images(tmp_path / "absent", CLASSES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no files in its folders"):
        open_images(tmp_path, 1)
    other = _copy(pictures, tmp_path / "other")
    (other / "n000" / "000.png").write_bytes(b"another size")
    assert open_images(other, CLASSES).fingerprint() != found.fingerprint()


def test_folders_named_as_labels_are_matched_by_name(pictures, tmp_path):
    """In the order of their names every image would count for another class."""
    labels = [f"n{i:03}" for i in (3, 0, 6, 1, 5, 2, 4)]
    named = exported(tmp_path, micro(), labels=labels)
    report = _evaluate(named, pictures, tmp_path)
    rows = _rows(tmp_path / "found.csv")
    assert {labels[int(r["class"])] for r in rows if r["image"].startswith("n006/")} == {"n006"}
    right = [labels[int(r["predicted"])] == r["image"].split("/")[0] for r in rows]
    assert report.top1 == np.mean(right)
    assert report.classes == "matched to the model's labels by name"
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["classes"] == report.classes
    assert written["notes"] == ["folders inside class folders count for the class: n003/more"]


def test_numbered_folders_are_asked_about(export, pictures, tmp_path, capsys, monkeypatch):
    command = Run(capsys, monkeypatch)
    numbered = tmp_path / "numbered"
    for i in range(CLASSES):
        (numbered / str(i + 5)).mkdir(parents=True)
        source = next((pictures / f"n{i:03}").glob("*.png"))
        (numbered / str(i + 5) / "a.png").write_bytes(source.read_bytes())
    given = ("evaluate", export.directory, numbered, "--workers=0", "--threads=1", "--restart")
    given = (*given, "--results", tmp_path / "found.csv")
    assert command(*given) == 2
    assert "(10, 11, 5, 6, 7, ...) than as numbers (5, 6, 7, 8, 9, ...)" in command.out
    assert not (tmp_path / "found.csv.journal").exists()
    targets = {}
    for word in ("numeric", "text"):
        assert command(*given, "--classes", word) == 0
        assert f"classes: --classes {word}: the folders in order of" in command.out
        targets[word] = [r["class"] for r in _rows(tmp_path / "found.csv")]
    assert targets["numeric"] == ["5", "6", "0", "1", "2", "3", "4"]  # of 10, 11, 5, 6, ...
    assert targets["text"] == [str(i) for i in range(CLASSES)]


def test_odd_names_and_links(export, pictures, tmp_path):
    odd = _copy(pictures, tmp_path / "odd")
    source = odd / "n001" / "001.png"
    names = ['a,b "c".png', "line\nfeed.png", "carriage\rreturn.png", "\u56fe \u00fc.png"]
    for name in names:
        (odd / "n002" / name).write_bytes(source.read_bytes())
    (odd / "n002" / "dangling.png").symlink_to("nowhere")
    os.mkfifo(odd / "n002" / "pipe.png")
    (odd / "n003" / "linked").symlink_to(pictures / "n003")
    report = _evaluate(export, odd, tmp_path)
    rows = {r["image"]: r for r in _rows(tmp_path / "found.csv")}
    assert {f"n002/{name}" for name in names} < set(rows)
    assert len(rows) == report.images == (CLASSES + 1) * PER_CLASS + len(names) + 2
    assert [path for path, _ in report.unreadable] == ["n002/dangling.png", "n002/pipe.png"]
    assert "a named pipe, not a regular file" in report.unreadable[1][1]
    with (tmp_path / "found.csv").open(encoding="utf-8") as file:  # as most programs read it
        assert sum(1 for _ in csv.reader(file)) == len(rows) + 1
    (odd / "n003" / "loop").symlink_to(odd)
    with pytest.raises(ValueError, match=r"n003/loop, a link to .*, a folder that it is in; remo"):
        _evaluate(export, odd, tmp_path)
    (odd / "n003" / "loop").unlink()
    (odd / "n003" / "there").symlink_to(odd / "n005")
    (odd / "n005" / "back").symlink_to(odd / "n003")
    with pytest.raises(ValueError, match=r"n003/there/back, a link to .*/n003, a folder that it"):
        _evaluate(export, odd, tmp_path)
    (odd / "n003" / "there").unlink()
    (odd / "n005" / "back").unlink()
    Path(os.fsdecode(os.fsencode(odd) + b"/n004/\xff.png")).touch()
    with pytest.raises(ValueError, match=r"'n004/\\udcff.png', whose name is no UTF-8 .*; rename"):
        _evaluate(export, odd, tmp_path)


def test_a_journal_that_was_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    lock = fcntl.flock

    def removed(file, operation):
        path.unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed)
    with pytest.raises(ArtifactError, match=r"is in use by another evaluation"):
        Journal(path, {})


_LOST = (("model.csv", "model.json"), ("bench.csv", "bench.json"), ("model.onnx", "model.onnx"))


def test_bad_arguments(export, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"batch=0 is below 1"):
        _evaluate(export, pictures, tmp_path, batch=0)
    with pytest.raises(ValueError, match=r"workers=-1 is below 0"):
        _evaluate(export, pictures, tmp_path, workers=-1)
    for name in ("found.json", "found"):
        with pytest.raises(ValueError, match=r"is to be a CSV file.*; give a name that ends in"):
            _evaluate(export, pictures, tmp_path, results=tmp_path / name)
    for name, lost in _LOST:
        with pytest.raises(ValueError, match=rf"would overwrite {lost}, a file of the export"):
            _evaluate(export, pictures, tmp_path, results=export.directory / name)
    broken = tmp_path / "broken"
    for i in range(CLASSES):
        (broken / f"n{i}").mkdir(parents=True)
        (broken / f"n{i}" / "a.png").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"none of the 7 images can be read; the first: image="):
        _evaluate(export, broken, tmp_path)


def test_loading_keeps_the_order(export, pictures):
    spec = export.manifest.preprocessing
    files = [str(pictures / p.path) for p in open_images(pictures, CLASSES).pictures]
    batches = [files[i : i + 4] for i in range(0, len(files), 4)]
    alone = list(load_in_order(batches, spec, workers=0))
    spread = list(load_in_order(batches, spec, workers=2))
    assert len(alone) == len(spread) == len(batches)
    assert all(np.array_equal(a.images, b.images) for a, b in zip(alone, spread, strict=True))
    assert load(["absent.png"], spec).images.shape == (0, 3, 48, 48)


def test_the_digits_model(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import digits

    root = tmp_path / "digits"
    for file, label in digits.write_test_images(tmp_path / "flat", 120):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        file.rename(root / str(label) / file.name)
    schedule = vssm.PruneSchedule.parse(digits.SCHEDULE)
    model = vssm.create_model(digits.MODEL_NAME, schedule=schedule, **digits.MODEL)
    vssm.load_checkpoint(model, digits.CHECKPOINT)
    export = vssm.export(model, tmp_path / "out")
    report = vssm.evaluate(export, root, workers=1)
    assert report.images == 120
    assert report.top1 > 0.9
    assert report.top5 > 0.99


@pytest.mark.parametrize(
    ("name", "output", "remedy"),
    [
        ("vim_tiny_upernet_ade20k", "neck0", "for segmentation finds, .* --outputs logits"),
        ("vmamba_tiny_maskrcnn_coco", "fpn0", "for detection finds, .* --outputs boxes"),
    ],
)
def test_a_part_of_a_model_has_nothing_to_judge(name, output, remedy):
    manifest = SimpleNamespace(name=name, main_output=TensorInfo(output, "float32", ("batch", 8)))
    with pytest.raises(ValueError, match=f"gives {output}, a part of what a model {remedy}"):
        _refuse_parts(manifest)
