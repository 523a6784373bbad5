"""What `vssm doctor` says of CUDA, on machines with and without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vssm.errors import RuntimeUnavailableError
from vssm.runtimes import doctor
from vssm.runtimes.cuda_driver import Driver, Gpu
from vssm.runtimes.library import library_info

H100 = Gpu(0, "NVIDIA H100", (9, 0))
T4 = Gpu(1, "NVIDIA T4", (7, 5))


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), ("80-real", "90"), True),
        ((8, 6), ("80-real", "90"), True),
        ((7, 5), ("80-real", "90"), False),
        ((9, 0), ("80-real",), False),
        ((8, 0), ("86-real",), False),
        ((12, 0), ("80-real", "90"), True),
        ((12, 0), ("80-real", "90-real"), False),
        ((12, 0), ("90-virtual",), True),
        ((8, 9), ("90-virtual",), False),
        ((7, 5), ("native",), True),
        ((10, 3), ("100-real",), True),
    ],
)
def test_which_gpus_compiled_code_runs_on(capability, architectures, runs):
    assert doctor.runs_on(Gpu(0, "a GPU", capability), architectures) is runs


@pytest.fixture
def machine(monkeypatch):
    """A machine with these architectures compiled and these GPUs."""

    def make(architectures, gpus):
        info = dataclasses.replace(library_info(), cuda_architectures=architectures)
        monkeypatch.setattr(doctor, "library_info", lambda: info)
        monkeypatch.setattr(doctor, "driver", lambda: Driver((13, 0), gpus))
        return {finding.part: finding for finding in doctor.examine()}

    return make


def test_a_gpu_that_the_build_serves(machine):
    found = machine(("80-real", "90"), (H100,))
    assert found["CUDA kernels"].found
    assert found["CUDA kernels"].detail == "compiled for 80-real, 90"
    assert found["NVIDIA GPU"].detail == "NVIDIA H100 (sm_90), driver for CUDA 13.0"


def test_a_gpu_that_the_build_leaves_out(machine):
    found = machine(("80-real", "90"), (H100, T4))["CUDA kernels"]
    assert not found.found
    assert found.detail == "compiled for 80-real, 90, but not for NVIDIA T4 (sm_75)"
    assert found.remedy == "make -B setup CUDA_ARCHITECTURES=75"


def test_a_build_without_cuda_and_a_driver_without_gpus(machine):
    found = machine((), ())
    assert not found["CUDA kernels"].found
    assert "pip install nvidia-cuda-nvcc" in found["CUDA kernels"].remedy
    assert found["NVIDIA GPU"].detail == "none, with a driver for CUDA 13.0"
    assert {"mamba-ssm", "tensorrt", "kernel library (PyTorch, C)"} <= set(found)


def test_no_driver_is_no_crash(monkeypatch):
    def missing():
        raise RuntimeUnavailableError("library=libcuda.so.1 cannot be loaded; use another machine")

    monkeypatch.setattr(doctor, "driver", missing)
    found = {finding.part: finding for finding in doctor.examine()}
    assert found["NVIDIA GPU"].detail == "library=libcuda.so.1 cannot be loaded"
    assert not found["NVIDIA GPU"].found


def test_the_compiler_of_pips_packages_is_found(monkeypatch, tmp_path):
    nvcc = tmp_path / "nvidia/cu13/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert not doctor._nvcc().found
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(doctor, "_output", lambda command: f"{Path(command[0]).name} V13.0.88")
    found = doctor._nvcc()
    assert found.detail == f"{nvcc}, nvcc V13.0.88"
