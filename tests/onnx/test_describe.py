"""What model.json says of a model, and the weights that no export is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exports import exported, micro

import vssm
from vssm.models.base import VisionModel


def spoilt(key: str, value: float) -> VisionModel:
    model = micro(None, depth=1)
    model.state_dict()[key].view(-1)[0] = value
    return model


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"NaN.* in layers\.0\.mixer\.D \(1 in all\)"):
            vssm.export(spoilt("layers.0.mixer.D", value), tmp_path / "out")
    large = spoilt("layers.0.mixer.in_proj.weight", 1e6)
    with pytest.raises(ValueError, match=r"beyond torch\.float16 in layers\.0\.mixer\.in_proj"):
        vssm.export(large, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    vssm.export(large, tmp_path / "out", dtype="bfloat16")


def test_weights_must_be_those_of_the_configuration(tmp_path: Path) -> None:
    replaced = micro()
    replaced.head = torch.nn.Linear(20, 3)
    with pytest.raises(
        ValueError, match=r"head\.bias has shape \(3,\), but .* \(7,\); .*num_class"
    ):
        vssm.export(replaced, tmp_path / "out")
    with torch.device("meta"):
        empty = vssm.create_model("vim_tiny", depth=1)
    with pytest.raises(ValueError, match=r"device meta, which holds no values"):
        vssm.export(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_weights_come_from_is_said(tmp_path: Path) -> None:
    seeded = vssm.create_model("vim_tiny", depth=1, d_model=16)
    assert vssm.export(seeded, tmp_path / "out").manifest.weights == "initial"
    with torch.no_grad():
        seeded.head.bias += 1
    assert vssm.export(seeded, tmp_path / "out", force=True).manifest.weights == "custom"


def test_ratios_are_plain_decimals(tmp_path: Path) -> None:
    schedule = exported(tmp_path, micro("1:0.80,2:0.0000001", depth=2)).manifest.schedule
    assert schedule is not None
    assert schedule.blocks == {1: "0.8", 2: "0.0000001"}
