"""gpu_check's stage "engines" on the stand-in for TensorRT, which computes on the CPU."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from benchmarks.gpu import engines, models, timing
from benchmarks.gpu.models import Case
from benchmarks.gpu.program import Report
from gpu_check_cases import lines, micro_oracle
from tensorrt_standin import FakeCuda
from tensorrt_standin_engine import FakeTensorRT

from vssm.runtimes.library import find_library
from vssm.runtimes.tensorrt import build as tensorrt_build


class Anywhere(dict[int, Any]):
    """Memory that PyTorch took, not the stand-in for CUDA."""

    def __contains__(self, address: object) -> bool:
        return isinstance(address, int) and address > 0


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    cuda = FakeCuda()
    cuda.memory = Anywhere()
    package = FakeTensorRT(cuda)
    package.__spec__ = ModuleSpec("tensorrt", None)  # the exporter looks for what is installed
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    monkeypatch.setattr(tensorrt_build, "find_library", lambda _: find_library())
    return package


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report("engines", tmp_path / "found.jsonl")


@pytest.mark.parametrize("schedule", [None, "1:0.5"], ids=["dense", "pruned"])
def test_rows(trt: FakeTensorRT, report: Report, tmp_path: Path, schedule: str | None) -> None:
    found = Case("m", schedule, 3, "float16")
    engines.case(report, timing.HostClock(), found, micro_oracle(schedule), tmp_path)
    (row,) = lines(report, "row")
    assert (row.stage, row.subject, row.case) == ("engines", engines.SUBJECT, found.case)
    assert row.samples == timing.SAMPLES
    assert report.failures == []
    assert trt.configs[-1].profile.shapes["images"] == [(3, 3, 32, 32)] * 3
    assert trt.loaded  # with the plugins, or there would be no engine
    assert (tmp_path / "timing.cache").read_bytes() == b"timings"


def test_a_wrong_engine_gives_no_time(
    trt: FakeTensorRT, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engines.Engine.__call__
    monkeypatch.setattr(engines.Engine, "__call__", lambda self, i: 1.1 * real(self, i))
    found = Case("m", None, 2, "float16")
    engines.case(report, timing.HostClock(), found, micro_oracle(None), tmp_path)
    assert lines(report, "row") == []
    (failure,) = report.failures
    assert "its result errs by" in failure


def test_every_engine_is_tried(
    trt: FakeTensorRT, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage fails where one cannot be built, and goes on with the next."""
    monkeypatch.setattr(models, "oracle", lambda name, schedule, device: micro_oracle(None))
    trt.fail_build = True
    engines.run(report, timing.HostClock())
    assert len(report.failures) == len(list(engines.cases(quick=False))) == 6
    assert all("could not find any implementation" in text for text in report.failures)
    assert next(c.case for c in engines.cases(quick=True))["model"] == "vim_small"
