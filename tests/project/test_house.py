"""What folders, import-linter and the linters do not say: headers, light imports, public names."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import PYTHONPATH, ROOT

import vssm

_HEADERS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("plugins", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.h")
)
# Rooms of the package that a machine without torch uses.
_RUNNING = ("artifact", "bundle", "commands", "files", "runtimes", "bench.measure")
_RUNNING += ("parity.compare", "pruning.schedule")


def _loaded(statements: str) -> set[str]:
    """Top-level modules that these statements add to a fresh interpreter."""
    code = (
        f"import sys; before = set(sys.modules)\n{statements}\n"
        "sys.stdout.write('\\n'.join({n.partition('.')[0] for n in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_import_needs_numpy_alone() -> None:
    foreign = {n for n in _loaded("import vssm") if n not in sys.stdlib_module_names}
    assert foreign <= {"vssm", "numpy"}
    # What needs torch comes with its first use.
    needs = "vssm.compat.upstream, vssm.load_checkpoint, vssm.export_module, vssm.prune"
    assert "torch" in _loaded(f"import vssm; {needs}")


def test_running_side_opens_without_torch() -> None:
    package = ROOT / "exporter/vssm"
    modules = []
    for room in _RUNNING:
        place = package / room.replace(".", "/")
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        modules += [".".join(f.relative_to(package.parent).with_suffix("").parts) for f in files]
    modules.remove("vssm.runtimes.torch")
    loaded = _loaded("import " + ", ".join(m.removesuffix(".__init__") for m in modules))
    assert {"vssm", "onnxruntime"} <= loaded
    assert "torch" not in loaded


@pytest.mark.parametrize("name", vssm.__all__)
def test_public_name_is_there(name: str) -> None:
    assert getattr(vssm, name) is not None


def _compile_alone(header: str, folder: Path) -> str:
    """What the compiler says of a file with nothing but this include; empty when it is content."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    flags = ["-std=c++17", "-fsyntax-only", f"-I{folder}", "-x", "c++", "-"]
    done = subprocess.run(
        [*compiler.split(), *flags],
        input=f'#include "{header}"\n',
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize("header", _HEADERS)
def test_header_compiles_alone(header: str) -> None:
    assert _compile_alone(header, ROOT) == ""


def test_header_that_leans_on_another_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text("inline int64_t size() { return 1; }\n")
    assert re.search("int64_t", _compile_alone("a.h", tmp_path))


@pytest.mark.parametrize(
    ("house", "may_include"),
    [
        (
            "kernels",
            r"plugins/(kernels|emulation)/|[a-z_]+$|[ei]mmintrin\.h|arm_neon\.h|cpuid\.h|cuda_",
        ),
        ("onnxruntime", r"plugins/(kernels|onnxruntime)/|[a-z_]+$|onnxruntime_c_api|dlfcn"),
        ("tensorrt", r"plugins/(kernels|tensorrt)/|[a-z_]+$|NvInfer|dlfcn|link\.h|cuda_runtime"),
    ],
)
def test_adapters_know_the_kernels_and_not_each_other(house: str, may_include: str) -> None:
    sources = [p for p in (ROOT / "plugins" / house).rglob("*.*") if p.suffix != ".cmake"]
    includes = {
        (path.name, target)
        for path in sources
        for target in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)
    }
    assert includes
    assert {pair for pair in includes if not re.match(may_include, pair[1])} == set()


@pytest.mark.parametrize("scripts", ["examples", "benchmarks", "docs"])
def test_no_folder_beside_a_script_hides_a_package(scripts: str) -> None:
    """Python puts a script's folder first: examples/triton was taken for the package triton."""
    packages = {*importlib.metadata.packages_distributions(), "triton", "tensorrt", "mamba_ssm"}
    folders = {p.name for p in (ROOT / scripts).iterdir() if p.is_dir()}
    assert folders & {*packages, *sys.stdlib_module_names} == set()
