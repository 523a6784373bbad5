"""What TokenConv2D does that TokenConv does not, and its gradients against the oracle."""

from __future__ import annotations

import functools

import pytest
import torch
from backward_calls import largest_error
from cases import GRID_SIZES, grid_case, scan_reference_arguments
from cuda_device import DEVICES, HOST, OperatorError
from cuda_device import run_operator as run_through_c
from native import ONNX_TYPES, isa_parameters, make_session, output_types
from native import run_operator as run_in_onnxruntime
from tolerances import GRADIENT_TOLERANCE, relative_error

import vssm
from vssm.ops import operators as ops
from vssm.ops import reference
from vssm.ops.kernels import run_backward
from vssm.ops.record import record_backends
from vssm.ops.spec import TOKEN_CONV2D

ISAS = isa_parameters()
NAMES = ("x", "weight", "bias")


@pytest.mark.parametrize("kept", [54, 30])
def test_it_is_conv2d_among_zeros(kept):
    """The oracle too, and no other image's tokens."""
    case, _ = grid_case(grid=(6, 9), seqlen=kept, side=5, batch=2)
    maps = torch.zeros(2, 16, 6 * 9)
    places = case["position"].long()[:, None].expand(-1, 16, -1)
    maps = maps.scatter(2, places, case["x"].transpose(1, 2)).unflatten(2, (6, 9))
    conv = torch.nn.functional.conv2d(
        maps, case["weight"][:, None], case["bias"], padding=2, groups=16
    )
    want = conv.flatten(2).gather(2, places).transpose(1, 2)
    for backend in ("kernel", "reference"):
        y = ops.token_conv2d(
            **case, grid=(6, 9), by_position=kept < 54, activation=False, backend=backend
        )
        assert relative_error(y, want) < 6e-7


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([3, 3, 4], r"position\[1\]=3 is not above 3"),
        ([0, 2, 1], r"position\[2\]=1 is not above 2"),
        ([-1, 2, 3], r"position\[0\]=-1 is outside \[0, 12\)"),
        ([0, 2, 12], r"position\[2\]=12 is outside \[0, 12\)"),
        ([2**31 - 1, -(2**31), 0], r"position\[0\]=2147483647 is outside"),
    ],
    ids=str,
)
def test_bad_positions(values, message):
    """The CPU refuses them; a GPU cannot look, but reads nothing else."""
    case, attributes = grid_case(grid=(3, 4), seqlen=3)
    case["position"] = torch.tensor([values], dtype=torch.int32)
    with pytest.raises(Exception, match=message):
        run_in_onnxruntime("TokenConv2D", case, **attributes)
    with pytest.raises(ValueError, match=r"must ascend from token to token|the places of the grid"):
        ops.token_conv2d(**case, grid=(3, 4), by_position=True, backend="reference")
    assert run_through_c(DEVICES[0], "TokenConv2D", case, **attributes)["y"].isfinite().all()


@pytest.mark.parametrize(
    ("change", "attributes", "message"),
    [
        ({"weight": torch.ones(16, 4, 4)}, {}, "side=4 is even"),
        ({"weight": torch.ones(16, 9, 9)}, {}, r"side=9 is outside \[1, 7\]"),
        ({"weight": torch.ones(16, 3, 5)}, {}, "side"),
        ({"weight": torch.ones(15, 3, 3)}, {}, "d_inner"),
        ({"bias": torch.ones(15)}, {}, "d_inner"),
        ({"bias": torch.ones(1, 16)}, {}, r"rank\(bias\)=2|another rank"),
        ({"position": torch.zeros(2, 9, dtype=torch.int32)}, {}, "batch"),
        ({}, {"group": 15}, r"group=15"),
        ({}, {"grid_width": 0}, "grid_width=0"),
        ({}, {"grid_height": 2**20, "grid_width": 2**20}, "grid_width=1048576|1099511627776"),
        ({}, {"grid_height": 1}, r"seqlen=9"),
        ({}, {"by_position": 0}, r"seqlen=9"),
    ],
)
def test_refuses_what_breaks_the_contract(change, attributes, message):
    case, good = grid_case(grid=(3, 4), seqlen=9, batch=3)
    case, attributes = case | change, good | attributes
    with pytest.raises(OperatorError, match=message):
        run_through_c(HOST, "TokenConv2D", case, **attributes)
    operands = [case[o.name] for o in TOKEN_CONV2D.inputs]
    chosen = [attributes.get(a.name, a.default) for a in TOKEN_CONV2D.attributes]
    with pytest.raises(ValueError, match=message):
        ops.torch_op(TOKEN_CONV2D, "reference")(*operands, *chosen)


def test_the_session_knows_the_shape():
    case, attributes = grid_case()
    types = {n: ONNX_TYPES[t.dtype] for n, t in case.items()}
    types |= {n: ONNX_TYPES[t] for n, t in output_types("TokenConv2D", case).items()}
    shapes = {"x": ["n", 42, 16], "weight": [16, 3, 3]}
    session = make_session("TokenConv2D", types, tuple(attributes.items()), shapes=shapes)
    assert session.get_outputs()[0].shape == ["n", 42, 16]


@functools.lru_cache(maxsize=16)
def _expected(index, activation):
    """The case, its attributes, a gradient by y, and those by float64 autograd of the oracle."""
    case, attributes = grid_case(**GRID_SIZES[index], seed=index)
    attributes = attributes | {"activation": activation}
    exact = scan_reference_arguments(case)
    leaves = {n: exact[n].requires_grad_() for n in NAMES}
    y = reference.token_conv2d(**exact, **attributes)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(index))
    found = torch.autograd.grad(y, list(leaves.values()), dy.double())
    return case, attributes, dy, dict(zip(NAMES, found, strict=True))


@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize("index", range(len(GRID_SIZES)))
def test_the_formula(index, activation):
    case, attributes, dy, expected = _expected(index, activation)
    exact = scan_reference_arguments(case)
    found = reference.token_conv2d_backward(dy.double(), **exact, **attributes)
    assert largest_error(found, expected) <= 1e-12


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize("index", range(len(GRID_SIZES)))
def test_the_gradients_kernel(index, activation, isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case, attributes, dy, expected = _expected(index, activation)
    found = dict(zip(NAMES, run_backward(TOKEN_CONV2D, case | attributes, dy), strict=True))
    assert largest_error(found, expected) <= GRADIENT_TOLERANCE[torch.float32]


def test_a_gradient_of_another_shape_is_refused():
    case, attributes, dy, _ = _expected(1, 1)
    with pytest.raises(ValueError, match=r"seqlen\(dy\)=8, but the other inputs have 9"):
        run_backward(TOKEN_CONV2D, case | attributes, dy[:, 1:])


def test_a_models_step_is_the_kernels():
    schedule = vssm.PruneSchedule({1: 0.5})
    model = vssm.create_model(
        "plain_mamba_l1", schedule=schedule, depth=2, d_model=16, image_size=48
    ).train()
    with record_backends() as ran:
        model(torch.randn(2, 3, 48, 48)).sum().backward()
    assert ran["TokenConv2D", "kernel"] == ran["TokenConv2D backward", "kernel"] == 3
    assert not any(run for name, run in ran if name.startswith("TokenConv2D") and run != "kernel")
