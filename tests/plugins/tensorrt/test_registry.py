"""The plugin libraries in TensorRT's own registries: the lean runtimes 10.16 and 11.4, on a CPU."""

from __future__ import annotations

import os
import subprocess

import pytest
from tensorrt_build import LEAN, ROOT, SOURCES, harness, lean_folder, real_library, run_python

from vssm.ops.spec import OPERATORS

SCRIPT = (ROOT / "tests/tensorrt_harness/registry.py").read_text(encoding="utf-8")
REFUSALS = (
    "node a.node: TokenGather: num_keep=0 is outside [1, seqlen]",
    "node a.node: TokenGather1: length(num_keep)=2",
    "node a.node: TokenGather: type(num_keep)=10",
    "node a.node: GatedSelectiveScan: delta_softplus=2 is outside [0, 1]",
    "node a.node: SelectiveScan: scale=nan is not finite",
    "node a.node: SelectiveScanConstantGap: attribute num_keep is unknown",
)


def _check(shown: str, name: str) -> None:
    assert f"TensorRT {name.removeprefix('lean-')}." in shown
    assert ": 16 plugins" in shown
    assert [line for line in REFUSALS if line not in shown] == []


@pytest.mark.parametrize("name", LEAN)
def test_registry_loads_the_adapters(name):
    """Over launchers that do nothing: needs no CUDA compiler."""
    path = lean_folder(name)
    _check(run_python(SCRIPT, "load_library", str(harness().stub), path=path), name)


@pytest.mark.parametrize("name", LEAN)
@pytest.mark.parametrize(
    ("mode", "library"),
    [("load_library", "vssm_tensorrt"), ("dlopen", "vssm_tensorrt_autoload")],
)
def test_registry_loads_the_library_that_ships(mode, library, name):
    built, path = real_library(library), lean_folder(name)
    _check(run_python(SCRIPT, mode, str(built), path=path), name)


@pytest.mark.parametrize("name", LEAN)
def test_second_library_is_told_off(name):
    """Both libraries in one process: TensorRT keeps the first, and the second says so."""
    first, second = real_library(), real_library("vssm_tensorrt_autoload")
    code = (
        "import ctypes, os, sys\nimport tensorrt_lean_bindings as trt\n"
        "registry = trt.get_plugin_registry()\nregistry.load_library(sys.argv[1])\n"
        "ctypes.CDLL(sys.argv[2])\n"
        "assert registry.get_creator('TokenGather', '1', 'vssm') is not None\nos._exit(0)"
    )
    shown = run_python(code, str(first), str(second), path=lean_folder(name))
    assert f"vssm: autoload: TensorRT refused {len(OPERATORS)} of the creators" in shown


@pytest.mark.parametrize("name", LEAN)
def test_preload(name, tmp_path):
    """A program that is linked with TensorRT gets the plugins from LD_PRELOAD, as trtexec would."""
    path, library = lean_folder(name), real_library("vssm_tensorrt_autoload")
    (runtime,) = (path / "tensorrt_lean_libs").glob("libnvinfer_lean.so.*")
    program = tmp_path / "preload"
    compiler = [*os.environ.get("CXX", "c++").split(), "-std=c++17", f"-I{ROOT}"]
    source = SOURCES / "preload.cpp"
    link = ["-o", program, runtime, f"-Wl,-rpath,{runtime.parent}"]
    subprocess.run([*map(str, [*compiler, source, *link])], check=True)
    for preload, answer in (("", "absent"), (str(library), "found")):
        environment = {**os.environ, "LD_PRELOAD": preload}
        shown = subprocess.check_output([str(program)], env=environment, text=True)
        assert shown.strip() == answer
