"""Gradients of the scans: the formula by hand and the native kernel, against the oracle's."""

from __future__ import annotations

import functools

import pytest
import torch
from backward_calls import (
    backward,
    call_backward,
    exact_case,
    largest_error,
    oracle_gradients,
    upstream,
)
from cases import EXTRA, SCAN_SIZES, TOGETHER_SIZES, scan_case
from cuda_device import OperatorError, describe
from guarded import Memory
from native import isa_parameters
from tolerances import GRADIENT_TOLERANCE

from vssm.ops import reference
from vssm.ops.kernels import differentiable
from vssm.ops.reference import selective_scan_backward
from vssm.ops.spec import OPERATORS

ISAS = isa_parameters()
# Several groups of blocks of channels, the last ones smaller, and several chunks of 64 steps.
GROUP_SIZES = [
    {"seqlen": 65, "d_inner": 129, "d_state": 16, "batch": 2, "shared": "BC"},
    {"seqlen": 128, "d_inner": 300, "d_state": 1, "directions": 4, "shared": "u"},
    {"seqlen": 129, "d_inner": 270, "d_state": 3, "batch": 3, "per_image": True, "gap": "pairs"},
    {"seqlen": 5, "d_inner": 600, "d_state": 100, "directions": 1},
    {"seqlen": 65, "d_inner": 150, "d_state": 16, "batch": 2, "shared": "A", "decay": "channel"},
]
SHAPES = SCAN_SIZES + TOGETHER_SIZES + GROUP_SIZES
FLOAT32 = GRADIENT_TOLERANCE[torch.float32]


@functools.lru_cache(maxsize=256)
def _case(index, extra):
    return scan_case(**SHAPES[index], extra=extra, seed=index)


def _attributes(index):
    return {
        "params_by_step": index % 2 if index < len(SCAN_SIZES) else 1,
        "scale": 0.5 if index % 3 == 0 else 1.0,
    }


@functools.lru_cache(maxsize=256)
def _expected(index, extra):
    case = _case(index, extra)
    return oracle_gradients(case, upstream(case), **_attributes(index))


def _by_hand(case, dy, **attributes):
    exact = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
    return selective_scan_backward(dy.double(), **exact, **attributes)


@pytest.mark.parametrize("extra", EXTRA.values())
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_formula_is_the_autograd_of_the_oracle(index, extra):
    case = _case(index, extra)
    found = _by_hand(case, upstream(case), **_attributes(index))
    assert largest_error(found, _expected(index, extra)) <= 1e-12


class _ByHand(torch.autograd.Function):
    """The oracle with the gradients by hand, for gradcheck."""

    @staticmethod
    def forward(ctx, names, tables, attributes, *leaves):
        ctx.names, ctx.tables, ctx.attributes = names, tables, attributes
        ctx.save_for_backward(*leaves)
        return reference.selective_scan(
            **dict(zip(names, leaves, strict=True)), **tables, **attributes
        )

    @staticmethod
    def backward(ctx, dy):
        leaves = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        found = selective_scan_backward(dy, **leaves, **ctx.tables, **ctx.attributes)
        return (None, None, None, *(found[n] for n in ctx.names))


@pytest.mark.parametrize("flags", [(True, False), (False, True)])
@pytest.mark.parametrize("shared", ["", "dC", "udABCD"])
@pytest.mark.parametrize("name", EXTRA)
def test_gradcheck_of_the_formula(name, shared, flags):
    case = exact_case(
        name,
        seqlen=4,
        d_inner=2,
        d_state=2,
        batch=2,
        shared=shared,
        gap="pairs",
        per_image=True,
    )
    tables = {n: case.pop(n) for n in ("order", "gap")}
    attributes = {"delta_softplus": flags[0], "params_by_step": flags[1], "scale": 0.5}
    leaves = [t.requires_grad_() for t in case.values()]

    def run(*leaves):
        return _ByHand.apply(tuple(case), tables, attributes, *leaves)

    assert torch.autograd.gradcheck(run, leaves, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_kernel_matches_oracle(index, name, isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case = _case(index, EXTRA[name])
    found = backward(name, case, upstream(case), **_attributes(index))
    assert largest_error(found, _expected(index, EXTRA[name])) <= FLOAT32


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", EXTRA)
def test_kernel_without_softplus_and_with_growing_states(name, isa, monkeypatch):
    """Negative steps and positive A: arguments that the fast exp2 does not take."""
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case = scan_case(seqlen=70, d_inner=20, extra=EXTRA[name], gap="ones")
    case["delta"], case["delta_bias"] = case["delta"] * 0.01, case["delta_bias"] * 0
    case["A"][:, ::3] *= -1
    expected = oracle_gradients(case, upstream(case), delta_softplus=False)
    found = backward(name, case, upstream(case), delta_softplus=0)
    assert largest_error(found, expected) <= FLOAT32


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spike", [30.0, 1e3, 1e6])
def test_kernel_survives_spikes_of_delta(spike, isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case = scan_case(seqlen=100, d_inner=20, extra="z")
    case["delta"][:, ::7] += spike
    case["z"][:, ::5] *= 100
    expected = oracle_gradients(case, upstream(case))
    found = backward("GatedSelectiveScan", case, upstream(case))
    assert largest_error(found, expected) <= FLOAT32


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("where", ["u", "delta", "B", "C", "A", "delta_bias", "dy"])
def test_kernel_passes_nan_on(where, isa, monkeypatch):
    """Where the oracle has a NaN there is one: training must not go on as if nothing were wrong."""
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case = scan_case(seqlen=20, d_inner=18, directions=1, order="ends")
    dy = upstream(case)
    (dy if where == "dy" else case[where]).view(-1)[-1] = float("nan")
    expected = oracle_gradients(case, dy)
    found = backward("SelectiveScan", case, dy)
    assert any(g.isnan().any() for g in expected.values())
    for name, wanted in expected.items():
        assert found[name].isnan()[wanted.isnan()].all(), name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", EXTRA)
def test_threads_do_not_change_a_bit(name, isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    case = scan_case(seqlen=70, d_inner=300, batch=3, shared="BA", extra=EXTRA[name])
    one = backward(name, case, upstream(case))
    for threads in (2, 3, 8, 200):
        many = backward(name, case, upstream(case), threads=threads)
        assert all(torch.equal(one[n], many[n]) for n in one)


def test_a_batch_of_none_has_no_gradients():
    case = scan_case(seqlen=5, d_inner=3, batch=0)
    found = backward("SelectiveScan", case, upstream(case))
    assert all(bool((g == 0).all()) for g in found.values())


def _described(case):
    op = OPERATORS["SelectiveScan"]
    inputs = [Memory.of(case[o.name], "cpu") for o in op.inputs]
    results = [Memory(case[n], "cpu") for n in differentiable(op)]
    return inputs, Memory.of(upstream(case), "cpu"), results


def _refusal(inputs, dy, results, **options):
    described = [[describe(m) for m in memories] for memories in (inputs, results)]
    with pytest.raises(OperatorError) as raised:
        call_backward("SelectiveScan", described[0], dy and describe(dy), described[1], **options)
    return str(raised.value)


def test_refusals():
    case = scan_case(seqlen=5, d_inner=3)
    inputs, dy, results = _described(case)
    assert "threads=0 is below 1" in _refusal(inputs, dy, results, threads=0)
    assert "dy is missing" in _refusal(inputs, None, results)
    assert "gradient_count=6, but it must be 7" in _refusal(inputs, dy, results[:-1])
    assert "input_count=8, but it must be 9" in _refusal(inputs[:-1], dy, results)
    wrong = Memory.of(upstream(case)[:, :4].contiguous(), "cpu")
    assert "is not float32 (batch, seqlen, d_inner)=(1, 5, 3)" in _refusal(inputs, wrong, results)
    swapped = [*results[:4], results[2], *results[5:]]
    assert "result for C has another type or shape than C" in _refusal(inputs, dy, swapped)
    case["order"][0, 1, 2] = 5
    assert "is outside [0, 4]; order must name" in _refusal(*_described(case))
    half = scan_case(seqlen=5, d_inner=3, dtype=torch.float16)
    assert "gradients are computed in float32; cast the inputs" in _refusal(*_described(half))
