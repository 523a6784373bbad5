"""What a run needs, looked for before anything is started. Standard library only."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_PACKAGES = {
    "torch": "a build for CUDA",
    "numpy": "arrays",
    "onnx": "export",
    "onnxscript": "export",
    "safetensors": "weights",
    "rich": "tables",
    "typer": "the command line under test",
    "pytest": "the tests",
}
_TOOLS = {"cmake": "the build", "ninja": "the build", "c++": "the build"}
OWN_FOLDER = Path(sys.executable).parent  # of a virtual environment that is not activated
CUDA_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/nvidia/bin")  # the latter: containers' driver


def find_tool(name: str) -> str | None:
    """A command in the PATH, beside the interpreter, or in CUDA's folder; CXX names a compiler."""
    if name == "c++":
        return shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++")
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    folders = [str(OWN_FOLDER), *(f"{home}/bin" for home in homes), *CUDA_FOLDERS]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def missing() -> Iterator[str]:
    """What is not there, and what it is for: one line each."""
    if find_tool("nvidia-smi") is None:
        yield "an NVIDIA GPU and its driver (nvidia-smi is not in the PATH)"
    elif not (nvidia_smi("-L") or "").strip():
        yield "an NVIDIA GPU (nvidia-smi -L lists none)"
    elif importlib.util.find_spec("torch") is not None:
        answer = _output([sys.executable, "-c", _GPU]) or "importing torch fails"
        if answer != "gpu":
            yield f"a PyTorch that can use the GPU ({answer})"
    if find_tool("nvcc") is None:
        yield "nvcc, CUDA's compiler (put it in the PATH or set CUDA_HOME)"
    for name, purpose in _TOOLS.items():
        if find_tool(name) is None:
            yield f"{name}, for {purpose}"
    for name, purpose in _PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            yield f"the Python package {name}, for {purpose} ({sys.executable})"


_GPU = """
import warnings
warnings.simplefilter("ignore")
import torch
usable = torch.cuda.is_available()
print("gpu" if usable else f"torch {torch.__version__} finds no CUDA device")
"""


def nvidia_smi(*arguments: str) -> str | None:
    """What it prints, None where it is not there or fails."""
    return _output([find_tool("nvidia-smi") or "nvidia-smi", *arguments])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def main() -> int:
    """Say what is missing; 2 where anything is."""
    found = list(missing())
    if found:
        print("gpu_check: cannot run here, for want of", file=sys.stderr)
        for line in found:
            print(f"  - {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
