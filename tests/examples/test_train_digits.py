"""The digits example trains, and its committed checkpoint is as good as its README says."""

from __future__ import annotations

import csv
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from checkout import ROOT
from safetensors.torch import load_file

from vssm.artifact.manifest import Preprocessing
from vssm.artifact.preprocessing import preprocess

EXAMPLES = ROOT / "examples"
# How many of the 450 held-out images may come out differently than stated: near-ties can fall the
# other way on a machine whose sums round differently.
SLACK = 2


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("digits")


@pytest.fixture
def train_digits(digits: ModuleType) -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("train_digits")
    torch.set_num_threads(threads)


def test_quick_run_lowers_the_loss_and_loads_strictly(
    train_digits: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "weights.safetensors"
    assert train_digits.main(["--quick", "--output", str(path)]) == 0
    printed = re.search(r"^loss (\S+) -> (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert printed is not None
    assert float(printed[2]) < 0.9 * float(printed[1])
    weights = load_file(path)
    train_digits.create().load_state_dict(weights, strict=True)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_training_is_deterministic(train_digits: ModuleType, digits: ModuleType) -> None:
    split = digits.load_digits_split()
    data = train_digits.Data.of(split.train_images[:40], split.train_labels[:40])
    (one, losses), (two, again) = (train_digits.train(data, epochs=2, seed=7) for _ in range(2))
    assert losses == again
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key


def test_epochs_below_one_are_refused(
    train_digits: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        train_digits.main(["--epochs", "0"])
    assert refused.value.code == 2
    assert "--epochs=0 is below 1" in capsys.readouterr().err


def test_committed_checkpoint_reaches_its_stated_accuracy(
    train_digits: ModuleType, digits: ModuleType
) -> None:
    assert digits.CHECKPOINT.stat().st_size < 2_000_000
    split = digits.load_digits_split()
    data = train_digits.Data.of(split.test_images, split.test_labels)
    found = train_digits.accuracies(load_file(digits.CHECKPOINT), data)
    rows = re.findall(
        r"^\| ([a-z, ]+?) \| (\d+) of 450 ", (EXAMPLES / "README.md").read_text(), re.M
    )
    assert {name for name, _ in rows} == set(found)
    for name, right in rows:
        assert abs(found[name] * len(data) - int(right)) <= SLACK, name


def test_split_holds_out_every_digit_in_proportion(digits: ModuleType) -> None:
    split = digits.load_digits_split()
    assert split.train_images.shape == (1347, 32, 32, 3)
    assert split.test_images.shape == (450, 32, 32, 3)
    assert split.train_images.dtype == split.test_images.dtype == np.uint8
    shares = np.bincount(split.test_labels) / np.bincount(split.train_labels)
    np.testing.assert_allclose(shares, 450 / 1347, rtol=0.03)
    assert np.array_equal(split.test_images, digits.load_digits_split().test_images)


def test_written_files_are_the_held_out_images(digits: ModuleType, tmp_path: Path) -> None:
    """An export's own preprocessing turns the files into the model input that was measured."""
    written = digits.write_test_images(tmp_path / "images", 5)
    split = digits.load_digits_split()
    got = preprocess([path for path, _ in written], Preprocessing.for_image_size(32))
    assert np.array_equal(got, digits.normalise(split.test_images[:5]))
    assert [label for _, label in written] == split.test_labels[:5].tolist()
    with (tmp_path / "images" / "labels.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["file", "label"], *([path.name, str(label)] for path, label in written)]


@pytest.mark.parametrize("count", [0, 451])
def test_no_count_outside_the_held_out_images(
    digits: ModuleType, tmp_path: Path, count: int
) -> None:
    with pytest.raises(ValueError, match=f"count={count} is outside"):
        digits.write_test_images(tmp_path, count)


def test_augmentation_fills_with_black_and_keeps_still_what_it_does_not_move(
    train_digits: ModuleType, digits: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    black = torch.from_numpy(digits.normalise(np.zeros((2, 32, 32, 3), np.uint8)))
    torch.testing.assert_close(train_digits.augment(black, generator), black, rtol=0, atol=0)
    for name, value in {"_MAX_DEGREES": 0.0, "_MAX_SHIFT": 0.0, "_SCALES": (1.0, 1.0)}.items():
        monkeypatch.setattr(train_digits, name, value)
    image = torch.from_numpy(digits.normalise(digits.load_digits_split().test_images[:2]))
    torch.testing.assert_close(train_digits.augment(image, generator), image, rtol=1e-5, atol=1e-5)
