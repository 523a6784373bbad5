"""The native CPU kernels of the scans on torch tensors, through the C ABI of libvssm.so."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from exporter.errors import RuntimeUnavailableError
from exporter.runtimes.library import OPERATOR_LIBRARY, load_library
from exporter.spec import OperatorSpec

_DTYPE_CODES: Final = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int32: 3,
}
_ERROR_BYTES: Final = 512


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 4),
    )


class _ScanAttributes(ctypes.Structure):
    _fields_ = (
        ("delta_softplus", ctypes.c_int64),
        ("params_by_step", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("variant", ctypes.c_int32),
    )


def is_available() -> bool:
    """Whether libvssm.so is there and loads."""
    try:
        _library()
    except RuntimeUnavailableError:
        return False
    return True


def differentiable(op: OperatorSpec) -> tuple[str, ...]:
    """The inputs of a scan that have a gradient, in the order of the operator table."""
    return tuple(o.name for o in op.inputs if o.dtype != "int32")


def scan(op: OperatorSpec, named: Mapping[str, Any]) -> Tensor:
    """The result of a scan, on as many threads as torch uses.

    Args:
        op: the operator.
        named: its inputs, on the CPU in float32, float16 or bfloat16, and its attributes, by name.

    Raises:
        ValueError: a shape or value breaks the operator's contract.
        RuntimeUnavailableError: there is no library.
    """
    u: Tensor = named["u"]
    y = u.new_empty(u.shape[0], u.shape[1], u.shape[3])
    inputs = [named[o.name].contiguous() for o in op.inputs]
    threads = ctypes.c_int32(torch.get_num_threads())
    _call("vssm_selective_scan_on_threads", op, inputs, named, _descriptors([y]), threads)
    return y


def scan_backward(op: OperatorSpec, named: Mapping[str, Any], dy: Tensor) -> list[Tensor]:
    """Gradients by every input but order and gap, from that by y.

    Each has the type and strides of its input: what comes before a transposed input is transposed
    too, and goes through its gradient the faster. Computed in float32: half inputs are converted,
    their gradients rounded once.

    Args:
        op: the operator.
        named: as in `scan`.
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
    targets = _descriptors(gradients)
    results = (_descriptors([dy]), targets, ctypes.c_int32(len(targets)))
    threads = ctypes.c_int32(torch.get_num_threads())
    _call("vssm_selective_scan_backward", op, list(inputs.values()), named, *results, threads)
    del inputs  # copies, where the inputs are not contiguous
    for i, name in enumerate(floats):
        gradients[i] = _laid_out_as(named[name], gradients[i])
    return gradients


def backward_memory(op: OperatorSpec, named: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes that `scan_backward` allocates besides its gradients: once, and for each thread.

    Raises:
        ValueError: a shape breaks the operator's contract.
        RuntimeUnavailableError: there is no library.
    """
    inputs = [named[o.name] for o in op.inputs]
    found = (ctypes.c_int64 * 2)()
    _call("vssm_selective_scan_backward_memory", op, inputs, named, found)
    return found[0], found[1]


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    return load_library(OPERATOR_LIBRARY)


def _descriptors(tensors: Sequence[Tensor]) -> ctypes.Array[_Tensor]:
    """Of contiguous tensors, which must outlive them."""
    found = (_Tensor * len(tensors))()
    for place, tensor in zip(found, tensors, strict=True):
        place.data, place.dtype = tensor.data_ptr(), _DTYPE_CODES[tensor.dtype]
        place.rank, place.dims[: tensor.dim()] = tensor.dim(), tensor.shape
    return found


def _laid_out_as(tensor: Tensor, gradient: Tensor) -> Tensor:
    like = torch.empty_like(tensor)
    if like.dtype == gradient.dtype and like.stride() == gradient.stride():
        return gradient
    return like.copy_(gradient)


def _call(
    function: str,
    op: OperatorSpec,
    inputs: Sequence[Tensor],
    named: Mapping[str, Any],
    *others: Any,
) -> None:
    """`others`: what the function takes after the inputs, and after the attributes."""
    *results, last = others
    attributes = _ScanAttributes(named["delta_softplus"], named["params_by_step"], named["scale"])
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    failed = _library()[function](
        op.name.encode(),
        _descriptors(inputs),
        ctypes.c_int32(len(inputs)),
        *results,
        ctypes.byref(attributes),
        last,
        error,
        ctypes.c_size_t(_ERROR_BYTES),
    )
    if failed:
        raise ValueError(error.value.decode())
