"""The native backward pass of the scans on torch's CPU tensors, through the C ABI of libvssm.so."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vssm.ops.kernels import ScanAttributes, describe, kernels
from vssm.ops.spec import OperatorSpec


def differentiable(op: OperatorSpec) -> tuple[str, ...]:
    """The inputs of a scan that have a gradient, in the order of the operator table."""
    return tuple(o.name for o in op.inputs if o.dtype != "int32")


def scan_backward(op: OperatorSpec, named: Mapping[str, Any], dy: Tensor) -> list[Tensor]:
    """Gradients by every input but order and gap, from that by y, on as many threads as torch uses.

    Each has the type and strides of its input: what comes before a transposed input is transposed
    too, and goes through its gradient the faster. Computed in float32: half inputs are converted,
    their gradients rounded once.

    Args:
        op: the operator.
        named: its inputs, on the CPU in float32, float16 or bfloat16, and its attributes, by name.
        dy: (batch, seqlen, d_inner), the gradient by y.

    Raises:
        ValueError: a shape or value breaks the operator's contract.
        RuntimeUnavailableError: there is no library.
    """
    floats = differentiable(op)
    inputs = {o.name: named[o.name].contiguous() for o in op.inputs}
    inputs |= {name: inputs[name].float() for name in floats}
    gradients = [torch.empty_like(inputs[name]) for name in floats]
    dy = dy.float().contiguous()
    results = (describe([dy]), describe(gradients), ctypes.c_int32(len(gradients)))
    threads = ctypes.c_int32(torch.get_num_threads())
    _call("vssm_selective_scan_backward", op, named, (list(inputs.values()), *results), threads)
    del inputs  # copies, where the inputs are not contiguous
    for i, name in enumerate(floats):
        gradients[i] = _laid_out_as(named[name], gradients[i])
    return gradients


def backward_memory(op: OperatorSpec, named: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes that the kernel allocates for `scan_backward`: once, and for each thread.

    The gradients, and copies of inputs that are not contiguous float32, come on top.

    Raises:
        ValueError: a shape breaks the operator's contract.
        RuntimeUnavailableError: there is no library.
    """
    inputs = [named[o.name] for o in op.inputs]
    found = (ctypes.c_int64 * 2)()
    _call("vssm_selective_scan_backward_memory", op, named, (inputs,), found)
    return found[0], found[1]


def _laid_out_as(tensor: Tensor, gradient: Tensor) -> Tensor:
    like = torch.empty_like(tensor)
    if like.dtype == gradient.dtype and like.stride() == gradient.stride():
        return gradient
    return like.copy_(gradient)


def _call(
    function: str,
    op: OperatorSpec,
    named: Mapping[str, Any],
    given: tuple[Any, ...],
    last: Any,
) -> None:
    """`given`: the inputs, then what the function takes before the attributes; `last`: after."""
    inputs, *results = given
    attributes = ScanAttributes(named["delta_softplus"], named["params_by_step"], named["scale"], 0)
    failure = kernels().call(
        function,
        op.name.encode(),
        describe(inputs),
        ctypes.c_int32(len(inputs)),
        *results,
        ctypes.byref(attributes),
        last,
    )
    if failure is not None:
        raise ValueError(failure)
