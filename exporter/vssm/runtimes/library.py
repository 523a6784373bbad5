"""Asks the native libraries what they are. Standard library only."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import vssm
from vssm.errors import RuntimeUnavailableError
from vssm.native_library import find_library, load_library

TENSORRT_LIBRARY = "vssm_tensorrt"
C_LIBRARY = "vssm"
ISA_NAMES = ("baseline", "avx2", "avx512")


@dataclass(frozen=True)
class LibraryInfo:
    """What the ONNX Runtime library says of itself.

    Attributes:
        path: its file.
        version: the package version that it was built from.
        cpu_isa: the instruction set that its CPU kernels run on now.
        operators: names of the operators that it has.
        cuda_architectures: GPUs that its CUDA kernels were compiled for, as CMake names them; the
            ones without "-real" as PTX too. Empty in a build without CUDA.
    """

    path: Path
    version: str
    cpu_isa: str
    operators: tuple[str, ...]
    cuda_architectures: tuple[str, ...] = ()


def _text(library: ctypes.CDLL, function: str) -> str:
    call = library[function]
    call.restype = ctypes.c_char_p
    result = call()
    return result.decode() if isinstance(result, bytes) else ""


def load_table(path: Path | None = None) -> str:
    """The operator table of the ONNX Runtime library, as `vssm.ops.spec.describe_table` prints it.

    Raises:
        RuntimeUnavailableError: there is no library, or it cannot be loaded.
    """
    return _text(load_library(path or find_library()), "vssm_operator_table")


def library_info(path: Path | None = None) -> LibraryInfo:
    """Path, version, instruction set and operators of the ONNX Runtime library.

    Raises:
        RuntimeUnavailableError: there is no library, it cannot be loaded, or the environment
            variable VSSM_CPU_ISA asks for an instruction set that is not there.
    """
    path = path or find_library()
    library = load_library(path)
    isa = _text(library, "vssm_cpu_isa")
    # The library throws nothing across its boundary, so a bad VSSM_CPU_ISA comes back as text.
    if isa.startswith("error: "):
        raise RuntimeUnavailableError(isa.removeprefix("error: "))
    operators = tuple(line.partition("(")[0] for line in load_table(path).splitlines())
    return LibraryInfo(
        path=path,
        version=_text(library, "vssm_version"),
        cpu_isa=isa,
        operators=operators,
        cuda_architectures=tuple(
            filter(None, _text(library, "vssm_cuda_architectures").split(","))
        ),
    )


def library_version(path: Path) -> str:
    """The version that any of our libraries was built as.

    Raises:
        RuntimeUnavailableError: it cannot be loaded.
    """
    return _text(load_library(path), "vssm_version")


def kernel_calls(path: Path | None = None) -> int:
    """How many times an operator of the ONNX Runtime library has run in this process, on the CPU.

    Raises:
        RuntimeUnavailableError: there is no library, or it cannot be loaded.
    """
    return _counter("vssm_kernel_calls", path)


def cuda_kernel_calls(path: Path | None = None) -> int:
    """The same on ONNX Runtime's CUDA provider."""
    return _counter("vssm_cuda_kernel_calls", path)


def _counter(function: str, path: Path | None) -> int:
    call = load_library(path or find_library())[function]
    # ctypes takes a C int by default, which would cut the counter off.
    call.restype = ctypes.c_uint64
    return int(call())


def exp2_rate(isa: str | None = None, seconds: float = 0.2) -> float:
    """Evaluations per second of one thread of the kernels' exp2: the floor of a scan.

    Args:
        isa: "baseline", "avx2" or "avx512"; None for the one that the kernels would run on.
        seconds: how long to measure; the best sample counts.

    Raises:
        ValueError: `isa` is not one of the three.
        RuntimeUnavailableError: this processor or this build lacks it, or there is no library.
    """
    return _rate("vssm_exp2_rate", isa, seconds)


def product_rate(isa: str | None = None, seconds: float = 0.2) -> float:
    """Multiplications per second of one thread, each with an addition; otherwise as `exp2_rate`.

    The floor of a scan with one decay for all states, as Mamba-2 has.
    """
    return _rate("vssm_product_rate", isa, seconds)


def softplus_rate(isa: str | None = None, seconds: float = 0.2) -> float:
    """Evaluations per second of one thread of the kernels' softplus; otherwise as `exp2_rate`.

    A scan takes one for each step of a channel, whatever its states.
    """
    return _rate("vssm_softplus_rate", isa, seconds)


def _rate(function: str, isa: str | None, seconds: float) -> float:
    isa = isa or library_info().cpu_isa
    if isa not in ISA_NAMES:
        raise ValueError(f"isa={isa!r} is not one of {', '.join(ISA_NAMES)}; choose one of these")
    call = load_library(find_library(C_LIBRARY))[function]
    call.restype = ctypes.c_double
    # Without these, ctypes refuses a Python float.
    call.argtypes = [ctypes.c_char_p, ctypes.c_double]
    rate = float(call(isa.encode(), seconds))
    # The C function's word for an instruction set that is not there.
    if rate < 0:
        raise RuntimeUnavailableError(
            f"isa={isa!r} is an instruction set that this processor or this build lacks; "
            "ask for the one that library_info().cpu_isa names"
        )
    return rate


def find_sources() -> Path:
    """Folder of the native sources: the checkout, or the copy that the installed package carries.

    Raises:
        RuntimeUnavailableError: there is neither.
    """
    folders = [Path(folder) for folder in vssm.__path__]
    # A checkout has them two folders above exporter/vssm, an installed package below itself.
    for root in (*(f.parents[1] for f in folders), *(f / "sources" for f in folders)):
        if (root / "CMakeLists.txt").is_file() and (root / "plugins/CMakeLists.txt").is_file():
            return root
    raise RuntimeUnavailableError(
        f"the native sources are in none of {', '.join(str(f / 'sources') for f in folders)}, nor "
        "is this a checkout; install the package again"
    )
