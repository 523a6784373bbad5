"""The operators' native kernels on torch's tensors, through the C ABI of libvssm.so.

On CUDA tensors the kernels run on torch's current stream of their device, with a workspace from
torch's own allocator: nothing waits and nothing else allocates, so a call may be captured in a CUDA
graph. The values of `order`, `gap` and `position` are then not looked at. On CPU tensors the CPU
kernels run, scans and convolutions on as many threads as torch uses, and refuse bad values. float64
has the oracle alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from vssm.errors import RuntimeUnavailableError, UnsupportedError
from vssm.native_library import find_library, load_library
from vssm.ops.rules import output_sizes
from vssm.ops.spec import (
    CONV_OPERATORS,
    GATHER_OPERATORS,
    SCAN_OPERATORS,
    TOKEN_SCATTER,
    OperatorSpec,
)

LIBRARY: Final = "vssm"
_CODES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int32: 3}
_DEVICES: Final = ("cpu", "cuda")
_MAX_RANK = 4
_ALIGNMENT = 256  # bytes, of a workspace
_ERROR_BYTES = 512


# A vssm_tensor of plugins/c/vssm.h: its data, and its form, which is dtype, rank and dims.
_DATA: Final = struct.Struct("P")
_FORM: Final = struct.Struct(f"ii{_MAX_RANK}q")


class _Launch(ctypes.Structure):
    _fields_ = (
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
    )


class ScanAttributes(ctypes.Structure):
    """vssm_scan_attributes of plugins/c/vssm.h."""

    _fields_ = (
        ("delta_softplus", ctypes.c_int64),
        ("params_by_step", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("variant", ctypes.c_int16),
        ("direction_axis", ctypes.c_int16),
    )


class _GatherAttributes(ctypes.Structure):
    _fields_ = (("num_keep", ctypes.c_int64), ("protected_position", ctypes.c_int64))


class _ConvAttributes(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("by_position", "activation", "grid_height", "grid_width", "group")
    )


@dataclass(frozen=True)
class _Family:
    """Operators that share a function of the library.

    Attributes:
        function: its name; with `_workspace`, and `_on_threads` where it is `threaded`, others'.
        attributes: the struct that it takes; None where there are none.
        counted: whether it takes an array of outputs and their number, instead of one output.
        threaded: whether the CPU kernel runs on several threads.
    """

    function: str
    attributes: type[ctypes.Structure] | None
    counted: bool = False
    threaded: bool = True

    @property
    def on_cpu(self) -> str:
        """The function that runs the CPU kernel."""
        return f"{self.function}_on_threads" if self.threaded else self.function

    def attributes_of(self, named: Mapping[str, Any]) -> tuple[Any, ...]:
        """The struct as it is passed, with the attributes of that name; the rest of it is 0."""
        if self.attributes is None:
            return ()
        fields = (field[0] for field in self.attributes._fields_)
        given = {name: named[name] for name in fields if name in named}
        return (ctypes.byref(self.attributes(**given)),)


_FAMILIES = {
    **dict.fromkeys(
        (op.name for op in SCAN_OPERATORS), _Family("vssm_selective_scan", ScanAttributes)
    ),
    **dict.fromkeys(
        (op.name for op in GATHER_OPERATORS),
        _Family("vssm_token_gather", _GatherAttributes, counted=True, threaded=False),
    ),
    **dict.fromkeys(
        (op.name for op in CONV_OPERATORS), _Family("vssm_token_conv", _ConvAttributes)
    ),
    TOKEN_SCATTER.name: _Family("vssm_token_scatter", None, threaded=False),
}


class Kernels:
    """The kernels of one build of the library.

    Args:
        path: the library.

    Raises:
        RuntimeUnavailableError: this machine cannot load it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = load_library(path)
        self.has_cuda = bool(self._library.vssm_has_cuda())

    def launches_on(self, device: torch.device) -> bool:
        """Whether the CUDA kernels take tensors of this device, with a stream and a workspace."""
        return device.type == "cuda"

    def run(
        self, op: OperatorSpec, args: tuple[Any, ...], *, variant: int = 0
    ) -> tuple[Tensor, ...]:
        """Run an operator; its outputs.

        Args:
            op: the operator.
            args: its tensors and attributes in the table's order; those at the end that are their
                defaults may be left out.
            variant: of a scan on CUDA, as in vssm_scan_attributes of plugins/c/vssm.h.

        Raises:
            ValueError: an operand breaks the contract, or is on another device than the first.
            RuntimeUnavailableError: the tensors are on a device that this build has no kernels for.
            UnsupportedError: the CUDA kernels refuse the sizes, or CUDA the launch.
        """
        count = len(op.inputs)
        operands = args[:count]
        seen = tuple([(t.shape, t.dtype, t.device) for t in operands])
        call = _call_of(op, seen, args[count:], variant)
        self.require(call.device)
        kept = [t.contiguous() for t in operands]  # alive until the call returns
        outputs = tuple([operands[i].new_empty(shape) for i, shape in call.like])
        inputs, results = _tensors(kept, call.inputs), _tensors(outputs, call.outputs)
        given = (call.name, inputs, call.input_count, results, *call.rest)
        if self.launches_on(call.device):
            self._launch(call, given)
            return outputs
        threads = ctypes.c_int32(torch.get_num_threads()) if call.family.threaded else None
        failure = self.call(call.family.on_cpu, *given, threads)
        if failure is not None:
            raise ValueError(failure)
        return outputs

    def _launch(self, call: _Call, given: tuple[Any, ...]) -> None:
        name, inputs, input_count, *_ = given
        size, query = ctypes.c_int64(0), f"{call.family.function}_workspace"
        attributes = call.attributes
        with _on(call.device):
            failure = self.call(query, name, inputs, input_count, *attributes, ctypes.byref(size))
            if failure is None:
                launch, _workspace = _launch(call.device, size.value)
                failure = self.call(call.family.function, *given, launch)
        if failure is not None:
            raise UnsupportedError(failure)

    def call(self, function: str, *arguments: Any) -> str | None:
        """Call a function of the library; its message, None for success."""
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        # As an attribute ctypes keeps it; by [] it would be looked up in the library anew.
        run = getattr(self._library, function)
        failed = run(*arguments, error, ctypes.c_size_t(_ERROR_BYTES))
        return error.value.decode() if failed else None

    def require(self, device: torch.device) -> None:
        """Refuse a device that this build has no kernels for.

        Raises:
            RuntimeUnavailableError: it is neither a CPU nor a CUDA device, or CUDA is left out.
        """
        if device.type not in _DEVICES:
            raise RuntimeUnavailableError(
                f"device={device} has no kernels of ours; move the model to cpu or cuda, or ask "
                "for backend='reference'"
            )
        if device.type == "cuda" and not self.has_cuda:
            raise RuntimeUnavailableError(
                f"device={device}: library={self.path} was built without CUDA kernels; put nvcc in "
                "the PATH, set CUDA_HOME or pip install nvidia-cuda-nvcc, run `make setup` again, "
                "or ask for backend='reference'"
            )


@functools.lru_cache(maxsize=1)
def kernels() -> Kernels:
    """The kernels of the installed library.

    Raises:
        RuntimeUnavailableError: there is no library, or this machine cannot load it.
    """
    return Kernels(find_library(LIBRARY))


def runs_on_kernels(tensor: Tensor) -> bool:
    """Whether "auto" runs an operator whose first operand is this on the native kernels.

    It does so for all types but float64, on the CPU and on CUDA devices. Where the library is
    missing, or was built without CUDA, PyTorch computes the same slowly, and a warning says so.
    """
    device = tensor.device.type
    if tensor.dtype == torch.float64 or device not in _DEVICES:
        return False
    try:
        kernels().require(tensor.device)
    except RuntimeUnavailableError as error:
        _warn_slow(device, str(error))
        return False
    return True


@functools.lru_cache(maxsize=len(_DEVICES))
def _warn_slow(device: str, why: str) -> None:
    """Once a process: the reason stays until the library is there."""
    warnings.warn(
        f"vssm: the operators run in PyTorch on {device}, several times slower than their native "
        f"kernels and with the same result: {why}. backend='reference' asks for this without a "
        "warning; backend='kernel' makes it an error",
        RuntimeWarning,
        stacklevel=2,
    )


@dataclass(frozen=True)
class _Call:
    """What all calls with operands of these sizes, types and devices pass.

    Attributes:
        family: of the operator.
        device: of every operand.
        name: of the operator.
        input_count: how many operands there are.
        inputs: their forms.
        like: of each output an operand of its type, by index, and its sizes.
        outputs: their forms.
        attributes: the struct, if the operator has one.
        rest: what follows the outputs: their number where that is passed, the attributes.
    """

    family: _Family
    device: torch.device
    name: bytes
    input_count: Any
    inputs: tuple[bytes, ...]
    like: tuple[tuple[int, tuple[int, ...]], ...]
    outputs: tuple[bytes, ...]
    attributes: tuple[Any, ...]
    rest: tuple[Any, ...]


class _Seen(NamedTuple):
    """What tells one operand from another, but for its numbers."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


# To check and describe operands takes longer than a small convolution, and a layer asks for the
# same in every run.
@functools.lru_cache(maxsize=256)
def _call_of(
    op: OperatorSpec, seen: tuple[Any, ...], attributes: tuple[Any, ...], variant: int
) -> _Call:
    operands = [_Seen(*one) for one in seen]
    named = op.named((*operands, *attributes))
    outputs = [(named[like], shape) for like, shape in output_sizes(op, named)]
    device = _one_device(op, operands)
    family = _FAMILIES[op.name]
    struct_ = family.attributes_of({**named, "variant": variant})
    count = [ctypes.c_int32(len(outputs))] if family.counted else []
    return _Call(
        family=family,
        device=device,
        name=op.name.encode(),
        input_count=ctypes.c_int32(len(seen)),
        inputs=tuple(_form(one.shape, one.dtype) for one in operands),
        like=tuple((operands.index(like), shape) for like, shape in outputs),
        outputs=tuple(_form(shape, like.dtype) for like, shape in outputs),
        attributes=struct_,
        rest=(*count, *struct_),
    )


def _one_device(op: OperatorSpec, operands: Sequence[_Seen]) -> torch.device:
    """The device of all operands: the library cannot tell where a pointer points to."""
    device = operands[0].device
    if operands[0].dtype == torch.float64:
        raise ValueError(
            f"{op.name} {op.inputs[0].name}.dtype=float64: the kernels compute in float32; ask "
            "for backend='reference', or pass float32"
        )
    for operand, one in zip(op.inputs, operands, strict=True):
        if one.device != device:
            raise ValueError(
                f"{op.name} {operand.name}.device={one.device} is not {device}, where "
                f"{op.inputs[0].name} is; move it there"
            )
    return device


def _form(shape: Sequence[int], dtype: torch.dtype) -> bytes:
    """A vssm_tensor behind its data."""
    return _FORM.pack(_CODES[dtype], len(shape), *shape, *(0,) * (_MAX_RANK - len(shape)))


def _tensors(tensors: Sequence[Tensor], forms: Sequence[bytes]) -> bytes:
    """An array of vssm_tensor for contiguous tensors, which must outlive it."""
    pairs = zip(tensors, forms, strict=True)
    return b"".join([part for t, form in pairs for part in (_DATA.pack(t.data_ptr()), form)])


def describe(tensors: Sequence[Tensor]) -> bytes:
    """An array of vssm_tensor for contiguous tensors, which must outlive it."""
    return _tensors(tensors, [_form(t.shape, t.dtype) for t in tensors])


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _launch(device: torch.device, size: int) -> tuple[Any, Tensor]:
    """A launch on the current stream, and its workspace, to be kept until the call returns.

    Afterwards torch may hand it on, in the order of the stream.
    """
    workspace = torch.empty(size + _ALIGNMENT if size else 0, dtype=torch.uint8, device=device)
    aligned = -(-workspace.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    return ctypes.byref(_Launch(stream, aligned if size else None, size)), workspace


def differentiable(op: OperatorSpec) -> tuple[str, ...]:
    """The inputs of a scan or a convolution that have a gradient, in the operator table's order."""
    return tuple(o.name for o in op.inputs if o.dtype != "int32")


def run_backward(op: OperatorSpec, named: Mapping[str, Any], dy: Tensor) -> list[Tensor]:
    """Gradients by every input of floats, from that by y, on as many threads as torch uses.

    Each has the type and strides of its input: what comes before a transposed input is transposed
    too, and goes through its gradient the faster. Computed in float32: half inputs are converted,
    their gradients rounded once.

    Args:
        op: a scan or a convolution.
        named: its inputs, on the CPU in float32, float16 or bfloat16, and its attributes, by name.
        dy: the gradient by y, of its shape.

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
    _call("backward", op, named, (list(inputs.values()), *results), threads)
    del inputs  # copies, where the inputs are not contiguous
    for i, name in enumerate(floats):
        gradients[i] = _laid_out_as(named[name], gradients[i])
    return gradients


def backward_memory(op: OperatorSpec, named: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes that the kernel allocates for `run_backward` of a scan: once, and for each thread.

    The gradients, and copies of inputs that are not contiguous float32, come on top.

    Raises:
        ValueError: a shape breaks the operator's contract.
        RuntimeUnavailableError: there is no library.
    """
    inputs = [named[o.name] for o in op.inputs]
    found = (ctypes.c_int64 * 2)()
    _call("backward_memory", op, named, (inputs,), found)
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
    family = _FAMILIES[op.name]
    failure = kernels().call(
        f"{family.function}_{function}",
        op.name.encode(),
        describe(inputs),
        ctypes.c_int32(len(inputs)),
        *results,
        *family.attributes_of(named),
        last,
    )
    if failure is not None:
        raise ValueError(failure)
