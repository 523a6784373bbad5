"""Scans whose directions lie outside of the tokens: the same bits as inside, everywhere."""

from __future__ import annotations

import pytest
import torch
from cases import SCAN_SIZES, TOGETHER_SIZES, scan_case
from cuda_device import DEVICES, HOST, VARIANTS
from cuda_device import run_operator as run_through_c
from native import isa_parameters
from native import run_operator as run_in_onnxruntime

from vssm.ops import operators as ops
from vssm.ops import reference

ISAS = isa_parameters()
# Shared axes of every kind, several images, one state, one decay, directions that go on together.
SIZES = [
    *(SCAN_SIZES[i] for i in (1, 4, 6, 7, 11, 14)),
    {**SCAN_SIZES[2], "batch": 2},
    {**TOGETHER_SIZES[5], "seqlen": 20},
]
MOVED = ("u", "delta", "B", "C")


def _both(index, extra="", dtype=torch.float32):
    """A case, the same with directions outside, and its attributes."""
    inside = scan_case(**SIZES[index], extra=extra, dtype=dtype, seed=index)
    outside = {n: t.transpose(1, 2).contiguous() if n in MOVED else t for n, t in inside.items()}
    return inside, outside, {"params_by_step": int(index == len(SIZES) - 1), "scale": 0.5}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_in_onnxruntime(index, isa, monkeypatch):
    monkeypatch.setenv("VSSM_CPU_ISA", isa)
    for dtype, extra in ((torch.float32, "z"), (torch.float16, "")):
        name = "GatedSelectiveScan" if extra else "SelectiveScan"
        inside, outside, attributes = _both(index, extra, dtype)
        want = run_in_onnxruntime(name, inside, **attributes)["y"]
        got = run_in_onnxruntime(name, outside, **attributes, direction_axis=1)["y"]
        assert torch.equal(got, want)


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_in_a_body(index):
    inside, outside, attributes = _both(index, "delta0")
    name = "SelectiveScanConstantGap"
    want = run_in_onnxruntime(name, inside, body=True, **attributes)["y"]
    got = run_in_onnxruntime(name, outside, body=True, **attributes, direction_axis=1)["y"]
    assert torch.equal(got, want)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", [HOST, *DEVICES], ids=str)
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_through_the_c_abi(index, backend, variant):
    if backend is HOST and variant != "auto":
        pytest.skip("variants are CUDA's")
    inside, outside, attributes = _both(index, "delta0")
    name, attributes = "SelectiveScanConstantGap", {**attributes, "variant": VARIANTS[variant]}
    want = run_through_c(backend, name, inside, **attributes)["y"]
    got = run_through_c(backend, name, outside, **attributes, direction_axis=1)["y"]
    assert torch.equal(got, want)


def _gradients(case, backend, **attributes):
    leaves = {
        n: t.clone().requires_grad_() if t.is_floating_point() else t for n, t in case.items()
    }
    y = ops.selective_scan(**leaves, **attributes, backend=backend)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return {"y": y.detach(), **{n: t.grad for n, t in leaves.items() if t.is_floating_point()}}


@pytest.mark.parametrize("exact", [False, True], ids=["kernel", "formula"])
@pytest.mark.parametrize("index", range(len(SIZES)))
def test_in_torch_and_its_gradients(index, exact):
    inside, outside, attributes = _both(index, "z")
    if exact:  # float64 has no kernel
        inside, outside = (
            {n: t.double() if t.is_floating_point() else t for n, t in case.items()}
            for case in (inside, outside)
        )
    attributes["params_by_step"] = bool(attributes["params_by_step"])
    want = _gradients(inside, "auto", **attributes)
    got = _gradients(outside, "auto", **attributes, direction_axis=1)
    for name, tensor in got.items():
        moved = want[name].transpose(1, 2) if name in MOVED else want[name]
        assert torch.equal(tensor, moved), name
    with torch.no_grad():
        plain = reference.selective_scan(**outside, **attributes, direction_axis=1)
        assert torch.equal(plain, reference.selective_scan(**inside, **attributes))


def test_another_axis_is_refused():
    inside, _, _ = _both(0)
    with pytest.raises(ValueError, match="direction_axis=3 must be 1 or 2"):
        ops.selective_scan(**inside, direction_axis=3)
    with pytest.raises(Exception, match=r"direction_axis=0 is outside \[1, 2\]"):
        run_in_onnxruntime("SelectiveScan", inside, direction_axis=0)
