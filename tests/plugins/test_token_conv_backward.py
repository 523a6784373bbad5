"""Gradients of TokenConv: the formula in PyTorch and the native kernel, against the oracle's."""

from __future__ import annotations

import ctypes
import functools

import pytest
import torch
from backward_calls import largest_error
from cases import CONV_SIZES, conv_case, scan_reference_arguments
from cuda_device import CTensor, describe
from guarded import Memory
from native import found_library, isa_parameters
from tolerances import GRADIENT_TOLERANCE

import vssm
from vssm.errors import UnsupportedError
from vssm.native_library import load_library
from vssm.ops import operators as ops
from vssm.ops import reference
from vssm.ops.kernels import LIBRARY, _ConvAttributes
from vssm.ops.record import record_backends

FLAGS = [{"by_position": b, "activation": a} for b in (False, True) for a in (False, True)]
# The last ones have several units of channels.
SIZES = [
    *CONV_SIZES,
    {"seqlen": 20, "d_inner": 300, "width": 9, "kept": 0.9},
    {"seqlen": 9, "d_inner": 129, "width": 2, "directions": 1, "batch": 3},
]
NAMES = ("x", "weight", "bias")


@functools.lru_cache(maxsize=64)
def _expected(index, flags):
    """The case, a gradient by y, and the gradients by float64 autograd of the oracle."""
    case = conv_case(**SIZES[index], seed=index)
    exact = scan_reference_arguments(case)
    leaves = {n: exact[n].requires_grad_() for n in NAMES}
    y = reference.token_conv(**exact, **FLAGS[flags])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(index))
    found = torch.autograd.grad(y, list(leaves.values()), dy.double())
    return case, dy, dict(zip(NAMES, found, strict=True))


def _call(case, dy, *, threads=1, memories=None, **flags):
    """The C function: its message, and the gradients it wrote between untouched guards."""
    written = {n: Memory(torch.empty(case[n].shape), "cpu") for n in NAMES}
    given = [Memory.of(case[n].contiguous(), "cpu") for n in (*NAMES, "position")]
    upstream = Memory.of(dy.contiguous(), "cpu")
    results = [describe(m) for m in written.values()][:memories]
    error = ctypes.create_string_buffer(512)
    failed = load_library(found_library(LIBRARY)).vssm_token_conv_backward(
        b"TokenConv",
        (CTensor * 4)(*(describe(m) for m in given)),
        ctypes.c_int32(4),
        ctypes.byref(describe(upstream)),
        (CTensor * len(results))(*results),
        ctypes.c_int32(len(results)),
        ctypes.byref(_ConvAttributes(**{k: int(v) for k, v in flags.items()})),
        ctypes.c_int32(threads),
        error,
        ctypes.c_size_t(len(error)),
    )
    assert bool(failed) == bool(error.value)
    for name, memory in written.items() if not failed else ():
        memory.check(f"gradient of {name}")
    return error.value.decode(), {n: memory.tensor.clone() for n, memory in written.items()}


@pytest.mark.parametrize("flags", range(len(FLAGS)))
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_the_formula(index, flags):
    case, dy, expected = _expected(index, flags)
    exact = scan_reference_arguments(case)
    found = reference.token_conv_backward(dy.double(), **exact, **FLAGS[flags])
    assert largest_error(found, expected) <= 1e-12


@pytest.mark.parametrize("isa", isa_parameters())
@pytest.mark.parametrize("flags", range(len(FLAGS)))
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_the_kernel(index, flags, isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case, dy, expected = _expected(index, flags)
    message, found = _call(case, dy, **FLAGS[flags])
    assert message == ""
    assert largest_error(found, expected) <= GRADIENT_TOLERANCE[torch.float32]
    _, several = _call(case, dy, threads=3, **FLAGS[flags])
    assert all(torch.equal(several[n], found[n]) for n in NAMES)


def test_of_no_image():
    case = conv_case(batch=2) | {"x": torch.empty(0, 40, 16)}
    case["position"] = case["position"][:1]
    message, found = _call(case, torch.empty(0, 2, 40, 16))
    assert message == ""
    assert not found["weight"].any()
    assert not found["bias"].any()


def test_what_breaks_the_contract_is_refused():
    case = conv_case()
    dy = torch.zeros(1, 2, 40, 16)
    assert "gradient_count=2, but it must be 3" in _call(case, dy, memories=2)[0]
    assert "seqlen(dy)=39, but the other inputs have 40" in _call(case, dy[:, :, 1:])[0]
    assert "rank(dy)=3, but it must be 4" in _call(case, dy[0])[0]
    half = case | {"x": case["x"].half()}
    assert "type(x)=float16, but it must be float32" in _call(half, dy)[0]
    assert "threads=0 is below 1" in _call(case, dy, threads=0)[0]
    case["position"][0, 1] = case["position"][0, 0]
    assert "is not above" in _call(case, dy, by_position=1)[0]


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)
@pytest.mark.parametrize("by_position", [False, True])
def test_training_runs_on_the_kernel(dtype, by_position):
    case = conv_case(seqlen=30, d_inner=20, batch=2, dtype=dtype)
    leaves = {n: case[n].clone().requires_grad_() for n in NAMES}
    # As a part of in_proj's output lies: the gradient has its strides.
    wide = torch.cat([leaves["x"], leaves["x"]], -1)
    with record_backends() as ran:
        y = ops.token_conv(**(case | leaves | {"x": wide[..., :20]}), by_position=by_position)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        y.backward(dy)
    assert ran == {("TokenConv", "kernel"): 1, ("TokenConv backward", "kernel"): 1}
    exact = scan_reference_arguments(case)
    wanted = [exact[n].requires_grad_() for n in NAMES]
    oracle = reference.token_conv(**exact, by_position=by_position)
    expected = dict(zip(NAMES, torch.autograd.grad(oracle, wanted, dy.double()), strict=True))
    found = {n: leaves[n].grad for n in NAMES}
    assert all(g.dtype == case[n].dtype for n, g in found.items())
    assert largest_error(found, expected) <= GRADIENT_TOLERANCE[dtype]


def test_a_compiled_step_and_a_second_derivative():
    case = conv_case(seqlen=6, d_inner=5)
    leaves = {n: case[n].clone().requires_grad_() for n in NAMES}
    given = case | leaves
    step = torch.compile(lambda c: ops.token_conv(**c).square().sum(), backend="aot_eager")
    step(given).backward()
    exact = scan_reference_arguments(case)
    wanted = [exact[n].requires_grad_() for n in NAMES]
    expected = torch.autograd.grad(reference.token_conv(**exact).square().sum(), wanted)
    found = {n: leaves[n].grad for n in NAMES}
    assert largest_error(found, dict(zip(NAMES, expected, strict=True))) <= 6e-6
    (gradient,) = torch.autograd.grad(ops.token_conv(**given).sum(), leaves["x"], create_graph=True)
    with pytest.raises(UnsupportedError, match="gradient of TokenConv has no derivative of its"):
        gradient.sum().backward()


def test_a_models_step_is_the_kernels():
    model = vssm.create_model("vim_tiny", depth=1, d_model=16, image_size=32).train()
    with record_backends() as ran:
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert {backend for _, backend in ran} == {"kernel"}
