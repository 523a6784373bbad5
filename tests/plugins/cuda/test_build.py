"""What the CUDA compiler makes of the kernels: they compile, and keep nothing in local memory."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest
from checkout import ROOT


def _load_report():
    location = importlib.util.spec_from_file_location(
        "cuda_report", ROOT / "benchmarks/cuda_report.py"
    )
    module = importlib.util.module_from_spec(location)
    sys.modules["cuda_report"] = module  # dataclasses look themselves up
    location.loader.exec_module(module)
    return module


cuda_report = _load_report()
NVCC = cuda_report.find_nvcc()
needs_nvcc = pytest.mark.skipif(
    NVCC is None, reason="no CUDA compiler: nvcc in the PATH or CUDA_HOME"
)
SPILLING = """
__global__ void spills(const int* in, int* out) {
  int held[64];
  for (int i = 0; i < 64; ++i) held[in[i] & 63] = in[64 + i];
  for (int i = 0; i < 64; ++i) out[i] = held[in[i] & 31];
}
__global__ void fine(int* out) {
  __shared__ int shared[32];
  shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[31 - threadIdx.x];
}
"""


@needs_nvcc
def test_local_memory_is_found(tmp_path):
    source = tmp_path / "probe.cu"
    source.write_text(SPILLING)
    uses = cuda_report.parse(cuda_report.compile_verbosely(NVCC, source, ["80", "90"]))
    assert sorted((u.name[:4], u.architecture) for u in uses) == [
        ("fine", "80"),
        ("fine", "90"),
        ("spil", "80"),
        ("spil", "90"),
    ]
    assert [u.name.startswith("spills") for u in uses] == [bool(u.fault) for u in uses]
    assert all(u.stack >= 256 for u in uses if u.fault)
    assert all(u.shared == 128 and 0 < u.registers < 64 for u in uses if not u.fault)
    assert "spills" in cuda_report.table(uses)


@needs_nvcc
@pytest.mark.slow  # half a minute; that they compile is seen by every set-up with nvcc
@pytest.mark.parametrize("source", cuda_report.sources(), ids=lambda path: path.name)
def test_kernels_keep_nothing_in_local_memory(source):
    report = cuda_report.compile_verbosely(NVCC, source, cuda_report.ARCHITECTURES)
    assert "warning" not in report, report
    uses = cuda_report.parse(report)
    kernels = len(re.findall(r"Compiling entry function", report))
    assert len(uses) == kernels
    assert not [use.fault for use in uses if use.fault]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", cuda_report.sources(), ids=lambda path: path.name)
def test_kernels_compile_for_every_architecture(source):
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    architectures = re.findall(r"^\s+(\d+)(?:-real)?$", text, re.MULTILINE)
    assert {"75", "80", "90", "120"} <= set(architectures)
    cuda_report.compile_verbosely(NVCC, source, architectures)


def test_report_without_a_compiler_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_report, "INSTALLED", "")
    assert cuda_report.main(["90"]) == 2
    assert "no nvcc; put it in the PATH or set CUDA_HOME" in capsys.readouterr().err
