"""What is on this machine, and what each absent part would need."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

from exporter._version import __version__
from exporter.errors import VssmError
from exporter.runtimes.library import (
    TENSORRT_LIBRARY,
    find_library,
    library_info,
    library_version,
)
from exporter.runtimes.tensorrt_api import TENSORRT_RTX


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
        Finding("vssm-exporter", True, f"{__version__}, Python {platform.python_version()}"),
        Finding("machine", True, _machine()),
        _operator_library(),
        *(_package(names, remedy) for names, remedy in _PACKAGES),
        *_engines(),
        _providers(),
        _command("C++ compiler", _COMPILERS, "install g++ 9 or newer, or set CXX"),
        _command("CMake", ("cmake",), "pip install cmake"),
        _nvcc(),
        _gpu(),
    ]


_PACKAGES = (
    (("torch",), "pip install torch: models, export, the oracle"),
    (("onnx",), "pip install onnx: export and check"),
    (("onnxruntime", "onnxruntime-gpu"), "pip install onnxruntime: sessions ort-cpu"),
    (("matplotlib",), "pip install matplotlib: plots in reports"),
    (("tensorrt",), "pip install tensorrt on a machine with an NVIDIA GPU: TensorRT engines"),
)


_COMPILERS = (*filter(None, [os.environ.get("CXX")]), "c++", "g++", "clang++")


def _machine() -> str:
    flags = ""
    try:
        with open("/proc/cpuinfo") as file:
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


def _package(names: tuple[str, ...], remedy: str) -> Finding:
    """A distribution under any of its names, the usual one first."""
    for name in names:
        try:
            return Finding(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return Finding(names[0], False, "not installed", remedy)


_ENGINE_PACKAGES = (
    (("tensorrt-rtx-cu13",), f"{TENSORRT_RTX.install}: engines without a GPU"),
    (("cuda-bindings",), "pip install cuda-bindings: sessions on TensorRT"),
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
    part, remedy = "CUDA compiler", "install the CUDA toolkit, or set CUDA_HOME"
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)
    if path is None:
        return Finding(part, False, "nvcc not found", remedy)
    lines = (_output([path, "--version"]) or "version unknown").splitlines()
    return Finding(part, True, f"{path}, {lines[-1]}")


def _gpu() -> Finding:
    part = "NVIDIA GPU"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    found = _output(query) if shutil.which("nvidia-smi") else None
    if found:
        return Finding(part, True, found)
    driver = "driver library present" if ctypes.util.find_library("cuda") else "no driver"
    return Finding(part, False, driver, "a machine with an NVIDIA GPU and its driver")


def _output(command: list[str]) -> str | None:
    """What a command prints, None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
