"""`vssm finetune`: what it learns, that a stopped run ends alike, and what it refuses."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import finetune_cases
import numpy as np
import pytest
import torch
from checkout import PYTHONPATH
from command import MODEL, Run
from crashes import running_in
from exports import SCHEDULE
from finetune_cases import CLASSES, OPTIONS, PLAIN, model_source, request, write_pictures
from safetensors.torch import load_file, save_file

import vssm
from vssm import ModelSource
from vssm.errors import ArtifactError, RuntimeUnavailableError, UnsupportedError, VssmError
from vssm.evaluation.data import load, open_images
from vssm.extras import is_installed
from vssm.training.augment import Example, load_batch
from vssm.training.loop import Group
from vssm.training.recipe import Recipe
from vssm.training.run import build_models, plan_run
from vssm.training.state import State
from vssm.training.stop import StopBetweenSteps

RESULTS = ("finetuned.safetensors", "finetuned_ema.safetensors", "log.csv", "state.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from exports import micro

    path = tmp_path_factory.mktemp("weights") / "micro.safetensors"
    save_file(dict(micro(None).state_dict()), path)
    return path


@pytest.fixture(scope="module")
def whole(data, checkpoint, tmp_path_factory):
    """A run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole")
    vssm.finetune(request(data, output, what=model_source(checkpoint)))
    return output


def _same(one: Path, other: Path, *names: str) -> None:
    for name in names or RESULTS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_training_learns(tmp_path):
    data = write_pictures(tmp_path / "data", told_apart=True)
    numbers = {**PLAIN, "epochs": 12, "lr": 1e-2, "warm_up_epochs": 0, "smoothing": 0}
    report = vssm.finetune(request(data, tmp_path / "out", **numbers))
    with (tmp_path / "out" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows]
    assert len(losses) == report.trained.steps == 12 * 7
    assert np.mean(losses[:7]) > 1.7
    assert report.trained.loss == pytest.approx(np.mean(losses[-7:]))
    assert report.trained.loss < 0.5 * np.mean(losses[:7])


def _model(checkpoint, alignment="gap"):
    schedule = vssm.PruneSchedule.parse(SCHEDULE, alignment=alignment)
    model = vssm.create_model(
        "vim_tiny", schedule=schedule, num_classes=CLASSES, **finetune_cases.OPTIONS
    )
    vssm.load_checkpoint(model, checkpoint)
    return model


def _first_loss(model, data, asked):
    """Of a model on the first batch of a run that mixes nothing."""
    pictures = open_images(data, CLASSES).pictures
    chosen = asked.recipe.order(0, len(pictures))[0]
    examples = [Example(str(data / pictures[i].path), 0, p) for p, i in enumerate(chosen)]
    images = torch.from_numpy(load_batch(examples, recipe=asked.recipe, size=(48, 48)))
    targets = torch.tensor([pictures[i].target for i in chosen])
    return torch.nn.functional.cross_entropy(
        model(images), targets, label_smoothing=asked.recipe.smoothing
    )


def test_a_step_is_adamw_on_the_mean_gradient(data, checkpoint, tmp_path):
    """Against torch alone: the model's own loss, AdamW, the average."""
    numbers = {**PLAIN, "epochs": 1, "warm_up_epochs": 0, "batch": 42, "weight_decay": 0.3}
    asked = request(data, tmp_path / "out", what=model_source(checkpoint), **numbers)
    vssm.finetune(asked)
    model = _model(checkpoint)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _first_loss(model, data, asked).backward()
    found = load_file(tmp_path / "out" / "finetuned.safetensors")
    average = load_file(tmp_path / "out" / "finetuned_ema.safetensors")
    assert set(found) == set(before)
    for key, parameter in model.named_parameters():
        decay = 0.3 if parameter.dim() >= 2 and key.endswith(".weight") else 0.0
        g = parameter.grad
        # AdamW's first step: both moments, once their bias is taken out, are the gradient's own.
        expected = before[key] * (1 - 1e-3 * decay) - 1e-3 * g / (g.abs() + 1e-8)
        clear = g.abs() > 1e-5 * g.abs().max()  # elsewhere rounding decides the quotient
        torch.testing.assert_close(found[key][clear], expected[clear], rtol=1e-4, atol=2e-6)
        mean = 0.9 * before[key] + 0.1 * found[key]
        torch.testing.assert_close(average[key], mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["vim_tiny", "plain_mamba_l1", "vmamba_tiny_s1l8"])
def test_every_matrix_decays_and_nothing_else(name):
    model = vssm.create_model(name)
    state = State.begin(model, Recipe(weight_decay=0.3))
    decayed, kept = state.optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    keys = {id(p): key for key, p in model.named_parameters()}
    assert len(decayed["params"]) + len(kept["params"]) == len(keys)
    assert all(p.dim() > 1 and keys[id(p)].endswith("weight") for p in decayed["params"])
    # VMamba's bias is a stack of vectors.
    others = "A_log|A_b_log|A_logs|Bs|pos_embed|cls_token|dt_projs_bias"
    for parameter in kept["params"]:
        assert parameter.dim() < 2 or re.search(rf"(^|[._])({others})$", keys[id(parameter)])


def test_equal_runs_are_equal_to_the_bit(data, checkpoint, tmp_path, whole):
    vssm.finetune(request(data, tmp_path, what=model_source(checkpoint), resources={"workers": 1}))
    _same(tmp_path, whole)
    other = tmp_path / "other"
    vssm.finetune(request(data, other, what=model_source(checkpoint), seed=1))
    assert (other / "log.csv").read_bytes() != (whole / "log.csv").read_bytes()


class _StopError(Exception):
    pass


def _stop_after(steps):
    def progress(phase, done, total, note=""):
        if phase == "training, steps":
            assert total == 14
            assert done == 0 or note.startswith("loss ")
            if done == steps:
                raise _StopError

    return progress


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (5, 1), (6, 4), (7, 100), (3, 100)])
def test_a_stopped_run_goes_on(data, checkpoint, tmp_path, whole, steps, every):
    """At a state, behind one, at an epoch's end, and before the first state."""
    asked = request(data, tmp_path, what=model_source(checkpoint), resources={"save_every": every})
    with pytest.raises(_StopError):
        vssm.finetune(asked, progress=_stop_after(steps))
    with (tmp_path / "log.csv").open("ab") as file:
        file.write(b"9,1,1e-0")
    (tmp_path / ".state.safetensors.vssm-0123456789ab").write_bytes(b"half")
    report = vssm.finetune(replace(asked, resume=True))
    assert report.trained.resumed == {(1, 1): 1, (5, 1): 5, (6, 4): 4, (7, 100): 7}.get(
        (steps, every), 0
    )
    _same(tmp_path, whole)
    names = {p.name for p in tmp_path.iterdir()} - {"tensorboard"}
    assert names == {*RESULTS, "finetune.json"}


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a terminal: where a shell script starts the tests in the background, Python
    ignores it, as the script's other children do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_at_the_end_of_the_step(data, checkpoint, tmp_path, whole, ctrl_c):
    asked = request(data, tmp_path, what=model_source(checkpoint), resources={"save_every": 100})

    def interrupt(phase, done, total, note=""):
        if done == 3:
            ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        vssm.finetune(asked, progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    report = vssm.finetune(replace(asked, resume=True))
    assert report.trained.resumed == 4  # the one that had begun is done
    _same(tmp_path, whole)


def test_ctrl_c_between_steps(ctrl_c):
    """A second one does not wait; what waits at the end is not lost; an ignored one stays so."""
    with StopBetweenSteps() as stop:
        ctrl_c()
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            stop.let_go()
        assert not stop.asked
    with pytest.raises(KeyboardInterrupt), StopBetweenSteps():
        ctrl_c()

    def fail():
        ctrl_c()
        raise _StopError

    with pytest.raises(_StopError), StopBetweenSteps():  # an error is not hidden
        fail()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopBetweenSteps() as stop:
        ctrl_c()
        assert not stop.asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.fixture(scope="module")
def validated(data, checkpoint, tmp_path_factory):
    """A run that is watched on images that it could learn from."""
    root = tmp_path_factory.mktemp("validated")
    val = write_pictures(root / "val", told_apart=True)
    asked = replace(request(data, root / "out", what=model_source(checkpoint)), val=val)
    return asked, vssm.finetune(asked)


def test_validation_measures_the_weights_and_changes_none(validated, checkpoint, whole):
    asked, report = validated
    _same(asked.output, whole, *RESULTS[:3])
    rows = report.trained.validated
    assert [(row.epoch, row.step) for row in rows] == [(0, 0), (1, 7), (2, 14)]
    assert (asked.output / "validation.csv").read_text().splitlines() == [
        "epoch,step,top1,loss",
        *(f"{row.epoch},{row.step},{row.top1!r},{row.loss!r}" for row in rows),
    ]
    for weights, row in ((checkpoint, rows[0]), (report.weights, rows[2])):
        model = _model(Path(weights)).eval()
        pictures = open_images(asked.val, CLASSES).pictures
        loaded = load([str(asked.val / p.path) for p in pictures], model.preprocessing())
        targets = torch.tensor([picture.target for picture in pictures])
        with torch.no_grad():
            logits = model(torch.from_numpy(loaded.images))
        assert row.top1 == (logits.argmax(1) == targets).double().mean().item()
        loss = torch.nn.functional.cross_entropy(logits, targets).item()
        assert row.loss == pytest.approx(loss, rel=1e-5)
    written = json.loads((asked.output / "finetune.json").read_text())
    assert written["best_epoch"] == max(rows, key=lambda row: row.top1).epoch
    assert written["trained"]["validated"][1]["top1"] == rows[1].top1
    best = Path(written["best"])
    assert best.name == "finetuned_best.safetensors"
    assert _model(best).labels == tuple(f"n{i}" for i in range(CLASSES))


@pytest.mark.parametrize(("epoch", "resumed"), [(0, 0), (1, 7)])
def test_a_stop_while_validating_measures_that_epoch_again(validated, tmp_path, epoch, resumed):
    whole, report = validated
    asked, count = replace(whole, output=tmp_path), 0

    def stop(phase, done, total, note=""):
        nonlocal count
        count += phase == "validating, images" and done == total
        if count > epoch:
            raise _StopError

    with pytest.raises(_StopError):
        vssm.finetune(asked, progress=stop)
    again = vssm.finetune(replace(asked, resume=True))
    assert again.trained.resumed == resumed
    assert again.trained.validated == report.trained.validated
    _same(tmp_path, whole.output, *RESULTS, "validation.csv", "finetuned_best.safetensors")
    with pytest.raises(ArtifactError, match=r"is of another run: val=\w{64}, now None"):
        vssm.finetune(replace(asked, resume=True, val=None))
    (tmp_path / "finetuned_best.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"or finetuned_best.safetensors is missing; put back"):
        vssm.finetune(replace(asked, resume=True))


def test_validation_images_that_do_not_belong(data, validated, tmp_path):
    val = tmp_path / "val"
    shutil.copytree(validated[0].val, val)
    asked = replace(request(data, tmp_path / "out"), val=val)
    (val / "n3" / "bad.png").write_bytes(b"no image")
    # Before the first step, not after an epoch.
    with pytest.raises(ValueError, match=r"val: .*bad\.png cannot be read as an image"):
        vssm.finetune(asked, progress=_stop_after(0))
    for i in range(CLASSES):
        (val / f"n{i}").rename(val / f"other{i}")
    with pytest.raises(ValueError, match="folder of class 0 is 'other0', but 'n0' in data="):
        vssm.finetune(asked)
    recipe = vssm.SceneRecipe.published("vim_tiny_upernet_ade20k")
    scenes = ModelSource("vim_tiny_upernet_ade20k")
    with pytest.raises(ValueError, match="top-1 is a classifier's; leave it out"):
        vssm.FinetuneRequest(scenes, data, tmp_path, recipe, val=val)


def test_a_finished_run_goes_on_to_the_same(data, checkpoint, tmp_path, whole):
    asked = request(data, tmp_path, what=model_source(checkpoint))
    vssm.finetune(asked)
    report = vssm.finetune(replace(asked, resume=True))
    assert (report.trained.resumed, report.trained.images_per_s) == (14, None)
    _same(tmp_path, whole)


_SCRIPT = """
import json
import sys
import torch
from finetune_cases import request, model_source
from pathlib import Path
import vssm
from vssm.training.run import has_run

if __name__ == "__main__":
    torch.set_num_threads(1)
    data, checkpoint, output, workers, numbers = sys.argv[1:]
    asked = request(
        Path(data),
        Path(output),
        what=model_source(Path(checkpoint)),
        resources={"workers": int(workers), "save_every": 1},
        resume=has_run(Path(output)),
        **json.loads(numbers),
    )
    # A line for every step; the first report, before them, has no note.
    vssm.finetune(asked, progress=lambda *step: step[3:] and print(*step, flush=True))
"""


def _start(tmp_path, data, checkpoint, output, *, workers=0, processes=1, numbers=None):
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT)
    arguments = [data, checkpoint, output, workers, json.dumps(numbers or {})]
    launch = [sys.executable]
    if processes > 1:
        port = 20000 + os.getpid() % 10000
        launch += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launch += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    return subprocess.Popen(
        [*launch, str(script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )


def _kill(process, folder):
    os.kill(process.pid, signal.SIGKILL)
    while left := running_in(folder):
        for number in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.01)
        process.poll()
    process.communicate()


def _kill_at_random(start, draw, folder, *, kills, within):
    """Start again and again, killing each at a moment drawn within so many seconds of a step."""
    for _ in range(kills):
        process = start()
        process.stdout.readline()  # its first step is done
        time.sleep(draw.uniform(0, within))
        _kill(process, folder)
    process = start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err


@pytest.mark.slow
def test_kill_and_resume(data, checkpoint, tmp_path, whole):
    draw = random.Random(1)
    for trial in range(8):
        output = tmp_path / str(trial)

        def start(output=output, workers=trial % 3):
            return _start(tmp_path, data, checkpoint, output, workers=workers)

        _kill_at_random(start, draw, tmp_path, kills=4, within=0.3)
        assert json.loads((output / "finetune.json").read_text())["trained"]["resumed"] >= 4
        _same(output, whole)


# What children of one process do, which are forked: a process that imports torch takes seconds.
_FORKS = """
import contextlib
import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch
from crashes import child, code_of, torn
from finetune_cases import request, model_source
from PIL import Image
import vssm
import vssm.training.run
from vssm.training.run import has_run

torch.set_num_threads(1)
# Imports what every child would.
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
Image.init()
with contextlib.suppress(ImportError):
    import torch.utils.tensorboard
data, checkpoint, output = map(Path, sys.argv[1:4])
"""

_CRASHES = """
def train(folder):
    numbers = {"epochs": 1, "batch": 14}
    what = model_source(checkpoint)
    asked = request(data, folder, what=what, resources={"save_every": 2}, **numbers)
    vssm.finetune(replace(asked, resume=has_run(folder)))


torn(train, output / "runs", int(sys.argv[4]))
"""


# Two processes are killed behind their second step; then two go on, with the variables that
# torchrun sets.
_TWO = """
def train_two(rank, port, kills):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}

    def progress(phase, done, total, note=""):
        if kills and (done, total) == (2, 6):
            os.kill(os.getpid(), signal.SIGKILL)

    what, numbers, each = model_source(checkpoint), json.loads(sys.argv[5]), {"save_every": 1}
    two = output / "two"
    asked = request(data, two, what=what, resources=each, resume=has_run(two), **numbers)
    vssm.finetune(asked, progress=progress)


for kills, port in enumerate(sys.argv[6:]):
    numbers = [child(partial(train_two, rank, port, kills == 0)) for rank in range(2)]
    codes = [code_of(number) for number in numbers]
    assert codes == ([-signal.SIGKILL] * 2, [0, 0])[kills], codes
"""


def _run_forks(folder, work, data, checkpoint, *given):
    (folder / "forks.py").write_text(_FORKS + work)
    done = subprocess.run(
        [sys.executable, folder / "forks.py", data, checkpoint, folder, *given],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def forked(data, checkpoint, tmp_path_factory):
    """What crashes, and two processes, left: both are children of one."""
    folder = tmp_path_factory.mktemp("forked")
    given = ("7", json.dumps(SHARED), *_free_ports(2))
    _run_forks(folder, _CRASHES + _TWO, data, checkpoint, *given)
    return folder


def _ended_alike(runs, every):
    runs = sorted(runs.iterdir())
    assert len(runs) > 20 // every
    for run in runs:
        _same(run, run.with_name("whole"))
        assert not list(run.glob(".*"))


def test_a_crash_at_changes_of_files(forked):
    _ended_alike(forked / "runs", 7)


@pytest.mark.slow
def test_a_crash_at_every_change_of_a_file(data, checkpoint, tmp_path):
    _run_forks(tmp_path, _CRASHES, data, checkpoint, "1")
    _ended_alike(tmp_path / "runs", 1)


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [str(found.getsockname()[1]) for found in sockets]


SHARED = {"batch": 12, "mixup": 0.0, "cutmix": 0.0}


def _as_alone(data, checkpoint, folder, output):
    """What two processes left is to rounding what one leaves."""
    vssm.finetune(request(data, folder / "alone", what=model_source(checkpoint), **SHARED))
    found = np.loadtxt(output / "log.csv", delimiter=",", skiprows=1)
    expected = np.loadtxt(folder / "alone" / "log.csv", delimiter=",", skiprows=1)
    assert len(found) == 6
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert json.loads((output / "finetune.json").read_text())["run"]["processes"] == 2


def test_two_processes(data, checkpoint, forked, tmp_path):
    """Killed on the way, and gone on, they end as one does."""
    trained = json.loads((forked / "two" / "finetune.json").read_text())["trained"]
    assert trained["resumed"] == 2
    _as_alone(data, checkpoint, tmp_path, forked / "two")


@pytest.mark.slow
def test_processes_of_torchrun(data, checkpoint, tmp_path):
    """Two processes, killed on the way, end as two that were not."""

    def start(name):
        return _start(tmp_path, data, checkpoint, tmp_path / name, processes=2, numbers=SHARED)

    killed = start("killed")
    killed.stdout.readline()
    _kill(killed, tmp_path)
    for name in ("killed", "whole"):
        process = start(name)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
    _same(tmp_path / "killed", tmp_path / "whole")
    _as_alone(data, checkpoint, tmp_path, tmp_path / "killed")


def test_processes_share_a_batch_evenly(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="batch=6 does not give each of the 2 processes the same"):
        vssm.finetune(request(data, tmp_path))


def test_processes_must_see_the_same_state(monkeypatch):
    """As on machines without a shared file system."""

    def gather(found, value):
        found[:] = [value, value - 3]

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    with pytest.raises(VssmError, match=r"step=\[7, 4\] differs between the processes"):
        Group("cpu").agree("step", 7)


def test_a_gpu_that_is_not_there_is_said(data, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RuntimeUnavailableError, match="device='cuda': torch finds no GPU; train"):
        vssm.finetune(request(data, tmp_path, resources={"device": "cuda"}))


def test_micro_batches_add_up(data, checkpoint, tmp_path, whole):
    asked = request(data, tmp_path, what=model_source(checkpoint), resources={"micro_batch": 4})
    vssm.finetune(asked)
    found = np.loadtxt(tmp_path / "log.csv", delimiter=",", skiprows=1)
    expected = np.loadtxt(whole / "log.csv", delimiter=",", skiprows=1)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_the_weights_export(data, whole, tmp_path, cli: Run):
    weights = whole / "finetuned.safetensors"
    code = cli(
        "export", *MODEL, "--schedule", SCHEDULE, "--checkpoint", weights, "-o", tmp_path / "o"
    )
    assert code == 0, cli.out
    manifest = json.loads((tmp_path / "o" / "model.json").read_text())
    report = json.loads((whole / "finetune.json").read_text())
    assert manifest["weights"] == "checkpoint"
    assert manifest["checkpoint"] == {"file": "finetuned.safetensors", "sha256": report["sha256"]}
    # Numbers as numbers, so that a script can compare runs.
    assert (report["run"]["lr"], report["run"]["batch"], report["run"]["flip"]) == (0.001, 6, 0.5)
    assert report["run"]["config"]["depth"] == OPTIONS["depth"]
    assert len(report["run"]["checkpoint"]) == 64
    assert weights.stat().st_mode & 0o777 == (whole / "log.csv").stat().st_mode & 0o777


def test_command(data, checkpoint, tmp_path, cli: Run):
    given = ["--data", data, "--checkpoint", checkpoint, "--schedule", SCHEDULE]
    given += ["-o", tmp_path / "out", "--epochs=1", "--batch=6", "--workers=0", "--lr=1e-3"]
    watched = ["--recipe=ema=0.5", "--seed=3", "--val", data]
    assert cli("finetune", *MODEL, *given, *watched) == 0, cli.out
    assert re.search(r"before .* \d+\.\d\d% ", cli.out)
    assert "finetuned_best.safetensors (best on the validation images)" in cli.out
    loss = "the training loss is that of mixed images, smoothed classes, altered images, so it"
    assert loss in cli.out
    assert "the validation images are those of the training, and say nothing of" in cli.out
    assert "finetuned_ema.safetensors (averaged)" in cli.out
    assert ("no TensorBoard log" in cli.out) == (not is_installed("tensorboard"))
    assert cli("finetune", *MODEL, *given) == 2
    assert "holds a training run; go on with it by --resume" in cli.out
    assert cli("finetune", *MODEL, *given, "--resume") == 2
    assert "is of another run: ema=0.5, now 0.99996; give the arguments" in cli.out
    mistyped = tmp_path / "outt"
    assert cli("finetune", *MODEL, *given, "-o", mistyped, "--resume") == 2
    assert f"output={mistyped} holds no training run to go on with" in cli.out
    assert not mistyped.exists()
    taken = tmp_path / "out" / "log.csv"
    assert cli("finetune", *MODEL, *given, "-o", taken) == 2
    assert f"output={taken} cannot be made (File exists); name another directory" in cli.out
    assert cli("finetune", *MODEL, *given, "--recipe=lr=1") == 2
    assert "--recipe lr: this number has an option of its own" in cli.out
    assert cli("finetune", *MODEL, *given, "--recipe=epochs") == 2
    assert "--recipe epochs: is not KEY=VALUE; write for example" in cli.out


def test_masked_tokens(data, checkpoint, tmp_path):
    """The loss of the first step is that of the masked reference on the same images."""
    numbers = {**PLAIN, "epochs": 1}
    losses = {}
    for tokens, alignment in (("masked", "masked"), ("gather", "gap")):
        what = model_source(checkpoint, tokens=tokens)
        asked = request(data, tmp_path / tokens, what=what, **numbers)
        vssm.finetune(asked)
        row = (tmp_path / tokens / "log.csv").read_text().splitlines()[1]
        losses[tokens] = float(row.split(",")[3])
        expected = _first_loss(_model(checkpoint, alignment), data, asked).item()
        assert losses[tokens] == pytest.approx(expected, rel=1e-5)
    assert losses["masked"] != pytest.approx(losses["gather"], rel=1e-4)
    plain = model_source(
        name="plain_mamba_l1",
        tokens="masked",
        schedule="2:0.7",
        options=finetune_cases.OPTIONS_PLAIN,
    )
    with pytest.raises(UnsupportedError, match="alignment='masked' is how Vim was trained"):
        vssm.finetune(request(data, tmp_path / "plain", what=plain))


def test_plain_mamba_trains(data, tmp_path):
    what = model_source(
        name="plain_mamba_l1", schedule="2:0.7", options=finetune_cases.OPTIONS_PLAIN
    )
    report = vssm.finetune(request(data, tmp_path, what=what, epochs=1))
    assert report.trained.steps == 7
    model = vssm.create_model("plain_mamba_l1", num_classes=7, **what.options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    vssm.load_checkpoint(model, tmp_path / "finetuned.safetensors")
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    trained = {key for key, _ in model.named_parameters()}
    assert changed == trained  # batch norms keep the statistics of the checkpoint


def test_a_whole_schedule_is_trained_as_it_is(data, checkpoint, tmp_path):
    """The rules that the options name give the same bytes, and others are in the header."""
    numbers = {**PLAIN, "epochs": 1}
    options = model_source(checkpoint, alignment="none", importance="l1")
    whole = vssm.PruneSchedule.parse(SCHEDULE, alignment="none", importance="l1")
    same = model_source(checkpoint, schedule=whole)
    listed = model_source(checkpoint, schedule=whole.changed(conv="compact"))
    found = {}
    for name, what in (("options", options), ("same", same), ("listed", listed)):
        report = vssm.finetune(request(data, tmp_path / name, what=what, **numbers))
        found[name] = report.sha256
    assert found["options"] == found["same"] != found["listed"]
    rules = report.run["schedule"]
    assert (rules["kind"], rules["conv"], rules["importance"]) == ("PruneSchedule", "compact", "l1")
    assert rules["ratios"] == {"1": 0.7, "2": 0.8}  # numbers, in finetune.json too


def test_a_new_head_on_weights_under_a_key(data, tmp_path):
    wide = vssm.create_model("vim_tiny", num_classes=20, **OPTIONS)
    torch.save({"student": {"net": wide.state_dict()}}, tmp_path / "a.pth")
    source = model_source(tmp_path / "a.pth", key="student", new_head=True)
    report = vssm.finetune(request(data, tmp_path / "out", what=source, epochs=1))
    assert "under 'student.net'" in report.loaded
    assert "head.weight (7, 20) stays the model's own, the file has (20, 20)" in report.loaded
    assert report.run["new_head"] is True


def test_distillation(data, checkpoint, tmp_path, whole):
    """Where nothing is pruned the teacher is the model, and the first step's divergence is none."""
    alone = model_source(checkpoint, schedule="1:1.0")
    vssm.finetune(request(data, tmp_path / "a", what=alone, distil=1.0, epochs=1))
    first = (tmp_path / "a" / "log.csv").read_text().splitlines()[1]
    assert abs(float(first.split(",")[3])) < 1e-6
    vssm.finetune(request(data, tmp_path / "b", what=model_source(checkpoint), distil=0.5))
    assert (tmp_path / "b" / "log.csv").read_bytes() != (whole / "log.csv").read_bytes()
    asked = request(data, tmp_path / "c", what=model_source(checkpoint), distil=0.5)
    _, teacher = build_models(asked, Group("cpu"))
    assert {m.backend for m in teacher.modules() if hasattr(m, "backend")} == {"kernel"}
    with pytest.raises(ValueError, match=r"distil=0.5 needs a schedule and a checkpoint"):
        request(data, tmp_path, distil=0.5)


def test_an_image_that_cannot_be_read_ends_the_run(data, tmp_path):
    copy = write_pictures(tmp_path / "data")
    (copy / "n3" / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        vssm.finetune(request(copy, tmp_path / "out", **{**PLAIN, "batch": 43}))


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path):
    with pytest.raises(VssmError, match=r"loss=nan at step \d+ is not finite; begin again"):
        vssm.finetune(request(data, tmp_path, lr=1e30, warm_up_lr=1e30, min_lr=1e30))


def _with_a_bit_flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_damaged_state_is_refused(data, checkpoint, tmp_path):
    asked = request(data, tmp_path, what=model_source(checkpoint), epochs=1)
    vssm.finetune(asked)
    state = tmp_path / "state.safetensors"
    whole = state.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")  # of what stands before the values
    flipped = (_with_a_bit_flipped(whole, at) for at in (size, len(whole) - 1))
    later = whole.replace(rb"\"step\": 7", rb"\"step\": 6")
    assert later != whole
    for damaged in (b"", whole[:-100], b"\0" * 16, *flipped, later):
        state.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"state=.* is damaged \("):
            vssm.finetune(replace(asked, resume=True))
    state.write_bytes(whole)
    (tmp_path / "log.csv").write_bytes(b"step,epoch,lr,loss\n")
    with pytest.raises(ArtifactError, match="has 0 rows, but 7 steps are done"):
        vssm.finetune(replace(asked, resume=True))


def test_weights_bring_the_names_of_their_classes(data, checkpoint, whole, tmp_path):
    """A model trained on folders in any order is evaluated, and trained on, by their names."""
    names = [f"n{i}" for i in (4, 2, 0, 6, 1, 3, 5)]
    order = tmp_path / "order.txt"
    order.write_text("\n".join(names))
    asked = request(data, tmp_path / "one", what=model_source(checkpoint), **PLAIN, epochs=1)
    report = vssm.finetune(replace(asked, classes=order))
    assert report.classes == tuple(names)
    assert report.run["classes"] == "named by the file order.txt"
    written = json.loads((tmp_path / "one" / "finetune.json").read_text())
    assert written["classes"] == names
    for weights in (Path(report.weights), Path(report.ema)):
        model = _model(weights)
        assert model.labels == tuple(names)
    again = request(data, tmp_path / "two", what=model_source(Path(report.weights)), **PLAIN)
    assert plan_run(again, model, Group("cpu"), 0).lesson.labels == tuple(names)
    artifact = vssm.export(model, tmp_path / "out")
    assert artifact.manifest.labels == tuple(names)
    kept = vssm.create_model("vim_tiny", num_classes=CLASSES, **finetune_cases.OPTIONS)
    vssm.load_checkpoint(kept, artifact.directory / "weights.safetensors")
    assert kept.labels == tuple(names)
    evaluated = vssm.evaluate(artifact, data, workers=0, results=tmp_path / "found.csv")
    assert evaluated.classes == "matched to the model's labels by name"
    assert _model(whole / "finetuned.safetensors").labels == tuple(sorted(names))
    vssm.load_checkpoint(model, checkpoint)
    assert model.labels is None
