"""Builds and runs the harness that plays TensorRT, and finds TensorRT's own wheels."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkout import PYTHONPATH, ROOT

from vssm.errors import RuntimeUnavailableError
from vssm.native_library import find_library

SOURCES = ROOT / "tests" / "tensorrt_harness"
# What the harness says that it is: the loggers of the two are different.
VERSIONS = {"TensorRT 10": 101600, "TensorRT 11": 110100}
LEAN = ("lean-10", "lean-11")


@dataclass(frozen=True)
class Harness:
    """The built harness, and the plugin over launchers that do nothing."""

    program: Path
    stub: Path

    def run(
        self, library: Path, *arguments: str, version: int = 101600, prefix: Sequence[str] = ()
    ) -> str:
        """What it printed; a failure of the harness is one of the test."""
        command = [*prefix, str(self.program), "--version", str(version), str(library), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.fail(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout


@functools.cache
def harness(*, sanitize: bool = False) -> Harness:
    """Built on first use, under build/."""
    folder = ROOT / "build" / ("tensorrt_tests_sanitized" if sanitize else "tensorrt_tests")
    return build_harness(folder, f"-DVSSM_SANITIZE={sanitize:d}")


def build_harness(folder: Path, *options: str) -> Harness:
    """The harness with other options, in a folder of its own."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": tools}
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Test files of two processes want it at once, and ninja would write over what the other runs.
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            ["cmake", "-S", SOURCES, "-B", folder, "-G", "Ninja", *options],
            ["cmake", "--build", folder],
        ):
            done = subprocess.run(
                [*map(str, command)], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                pytest.fail(f"{done.stdout[-6000:]}{done.stderr[-2000:]}")
    return Harness(folder / "vssm_tensorrt_harness", folder / "libvssm_tensorrt_stub.so")


def real_library(name: str = "vssm_tensorrt") -> Path:
    """The library that ships; skips where it was not built."""
    try:
        return find_library(name)
    except RuntimeUnavailableError as error:
        pytest.skip(f"built only where there is a CUDA compiler: {error}")


def lean_folder(name: str) -> Path:
    """The folder of a lean runtime; skips where there is none, with what installs it."""
    parent = os.environ.get("VSSM_TENSORRT_WHEELS", Path(sys.prefix) / "tensorrt")
    folder = Path(parent) / name
    if not folder.is_dir():
        wheels = f"tests/tensorrt_harness/wheels/{name}.txt"
        pytest.skip(f"no {folder}; pip install --no-deps --target {folder} -r {wheels}")
    return folder


def rtx_path() -> str:
    """What PYTHONPATH needs so that `tensorrt_rtx_bindings` can be imported; skips without it."""
    wheels = os.environ.get("VSSM_TENSORRT_WHEELS")
    if wheels is not None and (Path(wheels) / "rtx").is_dir():
        return str(Path(wheels) / "rtx")
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip(
            "no tensorrt_rtx_bindings; "
            "pip install --no-deps --no-build-isolation -r tests/tensorrt_harness/wheels/rtx.txt"
        )
    return ""


def run_python(code: str, *arguments: str, path: str | Path, **variables: str) -> str:
    """Output of a script in a process of its own: TensorRT may end it."""
    environment: Mapping[str, str] = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(path), PYTHONPATH]).strip(os.pathsep),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"exit code {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout + done.stderr
