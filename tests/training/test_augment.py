"""The recipe's numbers, RandAugment's policy, crops, erasing and mixing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from vssm import Recipe
from vssm.artifact.manifest import IMAGENET_MEAN, IMAGENET_STD
from vssm.training import augment
from vssm.training.augment import OPERATIONS, rand_augment
from vssm.training.mix import loss_of, mix
from vssm.training.recipe import Draw

SIZE = (24, 20)


def _rng(seed=0):
    return np.random.default_rng(seed)


def _image():
    return Image.fromarray(_rng().integers(40, 200, (40, 50, 3), dtype=np.uint8))


def test_the_published_learning_rates():
    recipe = Recipe()
    found = [recipe.learning_rate(epoch) for epoch in range(30)]
    assert found[:6] == pytest.approx(
        [1e-5, 9e-6, 8e-6, 7e-6, 6e-6, 1e-5 - 2.5e-6 * (1 + math.cos(math.pi / 6))]
    )
    assert found[15] == pytest.approx(7.5e-6)
    assert found[5:] == sorted(found[5:])
    assert found[29] < 1e-5


def test_an_epoch_repeats_images_in_a_row():
    recipe = Recipe(batch=12, repeats=3, seed=5)
    order = recipe.order(2, 50)
    assert order.shape == (4, 12)
    assert np.array_equal(order.reshape(-1, 3)[:, :1].repeat(3, 1), order.reshape(-1, 3))
    assert len(set(order.ravel())) == 16
    assert not np.array_equal(order, recipe.order(3, 50))
    assert np.array_equal(order, recipe.order(2, 50))
    once = Recipe(batch=10, repeats=1).order(0, 50)
    assert sorted(once.ravel()) == list(range(50))


def test_streams_of_random_numbers_differ():
    recipe = Recipe()
    places = [(Draw.ORDER, 0), (Draw.IMAGE, 0, 1), (Draw.IMAGE, 1, 0), (Draw.MIX, 0, 1)]
    drawn = {recipe.generator(*place).integers(1 << 60) for place in places}
    drawn |= {Recipe(seed=1).generator(*place).integers(1 << 60) for place in places}
    assert len(drawn) == 8


def test_recipes_are_checked():
    wrong = {
        "epochs": 0,
        "batch": 0,
        "repeats": 0,
        "lr": math.nan,
        "min_lr": math.inf,
        "warm_up_lr": -1.0,
        "warm_up_epochs": -1,
        "weight_decay": -1.0,
        "seed": -1,
        "mixup": -1.0,
        "cutmix": -1.0,
        "color_jitter": -1.0,
        "smoothing": 1.5,
        "erasing": 1.5,
        "crop": 0.0,
        "flip": 1.5,
        "distil": 1.5,
        "ema": -0.5,
        "temperature": 0.0,
    }
    assert {f.name for f in fields(Recipe)} - {*wrong} == {"rand_augment"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"{name}={value} must be"):
            Recipe(**{name: value})
    with pytest.raises(ValueError, match="batch=3 is odd, but mixup and cutmix pair"):
        Recipe(batch=3)
    with pytest.raises(ValueError, match="recipe='rate' is not one of batch, seed, epochs"):
        Recipe.of({"rate": 1})
    for value in (1.5, True, "4"):
        with pytest.raises(TypeError, match=r"epochs=.* is not of type int"):
            Recipe.of({"epochs": value})
    assert isinstance(Recipe.of({"mixup": 1}).mixup, float)
    with pytest.raises(ValueError, match=r"lr=1000.* must be 0 or more"):
        Recipe(lr=10**400)  # no float holds it
    with pytest.raises(ValueError, match="batch=512 is more than the 42 images"):
        Recipe().steps(42)


def test_the_policy_has_its_operations_in_its_shares():
    """Two of 15 with replacement, each applied half of the time, at magnitudes of N(9, 0.5)."""
    seen: Counter[str] = Counter()
    levels: list[float] = []

    def spy(name):
        def operation(image, level, rng):
            seen[name] += 1
            levels.append(level)
            return image

        return operation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "OPERATIONS", {name: spy(name) for name in OPERATIONS})
        rng, image, draws = _rng(), _image(), 6000
        for _ in range(draws):
            rand_augment(image, rng)
    assert set(seen) == set(OPERATIONS)
    assert len(OPERATIONS) == 15
    assert sum(seen.values()) == pytest.approx(draws, rel=0.05)
    assert max(seen.values()) < 1.3 * min(seen.values())
    assert np.mean(levels) == pytest.approx(0.9, abs=0.005)
    assert np.std(levels) == pytest.approx(0.05, abs=0.005)
    assert max(levels) == 1.0


@pytest.mark.parametrize("level", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_size_and_mode(name, level):
    image = _image()
    result = OPERATIONS[name](image, level, _rng())
    assert (result.size, result.mode) == (image.size, "RGB")
    if level == 0.9:
        assert result.tobytes() != image.tobytes()


def test_operations_at_known_values():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    values = np.arange(256)

    def of(name, level):
        return np.asarray(OPERATIONS[name](ramp, level, _rng()))[..., 0].ravel()

    assert np.array_equal(of("invert", 0.5), 255 - values)
    assert np.array_equal(of("posterize", 0.0), values & 0xF0)  # 4 bits
    assert np.array_equal(of("posterize", 0.9), values & 0x80)  # 4 - int(3.6) = 1
    assert np.array_equal(of("posterize", 1.0), values * 0)
    limit = 256 - int(0.9 * 256)
    assert np.array_equal(of("solarize", 0.9), np.where(values < limit, values, 255 - values))
    assert np.array_equal(of("solarize_add", 0.9), np.where(values < 128, values + 99, values))


def test_translation_moves_by_its_share_of_the_image():
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 50] = 255
    columns = set()
    for seed in range(6):
        moved = OPERATIONS["translate_x"](Image.fromarray(pixels), 0.4 / 0.45, _rng(seed))
        columns.add(int(np.asarray(moved)[20, :, 0].argmax()))
    assert columns == {10, 90}


def test_augmentation_is_a_function_of_its_generator(tmp_path):
    _image().save(tmp_path / "a.png")
    recipe = Recipe(erasing=0.5)
    examples = [augment.Example(str(tmp_path / "a.png"), 0, place) for place in range(8)]
    batch = augment.load_batch(examples, recipe=recipe, size=SIZE)
    assert (batch.shape, batch.dtype) == ((8, 3, *SIZE), np.float32)
    assert np.array_equal(batch[2:5], augment.load_batch(examples[2:5], recipe=recipe, size=SIZE))
    assert len({image.tobytes() for image in batch}) == 8


def test_what_is_off_is_off():
    recipe = Recipe(rand_augment=False, color_jitter=0, erasing=0)
    grey = Image.new("RGB", (30, 30), (124, 60, 200))
    found = augment.augment(grey, recipe, SIZE, _rng())
    for channel, value in enumerate((124, 60, 200)):
        expected = (value / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        np.testing.assert_allclose(found[channel], expected, rtol=1e-5, atol=1e-6)
    jittered = augment.augment(grey, Recipe(rand_augment=False, erasing=0), SIZE, _rng())
    assert np.ptp(jittered[0]) == 0
    assert np.abs(jittered - found).max() > 0.1


def test_crop_and_flip_are_the_recipes():
    """Without either an image comes through whole, but for the shape that a crop draws."""
    left_to_right = np.tile(np.linspace(0, 255, 40, dtype=np.uint8)[None, :, None], (40, 1, 3))
    image = Image.fromarray(left_to_right)
    plain = {"rand_augment": False, "color_jitter": 0, "erasing": 0}
    rng = _rng()
    for flip in (0, 1):
        recipe = Recipe(**plain, crop=0.9, flip=flip)
        found = augment.augment(image, recipe, SIZE, rng)
        slope = found[0, :, -1] - found[0, :, 0]
        assert (slope * (1 - 2 * flip) > 2).all()
    narrow = augment.augment(image, Recipe(**plain, crop=0.01, flip=0), SIZE, _rng(3))
    assert np.ptp(narrow[0]) < np.ptp(found[0])


def test_crops_have_the_areas_and_shapes_of_the_recipe():
    rng, areas, ratios = _rng(), [], []
    for _ in range(2000):
        left, top, width, height = augment._rectangle(500, 400, rng, 0.08)
        assert 0 <= left <= 500 - width
        assert 0 <= top <= 400 - height
        areas.append(width * height / 200_000)
        ratios.append(width / height)
    assert 0.075 < min(areas) < 0.1
    assert 0.9 < max(areas) <= 1
    assert 0.74 < min(ratios) < 0.76
    assert 1.32 < max(ratios) < 1.35
    for width, height in ((1000, 10), (10, 1000), (1, 1)):  # no drawn shape fits these often
        left, top, w, h = augment._rectangle(width, height, rng, 0.08)
        assert 0 < w <= width
        assert 0 < h <= height


def test_erasing_puts_noise_into_one_rectangle():
    shares = []
    for seed in range(200):
        pixels = np.full((3, 60, 80), 7, np.float32)
        augment.erase(pixels, _rng(seed))
        gone = (pixels != 7).all(0)
        rows, columns = np.flatnonzero(gone.any(1)), np.flatnonzero(gone.any(0))
        assert gone.sum() == len(rows) * len(columns)
        assert abs(pixels[:, gone].mean()) < 0.5
        shares.append(gone.mean())
    assert 0.015 < min(shares) < 0.05
    assert 0.25 < max(shares) < 0.345


def _batch(size=8):
    images = torch.arange(size, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 30, 20)
    return images.clone(), torch.arange(size) % 5


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_are_mixed_as_the_images_are(kind):
    """Image i is i everywhere, so its mean says how much of which is in it."""
    off = {"mixup": "cutmix", "cutmix": "mixup"}[kind]
    shares = set()
    for seed in range(20):
        images, classes = _batch()
        recipe = Recipe(smoothing=0.0, **{off: 0.0})
        mixed, targets = mix(images, classes, 5, recipe, _rng(seed))
        torch.testing.assert_close(targets.sum(1), torch.ones(8), rtol=1e-6, atol=1e-6)
        share = ((mixed[0].mean() - 7) / -7).item()  # of image 0, beside image 7
        hot = torch.nn.functional.one_hot(classes, 5).float()
        torch.testing.assert_close(
            targets, share * hot + (1 - share) * hot.flip(0), rtol=1e-5, atol=1e-5
        )
        if kind == "cutmix":
            assert set(mixed[1].unique().tolist()) <= {1.0, 6.0}
        shares.add(round(share, 3))
    assert len(shares) > 10
    assert torch.equal(images, _batch()[0])  # what came in stays


def test_nothing_mixed_is_label_smoothing():
    images, classes = _batch(5)
    recipe = Recipe(mixup=0, cutmix=0, smoothing=0.1)
    same, targets = mix(images, classes, 5, recipe, _rng())
    assert same is images
    logits = torch.randn(5, 5, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits, classes, label_smoothing=0.1)
    found = loss_of(logits, targets.double(), None, recipe) / 5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_distillation_is_the_divergence_from_the_teacher():
    logits, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    targets = torch.softmax(torch.randn(4, 5, dtype=torch.float64), 1)
    recipe = Recipe(distil=0.25, temperature=2.0)
    p, q = torch.softmax(teacher / 2, 1), torch.softmax(logits / 2, 1)
    hard = -(targets * torch.log_softmax(logits, 1)).sum()
    expected = 0.75 * hard + 0.25 * 4 * (p * (p / q).log()).sum()
    torch.testing.assert_close(
        loss_of(logits, targets, teacher, recipe), expected, rtol=1e-12, atol=0
    )
