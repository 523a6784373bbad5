"""Our kernels through the C ABI (plugins/c/vssm.h), every operand and output made beforehand.

PyTorch's own way to them chooses the variant itself; here each can be asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from exporter.errors import RuntimeUnavailableError
from exporter.runtimes.library import find_library

VARIANTS = {"auto": 0, "throughput": 1, "latency": 2}
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int32: 3}
_ERROR_BYTES = 512


class _Tensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 4),
    ]


class _Launch(ctypes.Structure):
    _fields_: ClassVar = [
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
    ]


class _Scan(ctypes.Structure):
    _fields_: ClassVar = [
        ("delta_softplus", ctypes.c_int64),
        ("params_by_step", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("variant", ctypes.c_int32),
    ]


class _Gather(ctypes.Structure):
    _fields_: ClassVar = [("num_keep", ctypes.c_int64), ("protected_position", ctypes.c_int64)]


class Kernels:
    """The library at `path`, by default the one of this checkout."""

    def __init__(self, path: Path | None = None) -> None:
        path = path or find_library("vssm")
        self._library = ctypes.CDLL(str(path))
        if not self._library.vssm_has_cuda():
            raise RuntimeUnavailableError(
                f"path={path} was built without CUDA; put nvcc in the PATH and build it again"
            )

    def scan(
        self, operands: dict[str, Tensor], *, variant: str = "auto", params_by_step: bool = False
    ) -> tuple[Callable[[], None], Tensor]:
        """A call of the scan operator on these operands, and the output that it fills."""
        name = "GatedSelectiveScan" if "z" in operands else "SelectiveScan"
        inputs = list(operands.values())
        u = operands["u"]
        y = torch.full((u.shape[0], u.shape[1], u.shape[3]), float("nan")).to(u)
        attributes = _Scan(1, int(params_by_step), 1.0, VARIANTS[variant])
        call = self._call("vssm_selective_scan", name, inputs, attributes, [y], one=True)
        return call, y

    def gather(
        self, score: Tensor, position: Tensor, xs: Sequence[Tensor], num_keep: int
    ) -> tuple[Callable[[], None], list[Tensor]]:
        """A call of TokenGather, and the outputs that it fills: positions, then rows of each x."""
        batch = score.shape[0]
        rows = [x.new_empty(batch, num_keep, x.shape[2]) for x in xs]
        outputs = [position.new_empty(batch, num_keep), *rows]
        name = "TokenGather" if len(xs) == 2 else "TokenGather1"
        inputs = [score, position, *xs]
        attributes = _Gather(num_keep, -1)
        return self._call("vssm_token_gather", name, inputs, attributes, outputs), outputs

    def _call(
        self,
        function: str,
        name: str,
        inputs: Sequence[Tensor],
        attributes: Any,
        outputs: Sequence[Tensor],
        *,
        one: bool = False,
    ) -> Callable[[], None]:
        given = (_Tensor * len(inputs))(*map(_described, inputs))
        made = (_Tensor * len(outputs))(*map(_described, outputs))
        count = ctypes.c_int32(len(inputs))
        operator, by = name.encode(), ctypes.byref(attributes)
        needed = ctypes.c_int64()
        query = self._library[f"{function}_workspace"]
        _checked(query, operator, given, count, by, ctypes.byref(needed))
        device = inputs[0].device
        workspace = torch.empty(needed.value, dtype=torch.uint8, device=device)
        sizes = () if one else (ctypes.c_int32(len(outputs)),)
        run = self._library[function]
        kept = (inputs, outputs, attributes, workspace)  # their memory lives as long as the call

        def call() -> None:
            stream = (
                torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
            )
            launch = _Launch(stream, kept[-1].data_ptr() or None, needed.value)
            _checked(run, operator, given, count, made, *sizes, by, ctypes.byref(launch))

        return call


def _described(tensor: Tensor) -> _Tensor:
    if not tensor.is_contiguous():
        raise ValueError(
            f"shape={tuple(tensor.shape)} is not contiguous; the kernels take no other"
        )
    dims = (ctypes.c_int64 * 4)(*tensor.shape)
    return _Tensor(tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.dim(), dims)


def _checked(function: Any, *arguments: Any) -> None:
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    if function(*arguments, error, ctypes.c_size_t(_ERROR_BYTES)):
        raise RuntimeError(error.value.decode(errors="replace"))
