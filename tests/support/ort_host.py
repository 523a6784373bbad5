"""A stand-in for ONNX Runtime's host side: enough of OrtApi to make and run kernels of a library.

It plays the CUDA provider where there is no GPU: "device" memory is host memory, the stream is a
number, and the library under test runs its CUDA kernels in the emulator. Slots and structs are
written down here a second time, from ONNX Runtime's documentation, so that a wrong slot in
plugins/onnxruntime/ort_abi.h shows.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_P, _SIZE, _INT64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
_SLOTS = 400
_FAIL = 1
# OrtCustomOp, in order, up to version 18.
_MEMBERS = (
    *("version", "CreateKernel", "GetName", "GetExecutionProviderType", "GetInputType"),
    *("GetInputTypeCount", "GetOutputType", "GetOutputTypeCount", "KernelCompute"),
    *("KernelDestroy", "GetInputCharacteristic", "GetOutputCharacteristic", "GetInputMemoryType"),
    *("GetVariadicInputMinArity", "GetVariadicInputHomogeneity", "GetVariadicOutputMinArity"),
    *("GetVariadicOutputHomogeneity", "CreateKernelV2", "KernelComputeV2", "InferOutputShapeFn"),
    *("GetStartVersion", "GetEndVersion", "GetMayInplace", "ReleaseMayInplace"),
)
ELEMENT_TYPES = {
    torch.float32: 1,
    torch.int32: 6,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
_DTYPES = {code: dtype for dtype, code in ELEMENT_TYPES.items()}


class HostError(Exception):
    """The status that a library returned."""


class Host:
    """OrtApi, OrtKernelInfo and OrtKernelContext of one library at a time.

    Attributes:
        operators: addresses of the OrtCustomOp structs that the library registered.
        stream: what KernelContext_GetGPUComputeStream answers.
        scratch: the workspace that is lent now, by address.
        lent: bytes of every workspace that was asked for.
        reads: attributes that were read.
    """

    stream = 0x5EED

    def __init__(self, library: Path, version: int = 29) -> None:
        self.backend: list[int] = []
        self.scratch: dict[int, Tensor] = {}
        self.lent: list[int] = []
        self.allocators = 0
        self.attributes: dict[str, int | float] = {}
        self.inputs: list[Tensor] = []
        self.outputs: dict[int, Tensor] = {}
        self.out_of_memory = False
        self._objects: dict[int, Any] = {}
        self._keep: list[Any] = []
        self._table = (_P * _SLOTS)()
        for slot, function in self._functions().items():
            self._table[slot] = ctypes.cast(function, _P).value
        self._library = ctypes.CDLL(str(library))
        self._register(version)

    # The host's side of registration.

    def _register(self, version: int) -> None:
        def get_api(asked: int) -> int | None:
            return ctypes.addressof(self._table) if asked <= version else None

        base = (_P * 2)()
        function = ctypes.CFUNCTYPE(_P, ctypes.c_uint32)(get_api)
        base[0] = ctypes.cast(function, _P).value
        self._keep += [function, base]
        call = self._library.RegisterCustomOps
        call.restype, call.argtypes = _P, [_P, _P]
        self._raise(call(self._handle("options"), ctypes.addressof(base)))

    def find(
        self, name: str, provider: str, dtypes: Mapping[str, torch.dtype] | None = None
    ) -> int:
        """The registered operator of this name, provider and types of inputs, in their order."""
        for op in self.backend:
            if (self._text(op, "GetName"), self._text(op, "GetExecutionProviderType")) != (
                name,
                provider,
            ):
                continue
            types = [self._type(op, "GetInputType", i) for i in range(self._count(op))]
            if dtypes is None or types == list(dtypes.values()):
                return op
        raise KeyError(f"{name} on {provider} with {dtypes}")

    def providers(self) -> list[tuple[str, str]]:
        """(operator, provider) of everything that was registered."""
        return [
            (self._text(op, "GetName"), self._text(op, "GetExecutionProviderType"))
            for op in self.backend
        ]

    def in_place(self, op: int) -> list[tuple[int, int]]:
        """The (input, output) pairs that may share memory."""
        offset = op + 8 * _MEMBERS.index("GetMayInplace")
        version = ctypes.c_uint32.from_address(op).value
        address = _P.from_address(offset).value if version >= 18 else None
        if address is None:
            return []
        pointers = [ctypes.POINTER(ctypes.c_int)() for _ in range(2)]
        places = [ctypes.byref(p) for p in pointers]
        count = ctypes.CFUNCTYPE(_SIZE, _P, _P)(address)(*places)
        pairs = [(pointers[0][i], pointers[1][i]) for i in range(count)]
        self._member(op, "ReleaseMayInplace", None, _P, _P)(*pointers)
        return pairs

    # A node's life.

    def run(
        self, op: int, inputs: Mapping[str, Tensor], attributes: Mapping[str, int | float]
    ) -> list[Tensor]:
        """Make a kernel, run it once, destroy it; the outputs in order."""
        kernel = self.create(op, attributes)
        try:
            return self.compute(op, kernel, inputs)
        finally:
            self.destroy(op, kernel)

    def create(self, op: int, attributes: Mapping[str, int | float]) -> int:
        """CreateKernelV2."""
        self.attributes = dict(attributes)
        kernel = _P()
        call = self._member(op, "CreateKernelV2", _P, _P, _P, _P, ctypes.POINTER(_P))
        table = ctypes.addressof(self._table)
        self._raise(call(op, table, self._handle("kernel info"), ctypes.byref(kernel)))
        assert kernel.value is not None
        return kernel.value

    def compute(self, op: int, kernel: int, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """KernelComputeV2."""
        self.inputs, self.outputs = list(inputs.values()), {}
        call = self._member(op, "KernelComputeV2", _P, _P, _P)
        self._raise(call(kernel, self._handle("kernel context")))
        return [self.outputs[i] for i in sorted(self.outputs)]

    def destroy(self, op: int, kernel: int) -> None:
        """KernelDestroy."""
        self._member(op, "KernelDestroy", None, _P)(kernel)

    def count(self, function: str) -> int:
        """What an exported counter of the library says."""
        call = self._library[function]
        call.restype = ctypes.c_uint64
        return int(call())

    # Structs and handles.

    def _member(self, op: int, name: str, result: Any, *arguments: Any) -> Any:
        address = _P.from_address(op + 8 * _MEMBERS.index(name)).value
        assert address is not None, name
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    def _text(self, op: int, name: str) -> str:
        return str(self._member(op, name, ctypes.c_char_p, _P)(op).decode())

    def _count(self, op: int) -> int:
        return int(self._member(op, "GetInputTypeCount", _SIZE, _P)(op))

    def _type(self, op: int, name: str, index: int) -> torch.dtype:
        return _DTYPES[self._member(op, name, ctypes.c_int, _P, _SIZE)(op, index)]

    def _handle(self, value: Any) -> int:
        """An opaque address for an object of this host; one that nobody may follow."""
        address = 0x1000 + 16 * len(self._objects)
        self._objects[address] = value
        return address

    def _raise(self, status: int | None) -> None:
        if status is not None:
            raise HostError(self._objects[status][1].decode())

    # OrtApi.

    def _functions(self) -> dict[int, Any]:
        shape = [_P, ctypes.POINTER(_INT64), _SIZE]
        entries: dict[int, tuple[Callable[..., Any], Any, list[Any]]] = {
            0: (self._create_status, _P, [ctypes.c_int, ctypes.c_char_p]),
            1: (lambda status: self._objects[status][0], ctypes.c_int, [_P]),
            2: (self._message, _P, [_P]),
            26: (self._create_domain, _P, [ctypes.c_char_p, ctypes.POINTER(_P)]),
            27: (self._add, _P, [_P, _P]),
            28: (lambda *_: None, _P, [_P, _P]),
            51: (self._data, _P, [_P, ctypes.POINTER(_P)]),
            60: (self._element_type, _P, [_P, ctypes.POINTER(ctypes.c_int)]),
            61: (self._rank, _P, [_P, ctypes.POINTER(_SIZE)]),
            62: (self._dims, _P, shape),
            65: (self._type_and_shape, _P, [_P, ctypes.POINTER(_P)]),
            76: (self._free, _P, [_P, _P]),
            77: (self._memory_info, _P, [_P, ctypes.POINTER(_P)]),
            85: (self._attribute(float), _P, _attribute(ctypes.c_float)),
            86: (self._attribute(int), _P, _attribute(_INT64)),
            87: (
                lambda *_: self._error("no attribute of strings"),
                _P,
                [_P, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_SIZE)],
            ),
            90: (self._input, _P, [_P, _SIZE, ctypes.POINTER(_P)]),
            91: (
                self._output,
                _P,
                [_P, _SIZE, ctypes.POINTER(_INT64), _SIZE, ctypes.POINTER(_P)],
            ),
            93: (lambda status: self._objects.pop(status) and None, None, [_P]),
            99: (lambda _: None, None, [_P]),
            101: (lambda _: None, None, [_P]),
            132: (self._release_allocator, None, [_P]),
            193: (self._get_stream, _P, [_P, ctypes.POINTER(_P)]),
            234: (
                lambda *_: self._error("no type info"),
                _P,
                [_P, _SIZE, ctypes.POINTER(_P)],
            ),
            277: (self._get_scratch, _P, [_P, _P, _SIZE, ctypes.POINTER(_P)]),
            278: (self._get_allocator, _P, [_P, ctypes.c_int, ctypes.POINTER(_P)]),
        }
        functions = {
            slot: ctypes.CFUNCTYPE(result, *arguments)(function)
            for slot, (function, result, arguments) in entries.items()
        }
        self._keep += functions.values()
        return functions

    def _error(self, text: str) -> int:
        return self._handle((_FAIL, text.encode()))

    def _create_status(self, code: int, message: bytes) -> int:
        return self._handle((code, bytes(message)))

    @functools.cache  # noqa: B019 - the address must live as long as the host
    def _bytes(self, text: bytes) -> Any:
        return ctypes.create_string_buffer(text)

    def _message(self, status: int) -> int:
        return ctypes.addressof(self._bytes(self._objects[status][1]))

    def _create_domain(self, name: bytes, out: Any) -> None:
        assert name == b"vssm"
        out[0] = self._handle("domain")

    def _add(self, domain: int, op: int) -> None:
        assert self._objects[domain] == "domain"
        self.backend.append(op)

    def _data(self, value: int, out: Any) -> None:
        out[0] = self._objects[value].data_ptr()

    def _element_type(self, info: int, out: Any) -> None:
        out[0] = ELEMENT_TYPES[self._objects[info].dtype]

    def _rank(self, info: int, out: Any) -> None:
        out[0] = self._objects[info].dim()

    def _dims(self, info: int, out: Any, count: int) -> None:
        for i in range(count):
            out[i] = self._objects[info].shape[i]

    def _type_and_shape(self, value: int, out: Any) -> None:
        out[0] = self._handle(self._objects[value])

    def _attribute(self, kind: type[int] | type[float]) -> Callable[..., int | None]:
        def read(_: int, name: bytes, out: Any) -> int | None:
            value = self.attributes.get(name.decode())
            if type(value) is not kind:
                return self._error(f"no {kind.__name__} {name.decode()}")
            out[0] = value
            return None

        return read

    def _input(self, _: int, index: int, out: Any) -> None:
        out[0] = self._handle(self.inputs[index])

    def _output(self, _: int, index: int, dims: Any, rank: int, out: Any) -> None:
        shape = [dims[i] for i in range(rank)]
        like = self.inputs[0] if index == 0 else self.inputs[1 + index]
        dtype = torch.int32 if self.attributes.get("num_keep") and index == 0 else like.dtype
        poison = -7 if dtype == torch.int32 else float("nan")
        self.outputs[index] = torch.full(shape, poison, dtype=dtype)
        out[0] = self._handle(self.outputs[index])

    def _get_stream(self, _: int, out: Any) -> None:
        out[0] = self.stream

    def _get_allocator(self, _: int, kind: int, out: Any) -> None:
        assert kind == 0, "OrtMemTypeDefault"
        self.allocators += 1
        out[0] = self._handle("allocator")

    def _release_allocator(self, allocator: int) -> None:
        assert self._objects[allocator] == "allocator"
        self.allocators -= 1

    def _memory_info(self, allocator: int, out: Any) -> None:
        assert self._objects[allocator] == "allocator"
        out[0] = self._handle("device memory")

    def _get_scratch(self, _: int, info: int, size: int, out: Any) -> int | None:
        assert self._objects[info] == "device memory"
        if self.out_of_memory:
            return self._error("arena is full")
        self.lent.append(size)
        memory = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
        address = -(-memory.data_ptr() // 256) * 256
        self.scratch[address] = memory
        out[0] = address
        return None

    def _free(self, allocator: int, address: int) -> None:
        assert self._objects[allocator] == "allocator"
        del self.scratch[address]


def _attribute(kind: Any) -> list[Any]:
    return [_P, ctypes.c_char_p, ctypes.POINTER(kind)]
