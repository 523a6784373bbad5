"""What TokenConv does that TokenConv2D does not."""

from __future__ import annotations

import pytest
import torch
from cases import conv_case, scan_reference_arguments
from cuda_device import DEVICES, HOST, OperatorError
from cuda_device import run_operator as run_through_c
from native import ONNX_TYPES, isa_parameters, make_session, output_types
from native import run_operator as run_in_onnxruntime
from tolerances import relative_error

from vssm.ops import operators as ops
from vssm.ops import reference

ISAS = isa_parameters()


def test_by_position_is_the_full_list_with_zeros():
    """What the operator is for: kept tokens as they would be among zeros, at their own cost."""
    case = conv_case(seqlen=30, kept=0.5)
    full = torch.zeros(1, int(case["position"].max()) + 1, 16)
    full[:, case["position"][0].long()] = case["x"]
    everywhere = torch.arange(full.shape[1], dtype=torch.int32)[None]
    want = ops.token_conv(full, case["weight"], case["bias"], everywhere)
    got = ops.token_conv(**case, by_position=True)
    assert torch.equal(got, want[:, :, case["position"][0].long()])


@pytest.mark.parametrize("isa", ISAS)
def test_silu_reaches_to_the_smallest_floats(isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    x = torch.linspace(-100, 100, 4001)[None, :, None]
    case = {"x": x, "weight": torch.ones(1, 1, 1), "bias": torch.zeros(1, 1)}
    case["position"] = torch.arange(4001, dtype=torch.int32)[None]
    want = torch.nn.functional.silu(x.double())[0, :, 0]
    got = run_in_onnxruntime("TokenConv", case)["y"].double().flatten()
    normal = want.abs() > 1.2e-38
    assert ((got - want).abs() / want.abs().clamp_min(1e-300))[normal].max() <= 6e-7
    assert (got - want)[~normal].abs().max() <= 1.2e-38


@pytest.mark.parametrize("values", [[3, 3, 4], [0, 2, 1], [2**31 - 1, -(2**31), 0]], ids=str)
def test_positions_that_do_not_ascend(values):
    """The CPU refuses them where they count; a GPU cannot look, but reads nothing else."""
    case = conv_case(seqlen=3)
    case["position"] = torch.tensor([values], dtype=torch.int32)
    with pytest.raises(Exception, match=r"position\[\d\]=-?\d+ is not above"):
        run_in_onnxruntime("TokenConv", case, by_position=1)
    with pytest.raises(ValueError, match="must ascend from token to token"):
        ops.token_conv(**case, by_position=True, backend="reference")
    by_list = run_in_onnxruntime("TokenConv", case)["y"]
    assert relative_error(by_list, reference.token_conv(**scan_reference_arguments(case))) < 6e-7
    assert run_through_c(DEVICES[0], "TokenConv", case, by_position=1)["y"].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3, 16, 4), "bias": torch.ones(3, 16)}, r"K=3 is outside \[1, 2\]"),
        ({"weight": torch.ones(2, 16, 33)}, r"width=33 is outside \[1, 32\]"),
        ({"weight": torch.ones(2, 15, 4)}, "d_inner"),
        ({"bias": torch.ones(1, 16)}, "K"),
        ({"position": torch.zeros(2, 40, dtype=torch.int32)}, "batch"),
        ({"position": torch.zeros(1, 41, dtype=torch.int32)}, "seqlen"),
    ],
)
def test_refuses_what_breaks_the_contract(change, message):
    case = conv_case(batch=3) | change
    with pytest.raises(OperatorError, match=message):
        run_through_c(HOST, "TokenConv", case | {"x": case["x"]})
    with pytest.raises(ValueError, match=message):
        ops.token_conv(**case, backend="reference")


def test_the_session_knows_the_shape():
    case = conv_case()
    types = {n: ONNX_TYPES[t.dtype] for n, t in case.items()}
    types |= {n: ONNX_TYPES[t] for n, t in output_types("TokenConv", case).items()}
    shapes = {"x": ["n", 197, 384], "weight": [2, 384, 4]}
    session = make_session("TokenConv", types, shapes=shapes)
    assert session.get_outputs()[0].shape == ["n", 2, 197, 384]
