"""Scoring on a Ray cluster: the same rows as here, whatever is killed meanwhile."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkout import PYTHONPATH
from command import Run
from exports import exported, micro
from PIL import Image
from ray_nodes import Nodes

import vssm
from vssm import extras
from vssm.errors import MissingPackageError
from vssm.evaluation.scorers import check_ray
from vssm.evaluation.scoring import RayOptions

FILES, IMAGES, BLOCK = 20, 300, 2
ACTOR_S = 1.0  # An actor lives longer than this.
on_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra `scale` is not installed"
)


@pytest.mark.parametrize(
    ("options", "workers", "message"),
    [
        (RayOptions(actors=0), None, "actors=0 is below 1"),
        (RayOptions(gpus=-1), None, r"gpus=-1 is neither in \[0, 1\] nor a whole number"),
        (RayOptions(gpus=1.5), None, r"gpus=1\.5 is neither"),
        (RayOptions(), 2, "workers=2 with ray=auto: each actor loads its own images"),
    ],
)
def test_options_that_do_not_fit(monkeypatch, options, workers, message):
    monkeypatch.setattr(extras, "is_installed", lambda _: True)
    with pytest.raises(ValueError, match=message):
        check_ray(options, workers)
    for good in (None, RayOptions(actors=2, gpus=0.25), RayOptions(gpus=2)):
        check_ray(good, None)


def test_a_cluster_without_ray(monkeypatch, tmp_path, cli: Run):
    monkeypatch.setattr(extras, "is_installed", lambda _: False)
    with pytest.raises(MissingPackageError, match=r'pip install "vssm\[scale\]"'):
        check_ray(RayOptions(), None)
    assert cli("predict", tmp_path, tmp_path, "-o", tmp_path / "o.parquet", "--ray-actors=2") == 2
    assert "say which with --ray" in cli.out


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An export, a list of images of which some are none, and what one process makes of it."""
    root = tmp_path_factory.mktemp("cluster")
    export = exported(root, micro())
    make = np.random.default_rng(0)
    for i in range(FILES):
        pixels = make.integers(0, 256, (52, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02}.png")
    (root / "07.png").write_text("no image")
    (root / "list.txt").write_text("".join(f"{i % FILES:02}.png\n" for i in range(IMAGES)))
    vssm.predict(export, root / "list.txt", root / "here.parquet", block=BLOCK, threads=1)
    return root


@pytest.fixture(scope="module")
def nodes():
    cluster = Nodes()
    yield cluster
    cluster.end()


def _start(home, nodes, *more, command="predict"):
    """A run on the cluster, in a process of its own."""
    line = [sys.executable, "-m", "vssm.commands.main", command, "out", f"--ray={nodes.address}"]
    # Not through the environment of this process: its warnings are errors.
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*line, *map(str, more)], cwd=home, env=environment, **pipes)


def _predict(home, nodes, name, *more):
    return _start(home, nodes, "list.txt", "-o", name, f"--block={BLOCK}", *more)


def _finished(home, run, name):
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert (home / name).read_bytes() == (home / "here.parquet").read_bytes()
    assert not (home / f"{name}.blocks").exists()


def _wait_for_blocks(home, run, name, count):
    deadline = time.monotonic() + 240
    while len(list((home / f"{name}.blocks").glob("[0-9]*.parquet"))) < count:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _an_actor(run):
    """A process that holds a session, as soon as there is one."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert run.poll() is None
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and b"ray::MapWorker" in (entry / "cmdline").read_bytes():
                    return int(entry.name)
            except OSError:
                continue
        time.sleep(0.01)
    raise AssertionError("no actor was started")


@on_ray
@pytest.mark.slow
def test_rows_are_those_of_one_process(home, nodes):
    run = _predict(home, nodes, "ray.parquet", "--json=ray.json")
    _finished(home, run, "ray.parquet")
    report = json.loads((home / "ray.json").read_text())
    assert (report["actors"], report["images"], report["resumed"]) == (2, IMAGES, 0)
    assert len(report["unreadable"]) == IMAGES // FILES


@on_ray
@pytest.mark.slow
def test_a_killed_driver_goes_on(home, nodes):
    run = _predict(home, nodes, "stopped.parquet")
    _wait_for_blocks(home, run, "stopped.parquet", 10)
    run.kill()
    run.communicate()
    run = _predict(home, nodes, "stopped.parquet", "--json=stopped.json")
    _finished(home, run, "stopped.parquet")
    assert json.loads((home / "stopped.json").read_text())["resumed"] >= 10 * BLOCK


@on_ray
@pytest.mark.slow
def test_accuracies_are_those_of_one_process(home, nodes, tmp_path):
    for i in range(14):
        (tmp_path / "images" / f"n{i % 7}").mkdir(parents=True, exist_ok=True)
        copy = tmp_path / "images" / f"n{i % 7}" / f"{i:02}.png"
        copy.write_bytes((home / f"{i:02}.png").read_bytes())
    images, options = tmp_path / "images", {"batch": 1, "threads": 1}
    here = vssm.evaluate(home / "out", images, results=tmp_path / "here.csv", **options)
    run = _start(
        home, nodes, images, "--batch=1", f"--results={tmp_path / 'ray.csv'}", command="evaluate"
    )
    errors = run.communicate(timeout=300)[1]
    assert run.returncode == 0, errors
    assert (tmp_path / "ray.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()
    report = json.loads((tmp_path / "ray.json").read_text())
    assert (report["top1"], report["top5"], report["actors"]) == (here.top1, here.top5, 2)
    assert len(report["unreadable"]) == 1


@on_ray
@pytest.mark.slow
def test_what_a_cluster_cannot_do_is_said(home, nodes):
    run = _predict(home, nodes, "gpu.parquet", "--ray-gpus=1")
    assert "no node has 1 CPUs and 1.0 GPUs" in run.communicate(timeout=120)[1]
    assert run.returncode == 2
    run = _predict(home, nodes, "other.parquet", "--runtime=ort-cuda")
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 2
    assert said.splitlines()[-1].startswith("error: runtime"), said


@on_ray
@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
def test_a_killed_actor_or_node_loses_nothing(home, nodes, moment):
    """An actor after a random time, and a node at a random number of finished blocks, in turn."""
    make = np.random.default_rng(moment)
    run = _predict(home, nodes, f"{moment}.parquet")
    if moment % 2 == 0:
        # By time: an actor of so small a model is ahead of the blocks on disk.
        process = _an_actor(run)
        time.sleep(make.uniform(0, ACTOR_S))
        os.kill(process, signal.SIGKILL)
        _finished(home, run, f"{moment}.parquet")
    else:
        _wait_for_blocks(home, run, f"{moment}.parquet", make.integers(0, IMAGES // BLOCK))
        nodes.tell("kill")
        _finished(home, run, f"{moment}.parquet")
        nodes.tell("add")
