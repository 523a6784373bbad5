"""NVIDIA's driver through ctypes: which GPUs there are, asked before anything else is loaded.

Needs the driver's library alone: no CUDA toolkit, no torch, no package. All other calls of CUDA go
through cuda-bindings (`cuda_memory`).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final

from vssm.errors import RuntimeUnavailableError

LIBRARY: Final = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
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
    # Devices cannot be asked for before this; 0 is the only value that it takes.
    _call(library, "cuInit", 0)
    version, count = ctypes.c_int(), ctypes.c_int()
    _call(library, "cuDriverGetVersion", ctypes.byref(version))
    # Counts what CUDA_VISIBLE_DEVICES leaves, in the order that the runtime has them.
    _call(library, "cuDeviceGetCount", ctypes.byref(count))
    # CUDA writes 12.9 as 12090.
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
        raise ValueError(f"device={ordinal} is not one of the GPUs here ({found}); choose one")
    return gpus[ordinal]
