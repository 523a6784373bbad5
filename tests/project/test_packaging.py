"""The pins, the wheel, the source distribution and `.ci/run`."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import packaging.requirements
import packaging.utils
import pytest
from checkout import ROOT
from light import CORE, light_environment
from make_export import make_export
from packaging.version import Version
from scikit_build_core.build import build_sdist

from vssm._version import __version__

SOURCES = (
    "CMakeLists.txt",
    "exporter/vssm/_version.py",
    "plugins",
    "examples/cpp",
    "examples/serving",
    "examples/web",
)
LIBRARY = "vssm/lib/libvssm_onnxruntime.so"
_tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
_WHERE = r' ; python_version (>=|==|<) "3\.\d+"( and platform_machine == "x86_64")?'
_PIN = re.compile(rf"[a-z0-9.-]+==[0-9][0-9a-z.]*({_WHERE})?")


def unpinned(project: dict[str, Any], constraints: str) -> list[str]:
    """Direct dependencies of a pyproject.toml that the constraints leave open."""
    lines = [line for line in constraints.splitlines() if not line.startswith("#")]
    found = [f"{line}: no exact pin" for line in lines if not _PIN.fullmatch(line)]
    pinned = {packaging.utils.canonicalize_name(line.partition("==")[0]) for line in lines}
    table = project["project"]
    asked = [
        *project["build-system"]["requires"],
        *table["dependencies"],
        *(line for extra in table["optional-dependencies"].values() for line in extra),
        *("cmake", "ninja"),
    ]
    names = {
        packaging.utils.canonicalize_name(packaging.requirements.Requirement(line).name)
        for line in asked
    }
    return found + sorted(names - pinned - {table["name"]})


def test_every_dependency_is_pinned() -> None:
    project = _tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert unpinned(project, constraints) == []
    without = constraints.replace("numpy==", "numpy>=").replace("\ntyper==", "\nother==")
    assert "typer" in unpinned(project, without)
    assert any("no exact pin" in line for line in unpinned(project, without))


@pytest.mark.parametrize(
    ("printed", "status", "last"),
    [
        ("12 passed, 1 skipped in 3.45s", 0, "12 passed, 1 skipped in 3.45s"),
        ("1 failed, 12 passed in 75.12s (0:01:15)", 2, "1 failed, 12 passed in 75.12s (0:01:15)"),
        ("no tests ran in 0.01s", 2, "no tests ran in 0.01s"),
        ("lint: ruff check", 2, ".ci/run: make test stopped before the tests, exit code 2"),
    ],
)
def test_ci_run_ends_with_the_summary(tmp_path: Path, printed: str, status: int, last: str) -> None:
    make = tmp_path / "make"
    make.write_text(
        f'#!/bin/sh\ntest "$*" = test || exit 9\necho "{printed}"\necho "make: more" >&2\n'
        f"exit {status}\n"
    )
    make.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / ".ci/run"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (status, last)


def test_source_distribution_depends_on_the_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on the folder that it is made in, the time or the umask."""
    first = _source_distribution(ROOT, tmp_path / "first", monkeypatch)
    usual = os.umask(0o077)
    try:
        with tarfile.open(first) as file:
            file.extractall(tmp_path / "copy", filter="data")
        copy = tmp_path / "copy" / f"vssm-{__version__}"
        second = _source_distribution(copy, tmp_path / "second", monkeypatch)
    finally:
        os.umask(usual)
    assert first.read_bytes() == second.read_bytes()


def _source_distribution(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(source)
    folder.mkdir()
    return folder / build_sdist(str(folder))


def test_the_changelog_has_this_version_and_the_ones_before() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *released = re.findall(r"^## \[(.+?)\](.*)$", text, re.MULTILINE)
    assert first == ("Unreleased", "")
    assert all(re.fullmatch(r" - \d{4}-\d\d-\d\d", date) for _, date in released)
    versions = [Version(__version__), *(Version(number) for number, _ in released)]
    assert versions == sorted(versions, reverse=True)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it alone."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    command += ["-Ccmake.define.VSSM_CUDA=OFF"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


def _sources(*folders: str) -> set[str]:
    """Files that git does not ignore below these folders, without tests' apparatus."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = {line for line in done.stdout.splitlines() if (ROOT / line).is_file()}
    return {line for line in files if not line.startswith("plugins/emulation/")}


@pytest.mark.slow
def test_sdist_holds_what_a_build_needs(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    assert archive.name == f"vssm-{__version__}.tar.gz"
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    build = {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"}
    assert build | _sources("exporter", "plugins") <= names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert _sources("examples/cpp", "examples/serving", "examples/web") <= names
    assert folders == {"examples", "exporter", "plugins"}
    assert not [name for name in names if "emulation" in name]
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_wheel_holds_the_package(dist: Path) -> None:
    (archive,) = dist.glob("*.whl")
    assert archive.name.startswith(f"vssm-{__version__}-py3-none-")
    with zipfile.ZipFile(archive) as file:
        names = set(file.namelist())
        licence = [name for name in names if name.endswith("licenses/LICENSE")]
        entry_points = [name for name in names if name.endswith("entry_points.txt")]
        assert file.read(licence[0]) == (ROOT / "LICENSE").read_bytes()
        assert "vssm" in file.read(entry_points[0]).decode()
    libraries = {name for name in names if name.endswith(".so")}
    assert libraries == {LIBRARY, "vssm/lib/libvssm.so"}
    package = {name.removeprefix("exporter/") for name in _sources("exporter")}
    assert package <= names
    assert not [name for name in names if "emulat" in name or "probe" in name]
    others = {n for n in names if not n.startswith(("vssm/", "vssm-"))}
    assert others == set()
    # The sources of the libraries, which `vssm bundle` ships; nothing else of that kind.
    carried = {f"vssm/sources/{name}" for name in _sources(*SOURCES)}
    assert carried <= names
    code = {name for name in names if name.endswith((".pyc", ".h", ".cpp", ".a"))}
    assert code <= carried


@pytest.mark.slow
def test_wheel_runs_outside_the_checkout(dist: Path, tmp_path: Path) -> None:
    """In an environment with what the wheel asks for and nothing else, from an empty directory."""
    (archive,) = dist.glob("*.whl")
    home, empty = tmp_path / "venv", tmp_path / "empty"
    light_environment(home, CORE)
    python = str(home / "bin/python")
    install = ["install", "--quiet", "--no-deps", "--no-index", str(archive)]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    make_export(tmp_path)
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    given = [tmp_path / name for name in ("export", "bundle", "image.png")]
    done = subprocess.run(
        [python, "-W", "error", ROOT / "tests/support/installed.py", *given],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names of symbols are x86-64's")
def test_wheel_runs_on_old_systems(dist: Path) -> None:
    """No newer glibc or libstdc++ than those of manylinux_2_28 stand in a library's symbols."""
    (archive,) = dist.glob("*.whl")
    shown = subprocess.check_output(
        [sys.executable, "-m", "auditwheel", "show", str(archive)], text=True
    )
    found = re.search(r'"manylinux_2_(\d+)_x86_64"', " ".join(shown.split()))
    assert found is not None, shown
    assert int(found.group(1)) <= 28, shown
