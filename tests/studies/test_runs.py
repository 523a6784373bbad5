"""`vssm ablate`: fine-tuned rows, several checkpoints, pairs, and that a stopped run ends alike."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import finetune_cases
import pytest
import torch
from checkout import PYTHONPATH, ROOT
from command import SIZES
from exports import SCHEDULE, exported, micro
from finetune_cases import CLASSES, PLAIN, RECIPE, model_source, request, write_pictures
from plots import draw_one_plot, leave_plots_out
from safetensors.torch import load_file, save_file

import vssm
from vssm import AblationOptions, AblationTraining, ModelSource, PruneSchedule, Recipe
from vssm.artifact.manifest import Preprocessing
from vssm.errors import ArtifactError
from vssm.evaluation.data import load, open_images
from vssm.models.fused_tokens import fuse_leftovers
from vssm.studies.measure import AblationJournal, Step
from vssm.studies.paired import Pair, compare, join, mcnemar
from vssm.studies.plan import make_plan
from vssm.studies.runs import Trainer, open_checkpoints
from vssm.training.augment import Example, load_batch

# Six steps, in two epochs.
NUMBERS = {**RECIPE, **PLAIN, "batch": 14, "lr": 5e-3}
TRAINED = ("none", "gap", "masked", "evit")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """42 images in 7 folders, a colour a folder."""
    return write_pictures(tmp_path_factory.mktemp("data"), told_apart=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two sets of weights of one model."""
    folder = tmp_path_factory.mktemp("weights")
    state = dict(micro(None).state_dict())
    save_file(state, folder / "a.safetensors")
    generator = torch.Generator().manual_seed(1)
    noise = {k: torch.randn(v.shape, generator=generator) for k, v in state.items()}
    save_file({k: v + 0.1 * noise[k] for k, v in state.items()}, folder / "b.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


def _options(data, **changes):
    training = AblationTraining(data, TRAINED, 2, Recipe.of(NUMBERS), save_every=2)
    given = {"seeds": 1, "ratios": ("0.5",), "batch": 8, "training": training}
    return AblationOptions(**{**given, **changes})


@pytest.fixture(scope="module")
def whole(data, checkpoints, tmp_path_factory):
    """An ablation that nothing stopped: its directory and report."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        draw_one_plot(patch)
        report = vssm.ablate(model_source(checkpoints[0]), data, output, _options(data))
    return output, report


@pytest.fixture
def no_plots(monkeypatch):
    leave_plots_out(monkeypatch)


def _rows(report):
    return {row.label: row for row in report.rows if row.table in {"methods", "alignment"}}


def _same(one: Path, other: Path) -> None:
    """Everything but the times, and the plot against them."""
    reports = [json.loads((d / "ablation.json").read_text()) for d in (one, other)]
    for report in reports:
        for row in report["rows"]:
            for timed in ("images_per_s", "timed_batches", "speed_up", "ms_quartiles"):
                del row[timed]
    assert reports[0] == reports[1]
    pictures = [(d / "accuracy_flops.png").read_bytes() for d in (one, other)]
    assert pictures[0] == pictures[1]
    weights = [sorted(p.relative_to(d) for p in d.rglob("*.safetensors")) for d in (one, other)]
    assert weights[0] == weights[1]
    assert all((one / p).read_bytes() == (other / p).read_bytes() for p in weights[0])


def finetune_model(weights, schedule):
    model = vssm.create_model(
        "vim_tiny", schedule=schedule, num_classes=CLASSES, **finetune_cases.OPTIONS
    )
    vssm.load_checkpoint(model, weights)
    return model


def _hits(weights, alignment, data):
    """Whether the model is right, image by image, in batches of 8 as the ablation has them."""
    model = finetune_model(weights, PruneSchedule.parse(SCHEDULE, alignment=alignment))
    spec, found = Preprocessing.for_image_size((48, 48)), []
    pictures = open_images(data, CLASSES).pictures
    for start in range(0, len(pictures), 8):
        some = pictures[start : start + 8]
        images = load([str(data / p.path) for p in some], spec).images
        with torch.inference_mode():
            best = model(torch.from_numpy(images)).argmax(1).tolist()
        found += [b == p.target for b, p in zip(best, some, strict=True)]
    return found


def test_trained_rows_are_finetunes_own(data, checkpoints, whole, tmp_path):
    """Weights to the byte; the row has their accuracies, the mean and the deviation."""
    output, report = whole
    found = []
    for seed in (0, 1):
        weights = output / "finetuned" / f"none-{seed}" / "finetuned.safetensors"
        found.append(statistics.fmean(_hits(weights, "none", data)))
    what = model_source(checkpoints[0], alignment="none")
    alone = vssm.finetune(request(data, tmp_path, what=what, **NUMBERS, seed=1))
    assert weights.read_bytes() == Path(alone.weights).read_bytes()
    row = _rows(report)["plain removal, fine-tuned"]
    assert list(row.top1s) == pytest.approx(found)
    assert row.top1 == statistics.fmean(row.top1s)
    assert row.spread == statistics.stdev(row.top1s)
    assert row.runs == ("fine-tuned none, seed 0", "fine-tuned none, seed 1")
    assert row.tuned
    assert row.paired is None
    assert row.top1 != _rows(report)["plain removal"].top1
    assert "masked, fine-tuned" in _rows(report)
    assert "| plain removal, fine-tuned |" in (output / "ablation.md").read_text()
    assert f"± {100 * row.spread:.2f} (2) |" in (output / "ablation.md").read_text()


def test_pairs_are_of_the_same_images(data, checkpoints, whole):
    """The counts of a row beside plain removal, by hand; means over the seeds."""
    rows = _rows(whole[1])
    (pair,) = rows["aligned (gap)"].paired.pairs
    both = list(
        zip(*(_hits(checkpoints[0], alignment, data) for alignment in ("gap", "none")), strict=True)
    )
    assert (pair.better, pair.worse) == (both.count((True, False)), both.count((False, True)))
    tuned = rows["aligned (gap), fine-tuned"]
    assert [(p.run, p.against) for p in tuned.paired.pairs] == [
        (f"fine-tuned gap, seed {s}", f"fine-tuned none, seed {s}") for s in (0, 1)
    ]
    plain = rows["plain removal, fine-tuned"]
    differences = [a - b for a, b in zip(tuned.top1s, plain.top1s, strict=True)]
    assert tuned.paired.difference == pytest.approx(statistics.fmean(differences))
    assert tuned.paired.spread == pytest.approx(statistics.stdev(differences))


def test_mcnemar():
    """By hand: 1 of 6 under even odds, both tails."""
    assert mcnemar(1, 5) == mcnemar(5, 1) == 2 * (1 + 6) / 64
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert 0 < mcnemar(4800, 5200) < 1e-3
    assert mcnemar(0, 5000) == 0
    pair = compare(("a", "1101"), ("b", "1010"))
    assert pair == Pair("a", "b", 2, 1, 1.0)
    assert join([pair], 4).difference == 0.25
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        compare(("a", "11"), ("b", "1"))


@pytest.mark.parametrize("kind", ["fused", "merged"])
def test_other_baselines_train(data, checkpoints, tmp_path, kind):
    """The loss of the first step is the fused or merged model's own on the same images."""
    numbers, merging = {**PLAIN, "epochs": 1}, vssm.MergeSchedule(6, alignment="size")
    what = model_source(checkpoints[0], tokens="fused")
    model = finetune_model(checkpoints[0], PruneSchedule.parse(SCHEDULE, alignment="none"))
    if kind == "merged":
        what = replace(what, tokens="gather", schedule=merging)
        model = finetune_model(checkpoints[0], merging)
    else:
        fuse_leftovers(model)
    asked = request(data, tmp_path, what=what, **numbers)
    vssm.finetune(asked)
    pictures = open_images(data, CLASSES).pictures
    chosen = asked.recipe.order(0, len(pictures))[0]
    examples = [Example(str(data / pictures[i].path), 0, p) for p, i in enumerate(chosen)]
    images = torch.from_numpy(load_batch(examples, recipe=asked.recipe, size=(48, 48)))
    targets = torch.tensor([pictures[i].target for i in chosen])
    smoothing = asked.recipe.smoothing
    expected = torch.nn.functional.cross_entropy(model(images), targets, label_smoothing=smoothing)
    row = (tmp_path / "log.csv").read_text().splitlines()[1]
    assert float(row.split(",")[3]) == pytest.approx(expected.item(), rel=1e-5)


def test_several_checkpoints(data, checkpoints, tmp_path, whole, no_plots):
    """Rows have a run for each; trainings take turns; the first's runs are those of it alone."""
    training = AblationTraining(data, ("gap",), None, Recipe.of(NUMBERS))
    options = _options(data, checkpoints=checkpoints[1:], training=training, average=True)
    report = vssm.ablate(model_source(checkpoints[0]), data, tmp_path / "both", options)
    assert report.facts["checkpoints"].startswith("2, averaged: a row is the mean over them")
    assert f"images in {data}, which are those to measure on; the" in report.facts["fine-tuned"]
    apart = vssm.ablate(
        model_source(checkpoints[0]),
        data,
        tmp_path / "apart",
        _options(data, checkpoints=checkpoints[1:], training=None),
    )
    assert apart.facts["checkpoints"] == "2, apart: a row for each"
    rows, first, each = _rows(report), _rows(whole[1]), _rows(apart)
    for label in ("dense", "aligned (gap)", "plain removal", "masked"):
        both = [each[f"{label}, {name}.safetensors"] for name in "ab"]
        assert both[0].top1s == first[label].top1s
        assert rows[label].top1s == (*both[0].top1s, *both[1].top1s)
        assert [row.checkpoint for row in both] == ["a.safetensors", "b.safetensors"]
        assert [row.spread for row in both] == [None, None]
        assert rows[label].spread == pytest.approx(statistics.stdev(rows[label].top1s))
    (random,) = (row for row in report.rows if row.label.startswith("random"))
    assert random.runs == ("random-0, checkpoint 0", "random-0, checkpoint 1")
    tuned = rows["aligned (gap), fine-tuned"]
    assert tuned.top1s[0] == first["aligned (gap), fine-tuned"].top1s[0]
    assert tuned.paired is None  # plain removal was not trained
    begun = [_run(tmp_path / "both", f"gap-{seed}")["checkpoint"] for seed in (0, 1)]
    assert begun[0] == _run(whole[0], "gap-0")["checkpoint"] != begun[1]
    assert [_run(tmp_path / "both", f"gap-{seed}")["seed"] for seed in (0, 1)] == [0, 1]


def _run(output, name):
    return json.loads((output / "finetuned" / name / "finetune.json").read_text())["run"]


def test_an_export_is_trained_from_its_weights(data, checkpoints, tmp_path, whole, no_plots):
    """As from the checkpoint that it was made of."""
    model = finetune_model(checkpoints[0], PruneSchedule.parse(SCHEDULE))
    export = exported(tmp_path, model)
    training = AblationTraining(data, ("gap",), 1, Recipe.of(NUMBERS))
    out = tmp_path / "ablation"
    vssm.ablate(ModelSource(str(export.directory)), data, out, _options(data, training=training))
    start = load_file(out / "finetuned" / "start.safetensors")
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    name = Path("finetuned", "gap-0", "finetuned.safetensors")
    assert (out / name).read_bytes() == (whole[0] / name).read_bytes()


class _StopError(Exception):
    pass


def _stop_at(text):
    def progress(phase, done, total, note=""):
        if text in f"{phase}: {done} of {total}":
            raise _StopError

    return progress


def test_a_stopped_ablation_goes_on(data, checkpoints, tmp_path, whole, monkeypatch):
    """In a training, between two, and while measuring; what is done is not done again."""
    draw_one_plot(monkeypatch)
    asked = (model_source(checkpoints[0]), data, tmp_path, _options(data))
    for text in ("gap-0: training, steps: 5 of", "masked-1: training, steps: 1 of", "24 of 42"):
        with pytest.raises(_StopError):
            vssm.ablate(*asked, progress=_stop_at(text))
    with (tmp_path / "ablation.json.journal").open("ab") as file:
        file.write(b'{"unreadable": [], "hi')
    told = []
    vssm.ablate(*asked, progress=lambda *step: told.append(step))
    # Before the first batch, a run at a time, and after each batch.
    seen = [step for step in told if step[0] == "measuring, images"]
    assert [step[1:] for step in seen if len(step) == 3] == [(n, 42) for n in (24, 32, 40, 42)]
    runs = {step[3] for step in seen if len(step) == 4}
    assert len(seen) == 4 + 3 * len(runs)
    assert [n for _, n, *_ in seen] == sorted(n for _, n, *_ in seen)
    assert ("building the variants", 0) in {step[:2] for step in told}
    _same(tmp_path, whole[0])
    assert not list(tmp_path.glob("*.journal"))


def test_unreadable_files_survive_a_stop(checkpoints, tmp_path, no_plots):
    data = write_pictures(tmp_path / "data")
    for name in ("n0/bad.png", "n3/notes.txt"):
        (data / name).write_bytes(b"no image")
    options = AblationOptions(seeds=1, ratios=("0.5",), batch=2)
    asked = (model_source(checkpoints[0]), str(data), str(tmp_path / "out"), options)
    with pytest.raises(_StopError):
        vssm.ablate(*asked, progress=_stop_at("10 of 44"))
    report = vssm.ablate(*asked)
    assert [path for path, _ in report.unreadable] == ["n0/bad.png", "n3/notes.txt"]
    assert report.rows[0].standard_error > 0
    assert report.rows[0].timed_batches == 18  # of 20 full batches two began a call


def test_another_ablation_is_refused(data, checkpoints, tmp_path, no_plots):
    options = AblationOptions(seeds=1, ratios=("0.5",), batch=8)
    with pytest.raises(_StopError):
        vssm.ablate(
            model_source(checkpoints[0]), data, tmp_path, options, progress=_stop_at("8 of 42")
        )
    with pytest.raises(ArtifactError, match=r"of another ablation: weights=.*give another -o"):
        vssm.ablate(model_source(checkpoints[1]), data, tmp_path, options)
    with pytest.raises(ArtifactError, match=r"batch=8, now 4; run it to its end"):
        vssm.ablate(model_source(checkpoints[0]), data, tmp_path, replace(options, batch=4))
    anew = replace(options, batch=4, restart=True)
    assert vssm.ablate(model_source(checkpoints[0]), data, tmp_path, anew).rows
    with AblationJournal(tmp_path / "j", {}) as journal:
        journal.append(Step((("a", "torn"),), {"gap": "01"}, {"gap": 0.5}, True))
    with AblationJournal(tmp_path / "j", {}) as journal:
        assert journal.done == [Step((("a", "torn"),), {"gap": "01"}, {"gap": 0.5}, True)]
    (tmp_path / "j").write_text('{}\n{"unreadable": []}\n')
    with pytest.raises(ArtifactError, match=r"is damaged \('hits'\); begin anew with --restart"):
        AblationJournal(tmp_path / "j", {})


_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
from finetune_cases import model_source
from test_runs import _options
import vssm

torch.set_num_threads(1)
data, checkpoint, output = map(Path, sys.argv[2:])
vssm.ablate(
    model_source(checkpoint),
    data,
    output,
    _options(data),
    progress=lambda phase, done, total, *_: print(f"{phase}: {done} of {total}", flush=True),
)
"""


# A crash at every change of a file, below, proves the same at more points.
@pytest.mark.slow
def test_kill_and_resume(data, checkpoints, tmp_path, whole):
    """By kill -9: in the second training, in the sixth, and while measuring."""
    script, out = tmp_path / "ablate.py", tmp_path / "out"
    script.write_text(_SCRIPT)
    for text, delay in (
        ("none-1: training, steps: 1 of", 0.02),
        ("evit-0: training, steps: 4 of", 0.0),
        ("measuring, images: 16 of 42", 0.01),
    ):
        process = _start(script, data, checkpoints[0], out)
        assert any(text in line for line in process.stdout)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "ablation.json").exists()
    process = _start(script, data, checkpoints[0], out)
    said, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "steps: 1 of" not in said
    _same(out, whole[0])


def _start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, script, ROOT / "tests/studies", *arguments],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Forked, as a process that imports torch takes seconds.
_CRASHES = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch
import torch._dynamo
from vssm import AblationOptions
from crashes import torn
from finetune_cases import model_source
from test_runs import _rows, _same
import vssm

torch.set_num_threads(1)
data, checkpoint, output = map(Path, sys.argv[2:])


def ablate(folder):
    options = AblationOptions(seeds=1, ratios=(), batch=21)
    vssm.ablate(model_source(checkpoint), data, folder, options)


print(torn(ablate, output))
for folder in output.iterdir():
    _same(folder, output / "whole")
    assert not list(folder.glob("*.journal"))
"""


@pytest.mark.slow
def test_a_crash_at_every_change_of_a_file(data, checkpoints, tmp_path):
    script = tmp_path / "crash.py"
    script.write_text(_CRASHES)
    process = _start(script, data, checkpoints[0], tmp_path / "runs")
    said, err = process.communicate(timeout=500)
    assert process.returncode == 0, said + err
    assert int(said) > 15


def test_command(cli, data, checkpoints, tmp_path, whole, monkeypatch, no_plots):
    """The options ask for the same; files that were trained elsewhere, one a seed."""
    given = ["vim_tiny", data, "--num-classes=7", *SIZES, "--schedule", SCHEDULE, "--seeds=1"]
    given += ["--ratios=0.5", "--batch=8", "--checkpoint", checkpoints[0]]
    numbers = [f"--recipe={key}={json.dumps(value)}" for key, value in NUMBERS.items()]
    train = ["--train", data, "--finetune", ",".join(TRAINED), "--finetune-seeds=2"]
    asked = []

    def ablate(*what, progress):
        asked.extend(what)
        return whole[1]

    with monkeypatch.context() as patch:
        patch.setattr("vssm.studies.ablate.ablate", ablate)
        assert cli("ablate", *given, *train, *numbers, "-o", tmp_path / "a") == 0, cli.out
    source, images, output, options = asked
    assert (images, output) == (data, tmp_path / "a")
    assert source == model_source(checkpoints[0])
    wanted = _options(data)
    training = replace(options.training, variants=TRAINED, save_every=2)
    assert list(options.training.variants) == list(TRAINED)
    assert replace(options, ratios=("0.5",), checkpoints=(), training=training) == wanted
    assert (list(options.ratios), list(options.checkpoints)) == (["0.5"], [])
    assert "fine-tuned: none, gap, masked, evit: 2 each, on 42 images" in cli.out
    assert "classes: the i-th folder by name is class i; the model has no labels" in cli.out
    files = [
        f"--finetuned={key}={whole[0]}/finetuned/{key}-{seed}/finetuned.safetensors"
        for key in ("none", "gap")
        for seed in (0, 1)
    ]
    assert cli("ablate", *given, *files, "-o", tmp_path / "b") == 0, cli.out
    rows = json.loads((tmp_path / "b" / "ablation.json").read_text())["rows"]
    found = {row["label"]: row["top1s"] for row in rows}
    for label in ("plain removal, fine-tuned", "aligned (gap), fine-tuned"):
        assert found[label] == list(_rows(whole[1])[label].top1s)


def test_seeds_of_trainings_count_from_the_first(data, checkpoints, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(Trainer, "_train", lambda self, *given: trained.append(given) or tmp_path)
    training = AblationTraining(data, variants=("gap",), seeds=4)
    asked = AblationOptions(checkpoints=checkpoints[1:2], training=training, seed=5)
    source = model_source(checkpoints[0])
    opened = open_checkpoints(source, asked.checkpoints)
    plan = make_plan(opened[0].schedule, seeds=1, ratios=[])
    runs, _ = Trainer(source, opened, asked, tmp_path, lambda *_: None).runs(plan)
    assert [given[0] for given in trained] == ["gap-5", "gap-6", "gap-7", "gap-8"]
    assert [given[2] for given in trained] == [5, 6, 7, 8]
    assert [(run.number, run.checkpoint) for run in runs] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert runs[0].key == "fine-tuned gap, seed 5"
    with pytest.raises(ValueError, match="seed=-1 is below 0"):
        AblationOptions(seed=-1)


def _given(data, tmp_path):
    given = ["vim_tiny", data, "--num-classes=7", *SIZES, "--schedule", SCHEDULE, "--batch=8"]
    return [*given, "-o", tmp_path / "out"], ["--train", data, "--recipe=batch=6"]


def test_refusals(cli, data, checkpoints, tmp_path):
    given, train = _given(data, tmp_path)
    one = tmp_path / "one" / "n0"
    one.mkdir(parents=True)
    (tmp_path / "names.txt").write_text("a\nb\n")
    for i in range(CLASSES):
        for place, name in (("others", f"m{i}"), ("numbers", str(i + 5))):
            (tmp_path / place / name).mkdir(parents=True)
            (tmp_path / place / name / "a.png").write_bytes(b"")
    cases = {
        "--finetune without --train trains nothing": ["--finetune=gap"],
        "--finetune-seeds without --train trains": ["--finetune-seeds=2"],
        "--recipe without --train trains nothing": ["--recipe=epochs=1"],
        "finetune='gup' is not a variant of this ablation": [*train, "--finetune=gap,gup"],
        "finetune='gap' is named twice": [*train, "--finetune=gap,gap"],
        "finetune_seeds=0 is below 1": [*train, "--finetune-seeds=0"],
        "finetune='gap' is trained here and given by --finetuned": [*train, "--finetuned=gap=x"],
        "--recipe seed: each training has its own": [*train, "--recipe=seed=1"],
        "--recipe epochs: is not KEY=VALUE; write for example seed=1": [
            *train,
            "--recipe=epochs",
        ],
        "recipe: distil=1.0 makes the dense model the teacher": [*train, "--recipe=distil=1"],
        "recipe: batch=512 is more than the 42 images of train=": ["--train", data],
        f"train={tmp_path / 'one'} holds 1 folders, but the model": ["--train", tmp_path / "one"],
        f"train={tmp_path / 'none'} is not a folder": ["--train", tmp_path / "none"],
        f"train={tmp_path / 'others'}: the folder of class 0 is 'm0' there and 'n0' in images=": [
            "--train",
            tmp_path / "others",
        ],
        f"train={tmp_path / 'numbers'} holds folders with numbers for names, in another order": [
            "--train",
            tmp_path / "numbers",
        ],
        f"classes={tmp_path / 'names.txt'} names 2 classes": ["--classes", tmp_path / "names.txt"],
        "finetune_seeds=3 is not a multiple of the 2 checkpoints": [
            *[*train, "--finetune-seeds=3"],
            *(f"--checkpoint={file}" for file in checkpoints),
        ],
    }
    for message, options in cases.items():
        assert cli("ablate", *given, *options) == 2, message
        assert message in cli.out
    numbers = [*given[:1], tmp_path / "numbers", *given[2:]]
    assert cli("ablate", *numbers) == 2
    assert "say --classes numeric or --classes text, as the model was trained" in cli.out
    assert not (tmp_path / "out").exists()


def test_refusals_of_what_is_asked_together(cli, data, checkpoints, tmp_path, monkeypatch):
    given, train = _given(data, tmp_path)
    export = exported(tmp_path / "export", micro())
    files = [f"--checkpoint={file}" for file in checkpoints]
    assert cli("ablate", export.directory, data, "-o", tmp_path / "out", *files) == 2
    assert "is an export, which has its own weights and sizes; leave --checkpoint" in cli.out
    assert cli("ablate", *given[:-1], tmp_path / "no", *train, "--backend=fast") == 2
    assert "backend='fast' is not one of" in cli.out
    assert not (tmp_path / "no" / "finetuned").exists()
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(checkpoints[0].read_bytes())
    again = (f"--checkpoint={checkpoints[0]}", f"--checkpoint={copy}", "--average")
    assert cli("ablate", *given, *again) == 2
    assert f"checkpoints={copy} has the weights of {checkpoints[0]}, tensor by tensor" in cli.out
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli("ablate", *given, *train) == 2
    assert "train with several processes: ablate runs in one; train each variant" in cli.out
    assert not (tmp_path / "out").exists()


def test_what_a_family_lacks_is_not_trained(data, tmp_path, no_plots):
    from finetune_cases import OPTIONS_PLAIN

    what = ModelSource(
        "plain_mamba_l1", schedule="2:0.7", num_classes=CLASSES, options=OPTIONS_PLAIN
    )
    training = AblationTraining(data, ("masked", "gap"), 1, Recipe.of({**NUMBERS, "epochs": 1}))
    report = vssm.ablate(what, data, tmp_path, _options(data, training=training))
    assert list(report.left_out) == ["merge", "merge+size", "masked", "fine-tuned masked"]
    assert report.left_out["fine-tuned masked"] == report.left_out["masked"]
    assert "aligned (gap), fine-tuned" in _rows(report)


def test_one_subject_for_every_command(data, checkpoints, tmp_path):
    schedule = PruneSchedule.parse(SCHEDULE)
    with pytest.raises(ValueError, match=r"alignment='none' beside a PruneSchedule.*changed\(al"):
        ModelSource("vim_tiny", schedule=schedule, alignment="none")
    with pytest.raises(ValueError, match=r"checkpoints=.*and no checkpoint before them"):
        vssm.ablate(model_source(), data, tmp_path, AblationOptions(checkpoints=checkpoints))
    with pytest.raises(ValueError, match="tokens='fused' is a way to train; leave it out"):
        vssm.ablate(model_source(checkpoints[0], tokens="fused"), data, tmp_path)
    with pytest.raises(ValueError, match="tokens='masked' beside a PruneSchedule"):
        model_source(tokens="masked", schedule=schedule)
    with pytest.raises(ValueError, match="alignment='gap' with tokens='fused'"):
        model_source(tokens="fused", alignment="gap")
    texts, made = model_source(checkpoints[0]), model_source(checkpoints[0], schedule=schedule)
    logs = []
    for name, what in (("text", texts), ("made", made)):
        vssm.finetune(request(data, tmp_path / name, what=what, epochs=1))
        logs.append((tmp_path / name / "state.safetensors").read_bytes())
    assert logs[0] == logs[1]
