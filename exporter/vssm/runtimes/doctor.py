"""What is on this machine, and what each absent part would need."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vssm._version import __version__
from vssm.errors import VssmError
from vssm.extras import PACKAGES, install_command
from vssm.native_library import find_library
from vssm.runtimes.cuda_driver import Gpu, driver
from vssm.runtimes.cuda_memory import INSTALL as CUDA_INSTALL
from vssm.runtimes.library import TENSORRT_LIBRARY, library_info, library_version
from vssm.runtimes.tensorrt.api import TENSORRT_RTX


@dataclass(frozen=True)
class Finding:
    """One part: whether it is there, what was found, and what would bring it in."""

    part: str
    found: bool
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at every part this package can use; what may crash runs in a process of its own."""
    return [
        Finding("vssm", True, f"{__version__}, Python {platform.python_version()}"),
        Finding("machine", True, _machine()),
        _operator_library(),
        _kernel_library(),
        _cuda_kernels(),
        *(_package(names, remedy) for names, remedy in _PACKAGES),
        *_engines(),
        _providers(),
        _command("C++ compiler", _COMPILERS, "install g++ 9 or newer, or set CXX"),
        _command("CMake", ("cmake",), "pip install cmake"),
        _nvcc(),
        _gpu(),
    ]


_TENSORRT = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")  # pip has it for either CUDA
_PACKAGES = (
    (("onnxruntime", "onnxruntime-gpu"), "pip install onnxruntime: sessions ort-cpu"),
    *(
        ((name.replace("_", "-"),), f"{install_command(name)}: {purpose}")
        for name, (_, purpose) in PACKAGES.items()
    ),
    (_TENSORRT, "pip install tensorrt on a machine with an NVIDIA GPU: TensorRT engines"),
    (
        ("mamba-ssm",),
        "pip install mamba-ssm where its CUDA extension builds: a baseline to measure",
    ),
)


# CXX first, as CMake looks for it.
_COMPILERS = (*filter(None, [os.environ.get("CXX")]), "c++", "g++", "clang++")


def _machine() -> str:
    flags = ""
    try:
        with open("/proc/cpuinfo") as file:
            # x86 calls the line "flags", ARM "Features".
            words = set(next((x for x in file if x.startswith(("flags", "Features"))), "").split())
        flags = ", ".join(f for f in ("avx2", "fma", "avx512f", "asimd") if f in words)
    except OSError:
        pass
    return (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {flags or 'no vector flags'}"
    )


def _operator_library() -> Finding:
    part = "operator library (ONNX Runtime)"
    try:
        info = library_info()
    except VssmError as error:
        return Finding(part, False, "not found", str(error))
    return Finding(part, True, f"{info.path}, version {info.version}, kernels for {info.cpu_isa}")


def _kernel_library() -> Finding:
    part = "kernel library (PyTorch, C)"
    try:
        return Finding(part, True, str(find_library("vssm")))
    except VssmError as error:
        return Finding(part, False, "not found", str(error))


def _cuda_kernels() -> Finding:
    """The CUDA kernels of the operator library, and whether they run on the GPUs here."""
    part = "CUDA kernels"
    try:
        architectures = library_info().cuda_architectures
    except VssmError as error:
        return Finding(part, False, "no operator library", str(error))
    if not architectures:
        remedy = "nvcc in the PATH, CUDA_HOME or pip install nvidia-cuda-nvcc, then make -B setup"
        return Finding(part, False, "the operator library was built without CUDA", remedy)
    detail = f"compiled for {', '.join(architectures)}"
    for gpu in _gpus():
        if not runs_on(gpu, architectures):
            major, minor = gpu.capability
            remedy = f"make -B setup CUDA_ARCHITECTURES={major}{minor}"
            return Finding(part, False, f"{detail}, but not for {gpu}", remedy)
    return Finding(part, True, detail)


def runs_on(gpu: Gpu, architectures: Sequence[str]) -> bool:
    """Whether code compiled for these architectures, as CMake names them, runs on a GPU.

    Machine code ("80-real") runs on its own major version from its minor on; without "-real" there
    is PTX too, which the driver compiles for anything newer.
    """
    here = gpu.capability
    for name in architectures:
        number, _, kind = name.partition("-")
        if not number.isdigit():
            return True  # "native", "all": CMake knows
        made = divmod(int(number), 10)
        if (made[0] == here[0] if kind == "real" else True) and made <= here:
            return True
    return False


def _gpus() -> tuple[Gpu, ...]:
    try:
        return driver().gpus
    except VssmError:
        return ()


def _package(names: tuple[str, ...], remedy: str) -> Finding:
    """A distribution under any of its names, the usual one first."""
    for name in names:
        try:
            # By its metadata: to import torch alone takes seconds, and a broken package would end
            # the report.
            return Finding(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return Finding(names[0], False, "not installed", remedy)


_ENGINE_PACKAGES = (
    (("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"), f"{TENSORRT_RTX.install}: engines without a GPU"),
    (("cuda-bindings",), f"{CUDA_INSTALL}: sessions on TensorRT, times of a GPU"),
)


def _engines() -> list[Finding]:
    """What `vssm engine` and sessions on engines need besides TensorRT itself."""
    part = "TensorRT plugin library"
    try:
        path = find_library(TENSORRT_LIBRARY)
        plugin = Finding(part, True, f"{path}, version {library_version(path)}")
    except VssmError as error:
        plugin = Finding(part, False, "not found", f"{error}; it takes a CUDA compiler")
    return [plugin, *(_package(names, remedy) for names, remedy in _ENGINE_PACKAGES)]


def _providers() -> Finding:
    part = "ONNX Runtime providers"
    if importlib.util.find_spec("onnxruntime") is None:
        return Finding(part, False, "onnxruntime is not installed", "pip install onnxruntime")
    # In a process of its own: a broken installation must not take the report with it.
    found = _output([sys.executable, "-c", _LIST_PROVIDERS])
    if found is None:
        return Finding(part, False, "onnxruntime does not import", "reinstall onnxruntime")
    return Finding(part, True, found)


_LIST_PROVIDERS = "import onnxruntime; print(', '.join(onnxruntime.get_available_providers()))"


def _command(part: str, names: tuple[str, ...], remedy: str) -> Finding:
    for name in names:
        path = shutil.which(name)
        if path is not None:
            version = _output([path, "--version"]) or "version unknown"
            return Finding(part, True, f"{path}, {version.splitlines()[0]}")
    return Finding(part, False, "not found", remedy)


def _nvcc() -> Finding:
    part = "CUDA compiler"
    remedy = "install the CUDA toolkit, set CUDA_HOME, or pip install nvidia-cuda-nvcc"
    home = os.environ.get("CUDA_HOME")
    packages = Path(sysconfig.get_path("purelib"))
    folders = [f"{home}/bin"] if home else []
    # The toolkits that pip installs are in no PATH; of several, the newest CUDA comes first.
    folders += [str(path) for path in sorted(packages.glob("nvidia/cu[0-9]*/bin"), reverse=True)]
    path = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))
    if path is None:
        return Finding(part, False, "nvcc not found", remedy)
    lines = (_output([path, "--version"]) or "version unknown").splitlines()
    # nvcc prints its build last, behind a copyright.
    return Finding(part, True, f"{path}, {lines[-1]}")


def _gpu() -> Finding:
    part, remedy = "NVIDIA GPU", "a machine with an NVIDIA GPU and its driver"
    try:
        found = driver()
    except VssmError as error:
        # What follows is what a session should do; a finding has a remedy of its own.
        return Finding(part, False, str(error).partition(";")[0], remedy)
    version = ".".join(map(str, found.cuda))
    if not found.gpus:
        return Finding(part, False, f"none, with a driver for CUDA {version}", remedy)
    names = ", ".join(map(str, found.gpus))
    return Finding(part, True, f"{names}, driver for CUDA {version}")


def _output(command: list[str]) -> str | None:
    """What a command prints, None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
