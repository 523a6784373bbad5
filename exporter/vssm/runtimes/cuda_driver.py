"""NVIDIA's driver through ctypes: which GPUs there are, and times taken by the GPU itself.

Needs the driver's library alone: no CUDA toolkit, no torch, no package.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from vssm.errors import RuntimeUnavailableError

LIBRARY: Final = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy default stream
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """One device: its ordinal, its name, and its compute capability, such as (9, 0)."""

    ordinal: int
    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name} (sm_{major}{minor})"


@dataclass(frozen=True)
class Driver:
    """The newest CUDA that the driver runs, such as (13, 0), and its devices."""

    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


def _load() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise RuntimeUnavailableError(
            f"library={LIBRARY} cannot be loaded ({error}): there is no NVIDIA driver here; use a "
            "machine with an NVIDIA GPU and its driver, or runtime='ort-cpu'"
        ) from error


def _call(library: ctypes.CDLL, function: str, *arguments: Any) -> None:
    status = int(library[function](*arguments))
    if status != 0:
        text = ctypes.c_char_p()
        library["cuGetErrorString"](status, ctypes.byref(text))
        reason = text.value.decode() if text.value else "no text"
        raise RuntimeUnavailableError(
            f"NVIDIA driver: {function} failed with {status} ({reason}); see whether nvidia-smi "
            "runs, and whether CUDA_VISIBLE_DEVICES hides the GPU"
        )


def driver() -> Driver:
    """The driver and its GPUs.

    Raises:
        RuntimeUnavailableError: there is no driver, or it does not answer.
    """
    library = _load()
    _call(library, "cuInit", 0)
    version, count = ctypes.c_int(), ctypes.c_int()
    _call(library, "cuDriverGetVersion", ctypes.byref(version))
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    cuda = (version.value // 1000, version.value % 1000 // 10)
    return Driver(cuda, tuple(_gpu(library, i) for i in range(count.value)))


def _gpu(library: ctypes.CDLL, ordinal: int) -> Gpu:
    device = ctypes.c_int()
    _call(library, "cuDeviceGet", ctypes.byref(device), ordinal)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _call(library, "cuDeviceGetName", name, _NAME_BYTES, device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _call(library, "cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    return Gpu(ordinal, name.value.decode(), (attribute(_MAJOR), attribute(_MINOR)))


def find_gpu(ordinal: int) -> Gpu:
    """The GPU of this ordinal.

    Raises:
        RuntimeUnavailableError: there is no driver, or no GPU.
        ValueError: there is none of this ordinal.
    """
    gpus = driver().gpus
    if not gpus:
        raise RuntimeUnavailableError(
            "the NVIDIA driver sees no GPU; unset CUDA_VISIBLE_DEVICES, or use runtime='ort-cpu'"
        )
    if not 0 <= ordinal < len(gpus):
        found = ", ".join(f"{g.ordinal}: {g}" for g in gpus)
        raise ValueError(f"device={ordinal} is none of the GPUs here ({found}); choose one")
    return gpus[ordinal]


class Stream:
    """A CUDA stream of a device, and what the device takes for work that is put on it.

    Lives in the device's primary context, the one that ONNX Runtime and PyTorch use too.

    Raises:
        RuntimeUnavailableError: there is no driver, or it refuses.
    """

    def __init__(self, ordinal: int) -> None:
        self._library = _load()
        self._handles: list[tuple[str, ctypes.c_void_p]] = []
        self._device = ctypes.c_int()
        _call(self._library, "cuInit", 0)
        _call(self._library, "cuDeviceGet", ctypes.byref(self._device), ordinal)
        context = ctypes.c_void_p()
        _call(self._library, "cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._context: ctypes.c_void_p | None = context
        try:
            _call(self._library, "cuCtxSetCurrent", context)
            self._stream = self._make("cuStreamCreate", "cuStreamDestroy_v2", _NON_BLOCKING)
            self._start = self._make("cuEventCreate", "cuEventDestroy_v2", 0)
            self._end = self._make("cuEventCreate", "cuEventDestroy_v2", 0)
        except RuntimeUnavailableError:
            self.close()
            raise

    def _make(self, create: str, destroy: str, flags: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        _call(self._library, create, ctypes.byref(handle), flags)
        self._handles.append((destroy, handle))
        return handle

    @property
    def address(self) -> int:
        """The cudaStream_t as a number, which is what ONNX Runtime's options take."""
        return int(self._stream.value or 0)

    def milliseconds(self, work: Callable[[], None]) -> float:
        """Time from the device's start of what `work` puts on the stream to its end.

        `work` must only enqueue: what it waits for on the host lies between the two marks too.
        """
        library = self._library
        _call(library, "cuCtxSetCurrent", self._context)
        _call(library, "cuEventRecord", self._start, self._stream)
        work()
        _call(library, "cuEventRecord", self._end, self._stream)
        _call(library, "cuEventSynchronize", self._end)
        elapsed = ctypes.c_float()
        function = "cuEventElapsedTime"
        _call(library, function, ctypes.byref(elapsed), self._start, self._end)
        return float(elapsed.value)

    def close(self) -> None:
        """Free the stream; what was put on it still ends."""
        if self._context is None:
            return
        for destroy, handle in reversed(self._handles):
            self._library[destroy](handle)
        self._handles.clear()
        self._library["cuDevicePrimaryCtxRelease_v2"](self._device)
        self._context = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
