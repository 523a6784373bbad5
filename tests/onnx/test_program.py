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
