"""Names in the export of a user's module: its own modules and parameters, after every pass."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from compat_cases import STYLES, built, exported_style
from graph_names import assert_readable, assert_true
from torch import Tensor, nn

import vssm
from vssm.compat import selective_scan_tokens
from vssm.errors import UnsupportedError


def _export(folder: Path, model: nn.Module, x: Tensor) -> onnx.ModelProto:
    artifact = vssm.export_module(model, x, folder, reference=False)
    return onnx.load(str(artifact.model_path))


@pytest.mark.parametrize("style", ["vim v2, two blocks", "slow path", "mambavision", "plain mamba"])
def test_names_are_those_of_the_module(tmp_path: Path, style: str) -> None:
    factory, shape = STYLES[style]
    model = built(factory)
    proto = onnx.load(str(exported_style(tmp_path, style).model_path))
    assert_readable(proto, model)
    assert_true(proto, model)
    if style == "slow path":
        again = _export(tmp_path / "again", model, torch.randn(shape))
        assert again.SerializeToString() == proto.SerializeToString()
    if style == "vim v2, two blocks":
        nodes = [node.name for node in proto.graph.node]
        assert [name for name in nodes if "Scan" in name] == [
            f"/layers.{i}/mixer/GatedSelectiveScan" for i in range(2)
        ]


class _Scan(nn.Module):
    """A scan whose parameters and submodules have names that are hard to write."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(6))  # as the output
        self.add = nn.Parameter(torch.randn(6))  # as what torch calls the sums
        self.shared = nn.Linear(6, 6)
        self.größe = nn.Linear(6, 6)
        self.add_module("a/b \x07", nn.Linear(6, 6))
        self.A = nn.Parameter(-torch.rand(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(x) + self.add) + self.logits
        x = getattr(self, "a/b \x07")(self.größe(x))
        B = x[..., :3]
        return selective_scan_tokens(x, x.exp(), self.A, B, B, self.add)


def test_names_that_are_hard_to_write(tmp_path: Path) -> None:
    graph = _export(tmp_path / "out", _Scan().eval(), torch.randn(2, 5, 6)).graph
    weights = {i.name for i in graph.initializer}
    assert {"add", "logits_1", "größe.weight.T", "a/b__.weight.T"} <= weights
    assert [o.name for o in graph.output] == ["logits"]
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert all(name.isprintable() and " " not in name for name in [*names, *weights])
    assert {"/shared/MatMul", "/shared/MatMul_1", "/größe/MatMul", "/a_b__/MatMul"} <= set(names)


@pytest.mark.parametrize("letter", ['"', "\n", "\r", "\0"])
def test_names_that_torch_cannot_write_are_refused(tmp_path: Path, letter: str) -> None:
    model = _Scan().eval()
    model.shared.add_module(f"a{letter}b", nn.Linear(6, 6))
    with pytest.raises(UnsupportedError, match="of a module or weight holds a quote or"):
        _export(tmp_path / "out", model, torch.randn(2, 5, 6))
