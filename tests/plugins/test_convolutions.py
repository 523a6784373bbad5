"""Convolutions of tokens against the oracle: instruction sets, ONNX Runtime, C ABI, emulated CUDA.

What one of them alone does is in test_token_conv.py and test_token_conv2d.py.
"""

from __future__ import annotations

import pytest
import torch
from cases import CONV_SIZES, DTYPES, GRID_SIZES, conv_case, grid_case, scan_reference_arguments
from cuda_device import DEVICES, HOST
from cuda_device import run_operator as run_through_c
from native import isa_parameters
from native import run_operator as run_in_onnxruntime
from tolerances import HALF_FACTOR, SCAN_TOLERANCE, relative_error

from vssm.ops import operators as ops
from vssm.ops import reference

ISAS = isa_parameters()
LISTS = [*CONV_SIZES, {"seqlen": 20, "d_inner": 300, "width": 9, "kept": 0.9}]
ORACLES = {"TokenConv": reference.token_conv, "TokenConv2D": reference.token_conv2d}
CASES = [
    *(("TokenConv", index) for index in range(len(LISTS))),
    *(("TokenConv2D", index) for index in range(len(GRID_SIZES))),
]


def _check(run, name, index, dtype):
    """Compare y for each set of attributes; half types with PyTorch's own error as well."""
    if name == "TokenConv":
        case = conv_case(**LISTS[index], dtype=dtype, seed=index)
        flags = [{"by_position": b, "activation": a} for b in (0, 1) for a in (0, 1)]
    else:
        case, attributes = grid_case(**GRID_SIZES[index], dtype=dtype, seed=index)
        flags = [{**attributes, "activation": a} for a in (0, 1)]
    for given in flags:
        want = ORACLES[name](**scan_reference_arguments(case), **given)
        error = relative_error(run(name, case, **given)["y"], want)
        assert error <= SCAN_TOLERANCE[dtype], given
        if dtype != torch.float32:
            assert error <= HALF_FACTOR * relative_error(ORACLES[name](**case, **given), want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "index"), CASES)
def test_matches_the_oracle_in_onnxruntime(name, index, dtype, isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    _check(run_in_onnxruntime, name, index, dtype)


@pytest.mark.parametrize("backend", [HOST, *DEVICES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "index"), CASES)
def test_matches_the_oracle_through_the_c_abi(name, index, dtype, backend):
    for shift in (0, 1):  # rows that may, and that may not, be read four elements at a time

        def run(name, case, shift=shift, **given):
            return run_through_c(backend, name, case, shift=shift, **given)

        _check(run, name, index, dtype)


@pytest.mark.parametrize(
    ("run", "case"),
    [
        (ops.token_conv, conv_case(seqlen=70, d_inner=40, batch=3) | {"by_position": False}),
        (ops.token_conv, conv_case(seqlen=70, d_inner=40, batch=3) | {"by_position": True}),
        (
            ops.token_conv2d,
            grid_case(grid=(9, 11), seqlen=70, d_inner=40, batch=3)[0]
            | {"grid": (9, 11), "by_position": True},
        ),
    ],
    ids=["list", "positions", "grid"],
)
def test_a_torch_operator_runs_it_on_any_number_of_threads(run, case):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = run(**case, backend="kernel")
        torch.set_num_threads(1)
        alone = run(**case, backend="kernel")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(several, alone)
    tensors = scan_reference_arguments({k: v for k, v in case.items() if torch.is_tensor(v)})
    want = run(**case | tensors, backend="reference")
    assert relative_error(alone, want) < 6e-7


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ORACLES)
def test_passes_nan_and_infinity_on(name, isa, monkeypatch):
    """To the tokens whose taps reach them, and to no neighbour of these in a tile."""
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    if name == "TokenConv":
        case, attributes, infinite = conv_case(seqlen=12, d_inner=18), {}, 6
    else:
        case, attributes = grid_case(grid=(5, 9), seqlen=36, d_inner=18)
        infinite = 20
    case["x"][0, 5, 3] = float("nan")
    case["x"][0, infinite, 17], case["x"][0, 1, 0] = float("inf"), float("-inf")
    want = ORACLES[name](**case, **attributes)
    got = run_in_onnxruntime(name, case, **attributes)["y"]
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert want.isnan().any()
    assert want.isinf().any()
