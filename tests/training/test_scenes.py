"""`vssm finetune` of segmenters: the recipe, the augmentation, the loss, and stopped runs."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from command import Run
from PIL import Image
from safetensors.torch import load_file

import vssm
from vssm import FinetuneRequest, ModelSource, Recipe, Resources, SceneRecipe
from vssm.artifact.manifest import IMAGENET_MEAN, IMAGENET_STD
from vssm.evaluation.scenes import UNLABELLED, open_scenes
from vssm.files.atomic import sha256_of
from vssm.models.dense.heads import ConvNorm
from vssm.training.lessons import Scenes
from vssm.training.loop import Group
from vssm.training.scene_augment import augment_scene, distort

NAME = "vim_tiny_upernet_ade20k"
CLASSES = 3
COLOURS = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], np.uint8)
OPTIONS = {
    "image_size": 64,
    "table_size": 64,
    "depth": 4,
    "taps": [1, 2, 3, 4],
    "d_model": 16,
    "d_state": 4,
    "head_width": 12,
    "auxiliary_width": 8,
}
RECIPE = {"iterations": 4, "batch": 4, "lr": 3e-3, "warm_up_steps": 0, "distortion": False}
SCENES = 8


def _scene(seed):
    """Stripes of the three classes and some of none, with noise: an image and its numbers."""
    make = np.random.default_rng(seed)
    bars = make.integers(0, CLASSES + 1, 4)
    numbers = np.repeat(bars, 20)[None].repeat(70, axis=0).astype(np.uint8)
    pixels = np.concatenate([[[128, 128, 128]], COLOURS])[numbers]
    noise = make.integers(-20, 20, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)), numbers


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for kind in ("images", "annotations"):
        (root / kind / "training").mkdir(parents=True)
    for seed in range(SCENES):
        image, numbers = _scene(seed)
        image.save(root / "images" / "training" / f"{seed}.png")
        Image.fromarray(numbers).save(root / "annotations" / "training" / f"{seed}.png")
    return root


def _request(data, output, *, schedule=None, resources=None, resume=False, **numbers):
    source = ModelSource(NAME, schedule=schedule, num_classes=CLASSES, options=OPTIONS)
    recipe = SceneRecipe.published(NAME, {**RECIPE, **numbers})
    given = Resources(**{"workers": 0, "save_every": 1, "threads": 1, **(resources or {})})
    return FinetuneRequest(source, data, output, recipe, None, resume, given)


def test_the_published_numbers():
    tiny, small = (SceneRecipe.published(f"vim_{s}_upernet_ade20k") for s in ("tiny", "small"))
    assert (tiny.batch, tiny.iterations, tiny.lr, tiny.weight_decay) == (32, 60_000, 2e-4, 0.1)
    assert (small.lr, small.weight_decay, small.layer_decay) == (1e-4, 0.05, 0.95)
    plain = SceneRecipe.published("plain_mamba_l1_upernet_ade20k")
    assert (plain.batch, plain.iterations, plain.lr) == (16, 160_000, 6e-5)
    assert (plain.weight_decay, plain.layer_decay, plain.auxiliary) == (0.01, 1.0, 0.4)


def test_the_rate_rises_in_a_line_and_falls_in_another():
    recipe = SceneRecipe(iterations=100, lr=1.0, warm_up_steps=10, warm_up_ratio=0.1)
    found = [recipe.rate_at(step, 7) for step in (0, 5, 10, 55, 99)]
    # (1 - step / 100), in the warm-up times 0.1 + 0.9 * step / 10.
    assert found == pytest.approx([0.1, 0.95 * 0.55, 0.9, 0.45, 0.01])
    curved = SceneRecipe(iterations=100, lr=1.0, min_lr=0.2, power=2.0, warm_up_steps=0)
    assert curved.rate_at(50, 7) == pytest.approx(0.8 * 0.25 + 0.2)


def test_blocks_learn_more_slowly_away_from_the_head():
    recipe = SceneRecipe(layer_decay=0.5)
    keys = ("backbone.pos_embed", "backbone.layers.0.norm.weight", "backbone.layers.3.mixer.D")
    assert [recipe.scale(key, 4) for key in keys] == [0.5**5, 0.5**4, 0.5]
    assert recipe.scale("decode_head.conv_seg.weight", 4) == 1


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"largest": 0.1}, "largest=0.1 must be no less than `smallest`"),
        ({"smallest": float("nan")}, "smallest=nan must be above 0"),
        ({"speed": 3}, "recipe='speed'"),
    ],
)
def test_numbers_that_do_not_fit(numbers, message):
    with pytest.raises(ValueError, match=message):
        SceneRecipe.published(NAME, numbers)


def test_pixels_and_classes_go_together():
    image, numbers = _scene(3)
    classes = (numbers.astype(int) - 1).astype(np.uint8)
    recipe = SceneRecipe(distortion=False)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        pixels, known = augment_scene(image, classes, recipe, (48, 40), rng)
        again, _ = augment_scene(image, classes, recipe, (48, 40), np.random.default_rng(seed))
        assert (pixels == again).all()
        assert (pixels.shape, known.shape) == ((3, 48, 40), (48, 40))
        colours = pixels.transpose(1, 2, 0) * IMAGENET_STD + IMAGENET_MEAN
        # The strongest colour is the class, but for the edges of stripes, which are smoothed.
        labelled = known != UNLABELLED
        assert (colours.argmax(2) == known)[labelled].sum() >= 0.9 * labelled.sum()
        # Below the image, where it is smaller than the crop, nothing is known.
        assert (known[(pixels == 0).all(0)] == UNLABELLED).all()


def test_a_small_image_is_padded_at_the_end():
    image = Image.new("RGB", (20, 10), "white")
    recipe = SceneRecipe(smallest=0.5, largest=0.5, flip=0, distortion=False)
    known = np.zeros((10, 20), np.uint8)
    pixels, classes = augment_scene(image, known, recipe, (64, 64), np.random.default_rng(0))
    assert (classes[:32] == 0).all()
    assert (classes[32:] == UNLABELLED).all()
    assert (pixels[:, 32:] == 0).all()
    assert (pixels[:, :32] > 2).all()


def test_a_very_long_image_is_made_smaller():
    image = Image.new("RGB", (400, 10))
    recipe = SceneRecipe(smallest=1, largest=1, flip=0, distortion=False)
    known = np.zeros((10, 400), np.uint8)
    # 256 by 6: four times the shorter side is the most that the longer one may have.
    _, classes = augment_scene(image, known, recipe, (64, 64), np.random.default_rng(0))
    assert (classes != UNLABELLED).sum() == 6 * 64


def test_crops_of_one_class_are_avoided():
    classes = np.zeros((64, 240), np.uint8)
    classes[:, 200:] = 1
    image, mixed = Image.new("RGB", (240, 64)), []
    for uniform in (0.75, 1.0):
        recipe = SceneRecipe(smallest=1, largest=1, uniform=uniform, distortion=False)
        draws = [np.random.default_rng(seed) for seed in range(20)]
        crops = [augment_scene(image, classes, recipe, (64, 64), rng)[1] for rng in draws]
        mixed.append(sum(0.25 < (crop == 1).mean() < 0.75 for crop in crops))
    assert mixed[0] > 10 > mixed[1]


def test_colours_are_distorted_within_their_range():
    make = np.random.default_rng(0)
    pixels = make.integers(0, 256, (12, 10, 3), dtype=np.uint8)
    found = [distort(pixels, np.random.default_rng(seed)) for seed in range(16)]
    assert all(x.shape == pixels.shape and x.dtype == np.uint8 for x in found)
    assert len({x.tobytes() for x in found}) > 12
    grey = np.full((4, 4, 3), 90, np.uint8)
    for seed in range(16):
        changed = distort(grey, np.random.default_rng(seed))
        # Grey has neither hue nor saturation.
        assert (changed == changed[..., :1]).all()


def _lesson(data, **numbers):
    recipe = SceneRecipe.published(NAME, {**RECIPE, **numbers})
    return Scenes(recipe, open_scenes(data, "training"), (64, 64), CLASSES, None)


def _model():
    options = {**OPTIONS, "taps": (1, 2, 3, 4)}
    return vssm.create_model(NAME, num_classes=CLASSES, **options)


def _batch(lesson):
    pixels, classes = lesson.loader()([lesson.example(i, 0, i) for i in range(4)])
    return lesson.mixed(torch.from_numpy(pixels), torch.from_numpy(classes), 0, 0)


def test_the_loss_is_the_mean_over_all_pixels(data):
    lesson, model = _lesson(data, dropout=0.0), _model()
    images, goals = _batch(lesson)
    found = model.forward_details(images)
    auxiliary = model.auxiliary_head(found.tensors["neck2"])
    want = 0.0
    for logits, weight in ((found.logits, 1.0), (auxiliary, 0.4)):
        large = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear")
        each = torch.nn.functional.cross_entropy(large, goals, ignore_index=255, reduction="none")
        want += weight * each.mean((1, 2)).sum()
    assert lesson.loss(model, (images, goals), None).item() == pytest.approx(want.item(), rel=1e-5)


def test_batch_norms_take_the_batch_in_training_alone():
    layer = ConvNorm(3, 5, 1)
    x = torch.randn(4, 3, 6, 6) * 3 + 1
    assert not torch.allclose(layer(x).mean(), layer.eval()(x).mean(), rtol=0.1)
    layer.train()
    y = layer.bn(layer.conv(x))
    assert torch.equal(layer(x), torch.relu(y))
    for _ in range(200):
        layer(x)
    # With the statistics of this very batch both are the same, but for the sample's variance.
    torch.testing.assert_close(layer.eval()(x), torch.relu(y), rtol=0.02, atol=0.02)


def test_processes_average_what_batch_norms_have_seen(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    # As if the other process had twice as much.
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: flat.mul_(3))
    mean, spread = torch.tensor([2.0, 4.0]), torch.tensor([6.0])
    Group("cpu").average([mean, spread])
    assert (mean.tolist(), spread.tolist()) == ([3.0, 6.0], [9.0])
    Group("cpu").average([])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of four steps that nothing stopped."""
    output = tmp_path_factory.mktemp("whole")
    report = vssm.finetune(_request(data, output))
    return output, report


def test_a_step_moves_each_layer_by_its_own_rate(data, tmp_path):
    numbers = {"iterations": 1, "lr": 1e-3, "weight_decay": 0.0, "layer_decay": 0.5}
    vssm.finetune(_request(data, tmp_path / "out", **numbers))
    before = _model().state_dict()
    after = load_file(tmp_path / "out" / "finetuned.safetensors")
    for key, rate in (
        ("decode_head.conv_seg.weight", 1e-3),
        ("auxiliary_head.conv_seg.weight", 1e-3),
        ("backbone.layers.3.mixer.in_proj.weight", 5e-4),
        ("backbone.layers.0.mixer.in_proj.weight", 1e-3 / 16),
    ):
        # AdamW's first step is the rate itself, where there is a gradient.
        moved = (after[key] - before[key]).abs().max().item()
        assert moved == pytest.approx(rate, rel=0.02)
    assert not torch.equal(
        after["decode_head.bottleneck.bn.running_mean"],
        before["decode_head.bottleneck.bn.running_mean"],
    )


def test_what_a_run_leaves(whole):
    output, report = whole
    assert report.trained.steps == 4
    assert report.trained.images == SCENES
    assert report.run["classes"] == "numbers from 1 on in annotations/training, 0 for none"
    assert report.classes == ()
    weights, average = (load_file(output / f"finetuned{x}.safetensors") for x in ("", "_ema"))
    # No average by default, so both are the same.
    assert all(torch.equal(weights[key], average[key]) for key in weights)
    with (output / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == pytest.approx([3e-3, 2.25e-3, 1.5e-3, 0.75e-3])
    # Two steps an epoch: eight scenes by four.
    assert [row["epoch"] for row in rows] == ["1", "1", "2", "2"]
    model = _model()
    vssm.load_checkpoint(model, output / "finetuned.safetensors")


def test_a_stopped_run_ends_alike(data, whole, tmp_path):
    def stop(phase, done, total, note=""):
        if (done, total) == (3, 4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vssm.finetune(_request(data, tmp_path), progress=stop)
    report = vssm.finetune(_request(data, tmp_path, resume=True))
    assert report.trained.resumed == 3
    for name in ("finetuned.safetensors", "finetuned_ema.safetensors", "log.csv"):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes(), name


def test_a_pruned_segmenter_learns(data, tmp_path):
    numbers = {"iterations": 24, "lr": 1e-2, "layer_decay": 1.0, "dropout": 0.0}
    asked = _request(data, tmp_path, schedule="2:0.75", resources={"save_every": 100}, **numbers)
    report = vssm.finetune(asked)
    with (tmp_path / "log.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert report.trained.loss < 0.6 * losses[0]


def test_a_checkpoint_of_another_class_count(whole, tmp_path):
    model = vssm.create_model(NAME, num_classes=5, **OPTIONS)
    file = whole[0] / "finetuned.safetensors"
    with pytest.raises(vssm.errors.CheckpointError, match="--new-head"):
        vssm.load_checkpoint(model, file)
    own = model.decode_head.conv_seg.weight.clone()
    vssm.load_checkpoint(model, file, new_head=True)
    assert torch.equal(model.decode_head.conv_seg.weight, own)
    weights = load_file(file)
    key = "decode_head.bottleneck.conv.weight"
    assert torch.equal(model.state_dict()[key], weights[key])


def test_a_run_begins_with_a_classifier(data, tmp_path, cli: Run):
    sizes = {key: OPTIONS[key] for key in ("depth", "d_model", "d_state")}
    classifier = vssm.create_model("vim_tiny", image_size=48, num_classes=5, **sizes)
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    call = [*COMMAND, "--data", data, "-o", tmp_path / "out", "--batch", 2, "--backbone"]
    assert cli(*call) == 2
    assert "backbone=True without a checkpoint; give --checkpoint FILE" in cli.out
    assert cli(*call, "--checkpoint", tmp_path / "classifier.pth") == 0
    assert "not in a classifier, the model's own: backbone.fpn1, backbone.fpn2" in cli.out
    assert "ignored: cls_token, head.bias, head.weight" in cli.out
    report = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert report["run"]["backbone"] is True
    assert report["run"]["checkpoint"] == sha256_of(tmp_path / "classifier.pth")


def test_one_image_alone_is_refused(data, tmp_path):
    for numbers, passes in (({"batch": 1}, None), ({}, 1), ({}, 3)):
        asked = _request(data, tmp_path, resources={"micro_batch": passes}, **numbers)
        with pytest.raises(ValueError, match="leaves one image alone"):
            vssm.finetune(asked)


def test_requests_that_do_not_fit(tmp_path):
    segmenter, classifier = ModelSource(NAME), ModelSource("vim_tiny")
    recipe = SceneRecipe()
    with pytest.raises(TypeError, match=r"give SceneRecipe.published\('vim_tiny_upernet"):
        FinetuneRequest(segmenter, tmp_path, tmp_path)
    with pytest.raises(TypeError, match="gives an image one class; give a Recipe"):
        FinetuneRequest(classifier, tmp_path, tmp_path, recipe)
    with pytest.raises(ValueError, match="annotations have numbers, and no folders"):
        FinetuneRequest(segmenter, tmp_path, tmp_path, recipe, "text")
    with pytest.raises(ValueError, match="a classifier's folder has none"):
        FinetuneRequest(classifier, tmp_path, tmp_path, Recipe(), split="training")
    fused = ModelSource(NAME, schedule="2:0.8", tokens="fused")
    with pytest.raises(ValueError, match="a dense head needs what stands at pruned positions"):
        FinetuneRequest(fused, tmp_path, tmp_path, recipe)


COMMAND = [
    *("finetune", NAME, f"--num-classes={CLASSES}"),
    *(f"--set={key}={value}" for key, value in OPTIONS.items()),
    *("--recipe", "iterations=1", "--workers", "0", "--threads", "1"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--epochs", 3), "a segmenter's run is counted in steps; give --recipe iterations=N"),
        (("--split", "validation"), "validation is not a folder, and"),
        (("--batch", 9), "batch=9 is more than the 8 images"),
        (("--recipe", "mixup=1"), "recipe='mixup'"),
    ],
)
def test_wrong_options_end_with_2(data, tmp_path, cli: Run, options, message):
    assert cli(*COMMAND, "--data", data, "-o", tmp_path / "out", *options) == 2
    assert message in cli.out


def test_an_annotation_out_of_range_ends_with_2(data, tmp_path, cli: Run):
    root = tmp_path / "data"
    for file in data.rglob("*.png"):
        place = root / file.relative_to(data)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
        if "annotations" in file.parts:
            Image.fromarray(np.full((70, 80), CLASSES + 1, np.uint8)).save(place)
    assert cli(*COMMAND, "--data", root, "-o", tmp_path / "out", "--batch", 4) == 2
    assert "has the value 4 in row 0, column 0, but the model has the classes 1 to 3" in cli.out
