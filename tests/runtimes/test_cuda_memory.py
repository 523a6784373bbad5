"""CUDA through cuda-bindings: our calls on a stand-in, and what the package itself refuses."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from fake_cuda import FakeCuda

from vssm.errors import RuntimeUnavailableError
from vssm.runtimes.cuda_memory import Cuda, TimedStream


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return fake


def test_a_stream_marks_both_ends_and_is_freed(cuda: FakeCuda) -> None:
    stream = TimedStream(1)
    assert stream.address == 77
    cuda.calls.clear()
    assert stream.milliseconds(lambda: cuda.calls.append("work")) == 2.5
    marks = [name for name in cuda.calls if "Record" in name or name == "work"]
    assert marks == ["cudaEventRecord", "work", "cudaEventRecord"]
    assert not cuda.events
    stream.close()
    stream.close()
    assert cuda.calls.count("cudaStreamDestroy") == 1


def test_calls_are_on_its_device_and_the_thread_gets_its_own_back(cuda: FakeCuda) -> None:
    stream = TimedStream(1)
    seen = []
    stream.milliseconds(lambda: seen.append(cuda.current))
    assert (seen, cuda.current) == ([1], 0)


def test_work_that_fails_leaves_no_event(cuda: FakeCuda) -> None:
    def broken() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        TimedStream(0).milliseconds(broken)
    assert not cuda.events
    assert cuda.current == 0


def test_the_extra_is_named_where_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    message = r'the package cuda-bindings .* is missing, .*pip install "vssm\[cuda\]"'
    with pytest.raises(RuntimeUnavailableError, match=message):
        TimedStream(0)


def test_the_package_itself_says_that_there_is_no_gpu() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason='not installed: pip install "vssm[cuda]"')
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeUnavailableError, match=r"no GPU that CUDA can use \("):
        Cuda()
