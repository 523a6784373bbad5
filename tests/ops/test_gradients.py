"""Which formula a scan and its gradients come from in PyTorch, and what they keep in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backward_calls import largest_error, oracle_gradients, upstream
from cases import EXTRA, scan_case
from checkout import PYTHONPATH
from tolerances import GRADIENT_TOLERANCE

from vssm.errors import UnsupportedError
from vssm.ops import operators as ops
from vssm.ops import reference
from vssm.ops.kernels import backward_memory, differentiable
from vssm.ops.spec import OPERATORS

# Layers that are trained: those of the models, with two images.
LAYERS = {
    "vim_tiny": {"seqlen": 197, "d_inner": 384, "directions": 2, "shared": ""},
    "vim_small": {"seqlen": 197, "d_inner": 768, "directions": 2, "shared": ""},
    "vim_small, one direction's u": {"seqlen": 197, "d_inner": 768, "shared": "u"},
    "plain_mamba_l1": {"seqlen": 196, "d_inner": 384, "directions": 4, "shared": "udACD"},
    "plain_mamba_l3": {"seqlen": 196, "d_inner": 896, "directions": 4, "shared": "udACD"},
    "vmamba_tiny": {"seqlen": 784, "d_inner": 192, "d_state": 1, "directions": 4, "shared": "u"},
    "pruned vim_tiny": {"seqlen": 101, "d_inner": 384, "directions": 2},
}


def _leaves(case):
    leaves = {k: v.clone() for k, v in case.items()}
    for tensor in leaves.values():
        tensor.requires_grad_(tensor.is_floating_point())
    return leaves


def _train(case, dy, **attributes):
    leaves = _leaves(case)
    y = ops.selective_scan(**leaves, **attributes)
    y.backward(dy.to(y.dtype))
    return y.detach(), {k: v.grad for k, v in leaves.items() if v.requires_grad}


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE, ids=str)
@pytest.mark.parametrize("name", EXTRA)
def test_training_runs_on_the_kernels(name, dtype):
    case = scan_case(seqlen=70, d_inner=20, batch=2, dtype=dtype, extra=EXTRA[name])
    dy = upstream(case).to(dtype)
    y, gradients = _train(case, dy, scale=0.5)
    assert torch.equal(y, ops.selective_scan(**case, scale=0.5, backend="kernel"))
    assert all(g.dtype == case[n].dtype for n, g in gradients.items())
    expected = oracle_gradients(case, dy, scale=0.5)
    assert largest_error(gradients, expected) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("name", EXTRA)
def test_float64_stays_the_oracle(name):
    case = scan_case(seqlen=20, d_inner=5, extra=EXTRA[name])
    case = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
    y, gradients = _train(case, upstream(case))
    assert torch.equal(y, reference.selective_scan(**case))
    assert largest_error(gradients, oracle_gradients(case, upstream(case))) <= 1e-12


@pytest.mark.parametrize("name", EXTRA)
def test_the_torch_operator_has_the_same_gradients(name):
    case = scan_case(seqlen=20, d_inner=5, extra=EXTRA[name])
    leaves = _leaves(case)
    operands = [leaves[o.name] for o in OPERATORS[name].inputs]
    ops.torch_op(OPERATORS[name])(*operands).backward(upstream(case))
    _, expected = _train(case, upstream(case))
    assert all(torch.equal(leaves[n].grad, g) for n, g in expected.items())


def test_gradients_of_some_operands_and_from_an_expanded_one():
    case = scan_case(seqlen=20, d_inner=5)
    leaves = {k: v.clone() for k, v in case.items()}
    leaves["B"].requires_grad_()
    ops.selective_scan(**leaves).sum().backward()
    expected = oracle_gradients(case, torch.ones(1, 20, 5))
    assert leaves["u"].grad is None
    assert largest_error({"B": leaves["B"].grad}, {"B": expected["B"]}) < 1e-5


def test_operands_that_are_not_contiguous():
    case = scan_case(seqlen=20, d_inner=5, directions=2)
    strided = {k: v.transpose(0, 1).contiguous().transpose(0, 1) for k, v in case.items()}
    assert not strided["A"].is_contiguous()
    y, gradients = _train(strided, upstream(case))
    wanted, expected = _train(case, upstream(case))
    assert torch.equal(y, wanted)
    assert all(torch.equal(gradients[n], g) for n, g in expected.items())


@pytest.mark.parametrize("name", EXTRA)
def test_a_compiled_step_has_gradients_of_the_kernels(name):
    case = scan_case(seqlen=6, d_inner=5, extra=EXTRA[name])
    leaves = _leaves(case)

    def step(case):
        return (ops.selective_scan(**case, scale=0.5) * upstream_of).sum()

    upstream_of = upstream(case)
    torch.compile(step, backend="aot_eager", fullgraph=True)(leaves).backward()
    expected = oracle_gradients(case, upstream_of, scale=0.5)
    found = {n: leaves[n].grad for n in expected}
    assert largest_error(found, expected) <= GRADIENT_TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", ["reference", "kernel"])
def test_the_choice_of_operators_counts_in_training(backend):
    case = scan_case(seqlen=20, d_inner=5)
    y, gradients = _train(case, upstream(case), backend=backend)
    assert torch.equal(y, ops.selective_scan(**case, backend=backend))
    exact = largest_error(gradients, oracle_gradients(case, upstream(case)))
    assert exact <= GRADIENT_TOLERANCE[torch.float32]
    _, of_kernels = _train(case, upstream(case), backend="kernel")
    same = all(torch.equal(g, of_kernels[n]) for n, g in gradients.items())
    assert same == (backend == "kernel")


def test_values_that_break_the_contract_are_refused_in_training_too():
    case = _leaves(scan_case(seqlen=6, d_inner=5))
    case["order"][0, 0, 0] = 6
    with pytest.raises(ValueError, match=r"order\[\d\]=6 is outside \[0, 5\]"):
        ops.selective_scan(**case)
    case = _leaves(scan_case(seqlen=6, d_inner=5))
    with pytest.raises(ValueError, match=r"SelectiveScan C\.shape=\(1, 6, 2, 16\)"):
        ops.selective_scan(**{**case, "B": case["B"][..., 1:]})


def test_a_second_derivative_is_refused():
    case = _leaves(scan_case(seqlen=4, d_inner=2))
    y = ops.selective_scan(**case)
    (gradient,) = torch.autograd.grad(y.sum(), case["u"], create_graph=True)
    with pytest.raises(UnsupportedError, match=r"no derivative of its own; for a second one call"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", EXTRA)
def test_nothing_but_the_inputs_is_kept_for_the_backward_pass(name):
    kept = []
    case = _leaves(scan_case(seqlen=70, d_inner=20, extra=EXTRA[name]))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.selective_scan(**case)
    assert len(kept) == len(case)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in case.values()}


def _sizes(case):
    """Bytes of the inputs; of one state in 64 tokens, for each image and direction."""
    batch, seqlen, _, d_inner = case["u"].shape
    states = batch * case["order"].shape[1] * -(-seqlen // 64) * d_inner * case["A"].shape[2]
    return sum(t.nbytes for t in case.values()), 4 * states


def _allowed(name, case):
    """Bytes of the gradients and of what the kernel says that it allocates on one thread."""
    named = {a.name: a.default for a in OPERATORS[name].attributes} | case
    gradients = sum(case[n].nbytes for n in differentiable(OPERATORS[name]))
    return gradients + sum(backward_memory(OPERATORS[name], named))


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("layer", LAYERS)
def test_memory_is_bounded(layer, name, batch):
    """At most twice the inputs and one state per 64 tokens, gradients included."""
    case = scan_case(**LAYERS[layer], batch=batch, extra=EXTRA[name])
    inputs, states = _sizes(case)
    assert _allowed(name, case) <= 2 * inputs + states


_MEASURE = """
import ctypes, os, re, sys
sys.path.insert(0, sys.argv[1])
import torch
from cases import scan_case
from vssm.ops.kernels import backward_memory, differentiable, run_backward
from vssm.ops.spec import OPERATORS
from test_gradients import LAYERS, _allowed, _sizes

def bytes_of(field):
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(field + r":\\s*(\\d+) kB", status.read())[1])

def peak():  # less the pages of libraries, which come as their code is first run
    return bytes_of("VmHWM") - bytes_of("RssFile")

PR_SET_THP_DISABLE = 41  # a huge page counts whole, however little of it is asked for
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
torch.set_num_threads(1)
name = "GatedSelectiveScan"
op = OPERATORS[name]
defaults = {a.name: a.default for a in op.attributes}
small = scan_case(seqlen=2, d_inner=2, extra="z")
case = scan_case(**LAYERS["vim_small"], batch=16, extra="z")
dy = torch.randn(16, 197, 768)
for transposed in (False, True):
    if transposed:  # as a convolution over channel-major tokens leaves it
        for inputs in (small, case):
            inputs["u"] = inputs["u"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            inputs["delta"] = inputs["delta"].transpose(1, 2).contiguous().transpose(1, 2)
    for _ in range(3):  # what a machine under load adds is not the kernel's
        if os.fork() == 0:  # so that none finds memory that another has left
            run_backward(op, defaults | small, torch.randn(1, 2, 2))
            with open("/proc/self/clear_refs", "w") as control:
                control.write("5")  # the peak begins anew
            before = peak()
            run_backward(op, defaults | case, dy)
            print(peak() - before, _allowed(name, case), *_sizes(case), flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
"""


def test_memory_is_what_the_kernel_says():
    command = [sys.executable, "-c", _MEASURE, str(Path(__file__).parent)]
    done = subprocess.run(
        command,
        # Every tensor is mapped alone and given back when it is freed: else malloc keeps some.
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = [[int(x) for x in line.split()] for line in done.stdout.splitlines()]
    contiguous, transposed = min(found[:3]), min(found[3:])
    for measured, allowed, inputs, states in (contiguous, transposed):
        assert measured > 0.5 * allowed
        assert measured <= 2 * inputs + states
    assert contiguous[0] < contiguous[1] + (4 << 20)
