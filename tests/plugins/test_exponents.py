"""Every exponent of every input of every operator, on every kernel and in the fallback bodies."""

from __future__ import annotations

import functools

import pytest
import torch
from backward_calls import backward
from cases import DTYPES
from cuda_device import DEVICES, EMULATED, HOST
from cuda_device import run_operator as run_kernel
from native import isa_parameters, run_operator
from sweep import BATCHED, LAYOUTS, every_exponent, sweep, worst
from tolerances import EXPONENT_GRADIENT_TOLERANCE, EXPONENT_TOLERANCE, GPU_EXPONENT_TOLERANCE

from vssm.ops import reference
from vssm.ops.spec import GATHER_OPERATORS, OPERATORS, SCAN_OPERATORS

ISAS = isa_parameters()
FLOATS = [(spec.name, o.name) for spec in SCAN_OPERATORS for o in spec.inputs if o.dtype != "int32"]
_LARGE = 1e30  # a gradient beyond has products beyond float32's range on its way
_SMALL = 2.0**-100  # what decays below 2^-126 may cost a gradient here, with spans up to 500


def _dtypes(name, swept):
    (operand,) = (o for o in OPERATORS[name].inputs if o.name == swept)
    return DTYPES if operand.dtype == "T" else DTYPES[:1]


def _runner(where, monkeypatch):
    """What runs an operator: reference, fallback body, emulated CUDA, or the kernels of a set."""
    if where == "reference":
        return _reference
    if where == "body":
        return functools.partial(run_operator, body=True)
    if where == "emulated":
        return functools.partial(run_kernel, EMULATED)
    monkeypatch.setenv("VSSM_CPU_ISA", where)
    return functools.partial(run_kernel, HOST)


def _reference(_, inputs, **attributes):
    """The oracle, in float64 as everywhere, with its result in the type of the inputs."""
    exact = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    # The first rule of `sweep` that is about rounding: this sum is a float32.
    exact["delta"] = (inputs["delta"].float() + inputs["delta_bias"]).double()
    exact["delta_bias"] = torch.zeros_like(exact["delta_bias"])
    return {"y": reference.selective_scan(**exact, **attributes).to(inputs["u"].dtype)}


def _check(case, got, tolerance, note):
    error, where = worst(case, got)
    assert error <= tolerance[got.dtype], f"{note}: off by {error:.2g} {where}"


@pytest.mark.parametrize("where", [*ISAS, "body", "reference"])
@pytest.mark.parametrize(("name", "swept"), FLOATS)
def test_scan(monkeypatch, where, name, swept):
    run = _runner(where, monkeypatch)
    for dtype in _dtypes(name, swept):
        for layout in LAYOUTS:
            case = sweep(name, swept, layout, dtype)
            got = run(name, case.inputs, **layout.attributes)["y"]
            _check(case, got, EXPONENT_TOLERANCE, f"{dtype}, {layout}")


def _long(device, swept, dtype):
    """Half B and C are widened as half inputs are, and in emulation take as long as all else."""
    return device is EMULATED and swept in {"B", "C"} and dtype != torch.float32


IN_CUDA = [
    pytest.param(device, *case, dtype, marks=[*marks, *[pytest.mark.slow] * long])
    for (device,), marks, _ in (pytest.param(d) if d is EMULATED else d for d in DEVICES)
    for case in FLOATS
    for dtype in _dtypes(*case)
    for long in [_long(device, case[1], dtype)]
]


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize(("device", "name", "swept", "dtype"), IN_CUDA, ids=str)
def test_scan_in_cuda(device, variant, name, swept, dtype):
    """An infinite step or input may become NaN there: 0 * inf in states that pad a row."""
    for layout in LAYOUTS:
        case = sweep(name, swept, layout, dtype, few=True)
        got = run_kernel(device, name, case.inputs, variant=variant, **layout.attributes)["y"]
        y = torch.from_numpy(case.y)
        got = torch.where(got.isnan() & y.isinf(), y.to(got.dtype), got)
        _check(case, got, GPU_EXPONENT_TOLERANCE, f"{dtype}, {layout}")


GATES = [-89.0, -91.5, -6e4, -1e30, -3e38, float("-inf"), float("inf"), float("nan"), 3e38, -0.0]


@pytest.mark.parametrize("where", [*ISAS, "emulated", "body"])
def test_gates_far_below_zero(monkeypatch, where):
    z = torch.tensor(GATES)
    inputs = _one_step(len(z), u=torch.ones_like(z), D=torch.ones_like(z), z=z)
    got = _runner(where, monkeypatch)("GatedSelectiveScan", inputs)["y"].flatten()
    want = torch.nn.functional.silu(z.double()).float()
    torch.testing.assert_close(got, want, rtol=3e-6, atol=0, equal_nan=True)
    numbers = ~want.isnan()
    assert torch.equal(got[numbers].signbit(), want[numbers].signbit())


@pytest.mark.parametrize("where", [*ISAS, "emulated", "body"])
def test_small_steps_of_large_inputs(monkeypatch, where):
    """softplus goes to 0, so that u = 1e38 does not bring back what a clamped exp left of it."""
    delta = torch.linspace(-200, -80, 481)
    u = torch.full_like(delta, 1e38)
    inputs = _one_step(len(delta), u=u, delta=delta, B=torch.ones(1))
    del inputs["z"]
    got = _runner(where, monkeypatch)("SelectiveScan", inputs)["y"].flatten().double()
    want = torch.logaddexp(torch.zeros(()), delta.double()) * u.double()
    small = want < 1.2e-38 * 1e38  # the step is subnormal, which may count as zero
    assert bool((got[small] <= 1.2).all())
    torch.testing.assert_close(got[~small], want[~small], rtol=1e-5, atol=0)


@pytest.mark.parametrize("where", [*ISAS, "emulated", "body"])
@pytest.mark.parametrize("step", [0.0, 1e-37, 3e-38])
def test_large_A_and_small_steps(monkeypatch, where, step):
    """exp(dt A) is far from 0, and A times a CPU kernel's own unit is no float."""
    A = -torch.logspace(36, 38.3, 64, dtype=torch.float64).float()
    steps = {"u": torch.ones(2, 64), "delta": torch.full((2, 64), step)}
    steps["delta"][0] = 1.0  # the first step sets the state to 1
    inputs = _one_step(64, seqlen=2, A=A[:, None], B=torch.ones(1), **steps)
    del inputs["z"]
    run = _runner(where, monkeypatch)
    got = run("SelectiveScan", inputs, delta_softplus=0)["y"][0, 1].double()
    want = torch.exp(inputs["delta"][0, 1, 0].double() * A.double())
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-30)


def _one_step(d_inner, seqlen=1, **given):
    """A scan of one direction and state, zero but for what is given, A = -1 and gap 1."""
    shapes = {"u": (1, seqlen, 1, d_inner), "A": (1, d_inner, 1), "B": (1, seqlen, 1, 1)}
    shapes |= {"delta": shapes["u"], "C": shapes["B"], "D": (1, d_inner)}
    shapes |= {"delta_bias": (1, d_inner), "z": (1, seqlen, d_inner)}
    found = {n: torch.zeros(shape) for n, shape in shapes.items()}
    found["A"] -= 1
    found["C"] += 1
    for name, value in given.items():
        found[name] = value.expand(seqlen, -1).reshape(shapes[name]) if name != "A" else value[None]
    found["order"] = torch.arange(seqlen, dtype=torch.int32)[None, None]
    found["gap"] = torch.ones_like(found["order"])
    return found


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("name", "swept"), FLOATS)
def test_gradients(monkeypatch, isa, name, swept):
    """Of each channel or image, over the largest of it; finite values and gradients alone."""
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    for layout in LAYOUTS:
        case = sweep(name, swept, layout, torch.float32)
        dy = torch.ones(case.y.shape)
        wanted = _gradients(name, swept, layout)
        beyond = case.beyond.any((1, 2) if swept in BATCHED else (0, 1))
        for by, got in backward(name, case.inputs, dy, **layout.attributes).items():
            axis = _axis(by, swept, got)
            if axis is None:
                continue
            want, found = (x.double().movedim(axis, 0).flatten(1) for x in (wanted[by], got))
            size = want.abs().amax(1)
            counts = want.isfinite().all(1) & (size < _LARGE) & case.values.isfinite()
            counts &= ~torch.tensor(beyond)
            error = ((found - want).abs() - _SMALL).amax(1) / size.clamp_min(1e-300)
            bad = counts & ~(error <= EXPONENT_GRADIENT_TOLERANCE)
            assert not bad.any(), f"{layout}: by {by} at {case.values[bad]}: {error[bad]}"
            assert counts.sum() > 900


@functools.lru_cache(maxsize=len(LAYOUTS))  # every instruction set in turn asks for the same
def _gradients(name, swept, layout):
    case = sweep(name, swept, layout, torch.float32)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs.items()}
    dy = torch.ones(case.y.shape, dtype=torch.float64)
    return reference.selective_scan_backward(dy, **exact, **layout.attributes)


def _axis(by, swept, gradient):
    """The axis of a gradient along which the swept values lie; None where it sums over them."""
    if swept in BATCHED:
        return 0 if by in {"u", "delta", "B", "C", "z"} else None
    return {"A": 1, "B": None, "C": None}.get(by, gradient.dim() - 1)


@pytest.mark.parametrize("where", [*ISAS, "emulated", "body"])
@pytest.mark.parametrize("spec", GATHER_OPERATORS, ids=lambda spec: spec.name)
def test_gather_of_every_score_and_row(monkeypatch, where, spec):
    run = _runner(where, monkeypatch)
    make = torch.Generator().manual_seed(0)
    scores = every_exponent(torch.float32)
    score = torch.stack([scores[torch.randperm(len(scores), generator=make)] for _ in range(2)])
    position = torch.arange(len(scores), dtype=torch.int32)[None]
    attributes = {"num_keep": len(scores) // 2, "protected_position": 7}
    for types in spec.types:
        xs = [every_exponent(getattr(torch, t)) for t in types]
        xs = [x.repeat(8)[: len(scores)].expand(2, -1)[..., None].contiguous() for x in xs]
        inputs = {"score": score, "position": position, "x0": xs[0], "x1": xs[-1]}
        got = run(spec.name, {o.name: inputs[o.name] for o in spec.inputs}, **attributes)
        # As integers: torch's own gather makes half NaN quiet.
        wanted = [x.view(torch.int32 if x.dtype == torch.float32 else torch.int16) for x in xs]
        kept, rows = reference.token_gather(score, position, wanted, **attributes)
        assert torch.equal(got["kept_position"], kept)
        for i, row in enumerate(rows):
            assert torch.equal(got[f"y{i}"].view(row.dtype), row), "bits were changed"
