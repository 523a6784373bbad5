"""What model.json says of a model, and the weights that no export is made of."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from exports import exported, micro

import vssm
from vssm.models.base import VisionModel
from vssm.onnx.describe import NodeCount, count_by_module


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


def test_blocks_are_entries_that_hold_mixers(tmp_path: Path) -> None:
    """One called twice, two in one entry of a sequence, one in a list in a list, and one alone."""
    mixers = ["encoder4.0/mamba", "encoder4.0/mamba", "stages.1/blocks.0/a", "stages.1/blocks.0/b"]
    names = [f"/{mixer}/SelectiveScan" for mixer in (*mixers, "stages.1/blocks.1", "mixer")]
    scans = [
        onnx.helper.make_node("SelectiveScan", [], [], name=name, domain="vssm") for name in names
    ]
    others = [onnx.helper.make_node("Add", [], [], name="/stages.2/blocks.0/Add")]
    graph = onnx.helper.make_graph([*scans, *others], "named", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    found = count_by_module(tmp_path / "model.onnx")
    assert found == NodeCount(scans=6, mixers=5, blocks=4, nodes=7)
