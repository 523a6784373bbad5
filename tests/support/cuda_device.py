"""Runs operators through the C ABI: the CUDA kernels in emulation, or on a GPU; the CPU kernels.

Every tensor lies between guards in memory full of NaN, as does the workspace. In emulation device
memory is host memory.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from guarded import Memory
from native import found_library, output_shapes, output_types
from torch import Tensor

from vssm.ops.spec import CONV_OPERATORS, OPERATORS, SCAN_OPERATORS, TOKEN_SCATTER

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int32: 3}
VARIANTS = {"auto": 0, "throughput": 1, "latency": 2}
H100 = {"sm_count": 132, "shared_bytes": 227 << 10}
SMALL_CARD = {"sm_count": 8, "shared_bytes": 48 << 10}
_SCANS = {spec.name for spec in SCAN_OPERATORS}
_CONVOLUTIONS = {spec.name for spec in CONV_OPERATORS}
_FAMILIES = dict.fromkeys(_CONVOLUTIONS, "vssm_token_conv")
_FAMILIES[TOKEN_SCATTER.name] = "vssm_token_scatter"


class CTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 4),
    )


class CLaunch(ctypes.Structure):
    _fields_ = (
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
    )


class CScanAttributes(ctypes.Structure):
    _fields_ = (
        ("delta_softplus", ctypes.c_int64),
        ("params_by_step", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("variant", ctypes.c_int16),
        ("direction_axis", ctypes.c_int16),
    )


class CGatherAttributes(ctypes.Structure):
    _fields_ = (("num_keep", ctypes.c_int64), ("protected_position", ctypes.c_int64))


class CConvAttributes(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("by_position", "activation", "grid_height", "grid_width", "group")
    )


CAttributes: TypeAlias = CScanAttributes | CGatherAttributes | CConvAttributes | None


class OperatorError(Exception):
    """What the C ABI answered."""


@dataclass(frozen=True)
class Backend:
    """One build of the C ABI, and where its tensors live."""

    name: str
    library: str
    device: str
    launches: bool = True  # False: the CPU kernels

    def __str__(self) -> str:
        return self.name

    def load(self) -> ctypes.CDLL:
        override = os.environ.get("VSSM_EMULATED_LIBRARY") if self.name == "emulated" else None
        return _load(Path(override) if override else found_library(self.library))

    @contextmanager
    def seed(self, value: int) -> Iterator[None]:
        """Another order of blocks and threads; a GPU has its own."""
        if self.name != "emulated":
            yield
            return
        set_seed = self.load().vssm_emulation_set_seed
        set_seed(ctypes.c_uint64(value))
        try:
            yield
        finally:
            set_seed(ctypes.c_uint64(0))

    @contextmanager
    def card(self, sm_count: int, shared_bytes: int) -> Iterator[None]:
        """Another emulated GPU; a real one is as it is."""
        if self.name != "emulated":
            yield
            return
        set_device = self.load().vssm_emulation_set_device
        set_device(sm_count, shared_bytes)
        try:
            yield
        finally:
            set_device(*H100.values())


EMULATED = Backend("emulated", "vssm_emulated", "cpu")
CUDA = Backend("cuda", "vssm", "cuda")
HOST = Backend("host", "vssm", "cpu", launches=False)
# For `parametrize`: what runs the CUDA kernels here.
DEVICES = [EMULATED, pytest.param(CUDA, marks=pytest.mark.gpu)]


@functools.lru_cache(maxsize=8)
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.vssm_version.restype = ctypes.c_char_p
    library.vssm_operator_table.restype = ctypes.c_char_p
    return library


def describe(memory: Memory) -> CTensor:
    dims = tuple(memory.tensor.shape)
    padded = (ctypes.c_int64 * 4)(*dims)
    return CTensor(memory.address, DTYPE_CODES[memory.tensor.dtype], len(dims), padded)


@dataclass
class Call:
    """One operator with its memory: enqueue it as often as wanted, then ask for the results."""

    backend: Backend
    device: str
    name: str
    attributes: CAttributes
    inputs: dict[str, Memory]
    outputs: dict[str, Memory]
    copies: dict[str, Tensor]
    workspace: Memory = field(init=False)

    def __post_init__(self) -> None:
        bytes_ = self.workspace_bytes() if self.backend.launches else 0
        empty = torch.empty(bytes_ + 256, dtype=torch.uint8)
        self.workspace = Memory(empty, self.device)

    def workspace_bytes(self) -> int:
        found = ctypes.c_int64(-1)
        self._call(f"{self._family}_workspace", ctypes.byref(found))
        return found.value

    def enqueue(self, stream: int | None = None) -> None:
        """Runs it: on the CPU when this returns, on a GPU when the stream gets there."""
        outputs = _array([describe(memory) for memory in self.outputs.values()])
        count = (ctypes.c_int32(len(outputs)),) if self._family == "vssm_token_gather" else ()
        launch = None
        if self.backend.launches:
            launch = ctypes.byref(self._launch(stream))
        everything = [*self.inputs.values(), *self.outputs.values(), self.workspace]
        for memory in everything:
            memory.close(True)
        try:
            self._call(self._family, launch, outputs=(outputs, *count))
        finally:
            for memory in everything:
                memory.close(False)

    def results(self) -> dict[str, Tensor]:
        """Outputs on the CPU, once guards and inputs are seen to be untouched."""
        if self.backend is CUDA:
            torch.cuda.synchronize(self.device)
        for name, memory in (self.inputs | self.outputs | {"workspace": self.workspace}).items():
            memory.check(f"{self.name}: {name}")
        for name, copy in self.copies.items():
            same = torch.equal(_bits(self.inputs[name].tensor.cpu()), _bits(copy))
            assert same, f"{self.name}: input {name} was changed"
        return {name: memory.tensor.cpu().clone() for name, memory in self.outputs.items()}

    @property
    def _family(self) -> str:
        if self.name in _FAMILIES:
            return _FAMILIES[self.name]
        return "vssm_selective_scan" if self.name in _SCANS else "vssm_token_gather"

    def _launch(self, stream: int | None) -> CLaunch:
        aligned = -(-self.workspace.address // 256) * 256
        end = self.workspace.address + self.workspace.tensor.numel()
        return CLaunch(stream, aligned, end - aligned)

    def _call(self, function: str, last: object, outputs: Sequence[object] = ()) -> None:
        error = ctypes.create_string_buffer(512)
        inputs = _array([describe(memory) for memory in self.inputs.values()])
        attributes = () if self.attributes is None else (ctypes.byref(self.attributes),)
        failed = getattr(self.backend.load(), function)(
            self.name.encode(),
            inputs,
            ctypes.c_int32(len(inputs)),
            *outputs,
            *attributes,
            last,
            error,
            ctypes.c_size_t(len(error)),
        )
        if failed:
            raise OperatorError(error.value.decode())


def prepare(
    backend: Backend,
    name: str,
    inputs: Mapping[str, Tensor],
    *,
    shift: int = 0,
    device: str | None = None,
    **attributes: float,
) -> Call:
    """Memory and description of one call.

    Args:
        backend: what runs it.
        name: the operator's.
        inputs: by name, on the CPU.
        shift: elements by which every tensor is off the alignment that its buffer has.
        device: another torch device than the backend's.
        **attributes: the operator's, and `variant` of the CUDA scans.
    """
    device = device or backend.device
    ordered = {o.name: inputs[o.name].contiguous() for o in OPERATORS[name].inputs}
    types = output_types(name, ordered)
    shapes = output_shapes(name, ordered, attributes)
    outputs = {n: torch.empty(shape, dtype=types[n]) for n, shape in shapes.items()}
    return Call(
        backend,
        device,
        name,
        _attributes(name, attributes),
        {n: Memory.of(t, device, shift=shift) for n, t in ordered.items()},
        {n: Memory(t, device, shift=shift) for n, t in outputs.items()},
        {n: t.clone() for n, t in ordered.items()},
    )


def run_operator(
    backend: Backend, name: str, inputs: Mapping[str, Tensor], **options: float
) -> dict[str, Tensor]:
    """Outputs of one operator, on the CPU; `options` as for `prepare`."""
    call = prepare(backend, name, inputs, **options)  # type: ignore[arg-type]
    call.enqueue()
    return call.results()


def _attributes(name: str, attributes: Mapping[str, float]) -> CAttributes:
    if name == TOKEN_SCATTER.name:
        return None
    given = {a.name: a.default for a in OPERATORS[name].attributes} | dict(attributes)
    if name in _SCANS:
        return CScanAttributes(**{"variant": 0, **given})
    return (CConvAttributes if name in _CONVOLUTIONS else CGatherAttributes)(**given)


def _array(items: Sequence[CTensor]) -> ctypes.Array[CTensor]:
    return (CTensor * len(items))(*items)


def _bits(tensor: Tensor) -> Tensor:
    """The bytes, so that NaN equals NaN."""
    return tensor.contiguous().view(-1).view(torch.uint8)
