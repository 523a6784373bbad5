"""Configuring the native build with and without a CUDA compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from checkout import ROOT


def _folders_of_nvcc():
    """Where CMake would find nvcc by itself."""
    places = [*os.environ["PATH"].split(os.pathsep), "/usr/local/cuda/bin"]
    return [place for place in places if (Path(place) / "nvcc").is_file()]


def _configure(tmp_path, *options, hide_nvcc=False):
    """Exit status and output of cmake's configure step; nvcc out of its sight where asked for."""
    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
    environment = {k: v for k, v in os.environ.items() if k not in {"CUDA_HOME", "CUDA_PATH"}}
    hidden = []
    if hide_nvcc:
        hidden = [f"-DCMAKE_IGNORE_PATH={';'.join(_folders_of_nvcc())}"]
        kept = [p for p in environment["PATH"].split(os.pathsep) if p not in _folders_of_nvcc()]
        environment["PATH"] = os.pathsep.join(kept)
    done = subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path / "build", *hidden, *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("wanted", ["OFF", "AUTO"])
def test_a_build_without_cuda_says_what_it_leaves_out(tmp_path, wanted):
    python = f"-DPython_EXECUTABLE={tmp_path}/no-python"
    status, output = _configure(tmp_path, f"-DVSSM_CUDA={wanted}", python, hide_nvcc=True)
    assert status == 0, output
    assert "left out: CUDA kernels, TensorRT plugin (nvcc in the PATH, CUDA_HOME or pip)" in output


def test_a_build_that_insists_on_cuda_fails_without_it(tmp_path):
    python = f"-DPython_EXECUTABLE={tmp_path}/no-python"
    status, output = _configure(tmp_path, "-DVSSM_CUDA=ON", python, hide_nvcc=True)
    assert status != 0
    assert "VSSM_CUDA=ON, but there is no nvcc; put it in the PATH, set CUDA_HOME or pip" in output


def test_pips_compiler_packages_are_found(tmp_path):
    """Laid out as pip does: nvidia/cu13 with bin, include, lib (no lib64) and nvvm."""
    folders = _folders_of_nvcc()
    real = [Path(f).resolve().parent for f in folders if (Path(f) / "nvcc.profile").is_file()]
    if not real:
        pytest.skip("no CUDA toolkit here to lay out as pip's packages: nvcc not found")
    root = real[0]
    packages = tmp_path / "packages"
    cuda = packages / "nvidia/cu13"
    cuda.mkdir(parents=True)
    for name in ("include", "nvvm"):
        (cuda / name).symlink_to(root / name)
    library = "lib" if (root / "lib/libcudart_static.a").is_file() else "lib64"
    (cuda / "lib").symlink_to(root / library)
    (cuda / "bin").mkdir()
    for program in (root / "bin").iterdir():
        (cuda / "bin" / program.name).symlink_to(program)
    # Looks for the others where it lies itself.
    (cuda / "bin/nvcc").unlink()
    shutil.copy(root / "bin/nvcc", cuda / "bin/nvcc")
    python = tmp_path / "python3"
    python.write_text(f"#!/bin/sh\necho {packages}\n")
    python.chmod(0o755)
    options = (f"-DPython_EXECUTABLE={python}", "-DVSSM_CUDA_ARCHITECTURES=90-real")
    status, output = _configure(tmp_path, *options, hide_nvcc=True)
    assert status == 0, output
    assert f"{cuda}/bin/nvcc" in output
    assert "vssm: CUDA kernels for 90-real" in output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            (),
            (
                "vssm: CUDA kernels for 80-real;86-real;87-real;89-real;90 ",
                "vssm: left out: CUDA kernels for 75-real;100-real;120, unknown to",
            ),
        ),
        pytest.param(
            ("-DVSSM_CUDA_ARCHITECTURES=86-real;90",),
            ("vssm: CUDA kernels for 86-real;90 ",),
            marks=pytest.mark.slow,  # a list of one is configured above
        ),
        (("-DVSSM_CUDA_ARCHITECTURES=90;100",), ("does not know 100; leave them out, or take",)),
    ],
)
def test_an_older_compiler_knows_fewer_gpus(tmp_path, options, expected):
    """The rest of the list that nobody chose is compiled; of what is asked for, nothing less."""
    folders = _folders_of_nvcc()
    if not folders:
        pytest.skip("no CUDA compiler: nvcc in the PATH")
    nvcc = tmp_path / "nvcc"
    known = "compute_80 compute_86 compute_87 compute_89 compute_90"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] && printf "%s\\n" {known} && exit 0\n'
        f'exec {folders[0]}/nvcc "$@"\n'
    )
    nvcc.chmod(0o755)
    status, output = _configure(tmp_path, f"-DCMAKE_CUDA_COMPILER={nvcc}", *options)
    assert (status == 0) == ("does not know" not in expected[0]), output
    assert all(text in f"{output} " for text in expected)


@pytest.mark.parametrize(
    ("nvidia_smi", "chosen"),
    [
        (None, "80-real;90"),
        ("echo 9.0", "90"),
        ("echo 9.0; echo 8.6; echo 9.0", "86;90"),
        ("echo 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9", None),
    ],
)
def test_make_compiles_for_the_card_that_is_there(tmp_path, nvidia_smi, chosen):
    if nvidia_smi is not None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        script.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    if nvidia_smi is None and shutil.which("nvidia-smi"):
        pytest.skip("this machine has a card of its own")
    makefile = f"include {ROOT}/Makefile\nshow:\n\t@echo '$(CUDA_ARCHITECTURES)'\n"
    (tmp_path / "Makefile").write_text(makefile)
    shown = subprocess.check_output(
        ["make", "-s", "-C", tmp_path, "show"], env={**os.environ, "PATH": path}, text=True
    )
    assert shown.splitlines()[-1] == (chosen or "80-real;90")
