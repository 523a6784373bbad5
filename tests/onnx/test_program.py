"""How single operators of torch are written, seen from ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional

from vssm.onnx import translate
from vssm.onnx.program import program_to_proto


class Gelu(torch.nn.Module):
    """A layer with gelu behind it, as in an MLP."""

    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.model = torch.nn.Linear(8, 16)
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.model(x), approximate=self.approximate)


@pytest.mark.parametrize(("approximate", "products"), [("none", 0), ("tanh", 4)])
def test_gelu(tmp_path: Path, approximate: str, products: int) -> None:
    """ONNX Runtime knows an exact gelu by the order of its nodes, and runs it as one operator."""
    module = Gelu(approximate).eval()
    x = torch.linspace(-9, 9, 2 * 5 * 8).reshape(2, 5, 8)
    proto = program_to_proto(
        torch.export.export(module, (x,)), 18, inputs=["x"], names=["y"], public=1, free={}
    )
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # a note that the optimised file is for this machine
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    (got,) = session.run(None, {"x": x.numpy()})
    want = module.double()(x.double()).detach().numpy()
    assert np.abs(got - want).max() <= 2e-6  # measured 8e-7 on values up to 7
    found = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    assert found["Gelu"] == (approximate == "none")
    assert found["Mul"] == products


class Mixed(torch.nn.Module):
    """Types that torch's operators promote: whole numbers, truth values and fractions."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = x.long()
        return x * 2 + whole, whole / 2, (x > 0) + whole, 1 - x, whole.sum(), (x > 0).sum(1)


def test_types_are_promoted_without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's pass runs every node again; here those alone whose operands it casts."""
    ran = []
    run_again = translate.type_promotion._TypePromotionInterpreter._run_node_and_set_meta

    def noting(self, node):
        ran.append(node.op)
        return run_again(self, node)

    program = torch.export.export(Mixed(), (torch.zeros(3, 4),))
    names = [f"y{i}" for i in range(6)]
    make = {"inputs": ["x"], "names": names, "public": 6, "free": {}}
    program_to_proto(
        torch.export.export(Gelu("none"), (torch.zeros(2, 8),)),
        18,
        **{**make, "names": ["y"], "public": 1},
    )
    # The table of translations is known by now.
    monkeypatch.setattr(translate._registration.ONNXRegistry, "from_torchlib", None)
    monkeypatch.setattr(
        translate.type_promotion._TypePromotionInterpreter, "_run_node_and_set_meta", noting
    )
    proto = program_to_proto(program, 18, **make)
    nodes = sum(node.op == "call_function" for node in program.graph.nodes)
    assert 0 < len(ran) < nodes
    x = torch.tensor([[-2.5, -1.0, 0.0, 3.75]] * 3)
    got = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x.numpy()})
    for name, found, want in zip(names, got, Mixed()(x), strict=True):
        assert found.dtype == want.numpy().dtype, name
        np.testing.assert_array_equal(found, want.numpy(), err_msg=name)
