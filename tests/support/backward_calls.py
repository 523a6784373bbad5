"""Calls of the scans' backward pass through the C ABI, and their oracle."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from cases import EXTRA, scan_case, scan_reference_arguments
from cuda_device import CScanAttributes, CTensor, OperatorError, describe
from guarded import Memory
from native import found_library
from torch import Tensor

from vssm.native_library import load_library
from vssm.ops import reference
from vssm.ops.kernels import LIBRARY, differentiable
from vssm.ops.spec import OPERATORS


def upstream(case: Mapping[str, Tensor], seed: int = 0) -> Tensor:
    """A gradient by y."""
    batch, seqlen, _, d_inner = case["u"].shape
    return torch.randn(batch, seqlen, d_inner, generator=torch.Generator().manual_seed(seed))


def oracle_gradients(case: dict[str, Tensor], dy: Tensor, **attributes: Any) -> dict[str, Tensor]:
    """By float64 autograd of the oracle."""
    exact = scan_reference_arguments(case)
    leaves = {k: v.requires_grad_() for k, v in exact.items() if v.is_floating_point()}
    y = reference.selective_scan(**exact, **attributes)
    found = torch.autograd.grad(y, list(leaves.values()), dy.double())
    return dict(zip(leaves, found, strict=True))


def largest_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Over all gradients, each over its own largest magnitude; NaN where one is."""
    assert set(got) == set(expected)
    errors = []
    for name, wanted in expected.items():
        assert got[name].shape == wanted.shape
        size = wanted.abs().max().clamp_min(1e-30)
        errors.append((got[name].double() - wanted).abs().max() / size)
    return float(torch.stack(errors).max())


def backward(
    name: str, case: Mapping[str, Tensor], dy: Tensor, *, threads: int = 1, **attributes: float
) -> dict[str, Tensor]:
    """Gradients by the kernel, into memory that was NaN before, between untouched guards."""
    names = differentiable(OPERATORS[name])
    gradients = {n: Memory(torch.empty(case[n].shape), "cpu") for n in names}
    ordered = [case[o.name].contiguous() for o in OPERATORS[name].inputs]
    inputs = [Memory.of(t, "cpu") for t in ordered]
    given = Memory.of(dy.contiguous(), "cpu")
    call_backward(
        name,
        [describe(memory) for memory in inputs],
        describe(given),
        [describe(memory) for memory in gradients.values()],
        threads=threads,
        **attributes,
    )
    for n, memory in gradients.items():
        memory.check(f"gradient of {n}")
    for memory, tensor in zip([*inputs, given], [*ordered, dy], strict=True):
        assert torch.equal(memory.tensor.view(torch.int32), tensor.view(torch.int32))
    return {n: memory.tensor.clone() for n, memory in gradients.items()}


def call_backward(
    name: str,
    inputs: Sequence[CTensor],
    dy: CTensor | None,
    gradients: Sequence[CTensor],
    *,
    threads: int = 1,
    **attributes: float,
) -> None:
    """The C function, as it is.

    Raises:
        OperatorError: it refused.
    """
    given = {a.name: a.default for a in OPERATORS[name].attributes} | attributes
    error = ctypes.create_string_buffer(512)
    failed = load_library(found_library(LIBRARY)).vssm_selective_scan_backward(
        name.encode(),
        (CTensor * len(inputs))(*inputs),
        ctypes.c_int32(len(inputs)),
        None if dy is None else ctypes.byref(dy),
        (CTensor * len(gradients))(*gradients),
        ctypes.c_int32(len(gradients)),
        ctypes.byref(CScanAttributes(**given, variant=0)),
        ctypes.c_int32(threads),
        error,
        ctypes.c_size_t(len(error)),
    )
    if failed:
        raise OperatorError(error.value.decode())


def exact_case(name: str, **options: Any) -> dict[str, Tensor]:
    """A small float64 case whose gradients are all far from zero, for gradcheck."""
    case = scan_case(extra=EXTRA[name], **options)
    case = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
    case["delta"] = 0.5 * case["delta"].abs()
    case["delta_bias"] = 0.1 * case["delta_bias"].abs()
    return case
