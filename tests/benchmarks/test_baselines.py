"""The maths of gpu_check's baselines on the CPU, against the oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.gpu import doubling, mamba, shapes, timing
from benchmarks.gpu.shapes import ScanShape
from checkout import PYTHONPATH
from gpu_check_cases import GROUP, PLAIN, PRUNED, VIM, mamba_extension

from vssm.errors import RuntimeUnavailableError

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [VIM, PRUNED, GROUP], ids=lambda s: s.model + str(s.pruned))
@pytest.mark.parametrize("recurrence", [doubling.doubled, doubling.associative])
def test_plain_torch_baselines(shape: ScanShape, recurrence: doubling.Recurrence) -> None:
    given = shapes.operands(shape, CPU)
    got = doubling.scan(**given, recurrence=recurrence)
    want = shapes.oracle(shape, given, list(range(shape.batch)))
    assert timing.relative_error(got, want) < 1e-6


@pytest.mark.parametrize("seqlen", [1, 2, 7, 8, 9])
def test_doubling_at_the_edges_of_its_rounds(seqlen: int) -> None:
    decay, source = torch.rand(2, seqlen, 3).double(), torch.randn(2, seqlen, 3).double()
    h, want = torch.zeros(2, 3).double(), []
    for t in range(seqlen):
        h = decay[:, t] * h + source[:, t]
        want.append(h)
    got = doubling.doubled(decay, source)
    torch.testing.assert_close(got, torch.stack(want, 1), rtol=1e-12, atol=1e-12)


def test_baselines_refuse_what_they_do_not_know() -> None:
    given = shapes.operands(PLAIN, CPU)
    with pytest.raises(ValueError, match="directions=4"):
        doubling.scan(**given)
    with pytest.raises(ValueError, match="there and back"):
        mamba.scan(mamba_extension())(**given)


def test_mamba_operands_and_sum() -> None:
    given = shapes.operands(VIM, CPU)
    got = mamba.joined(mamba.run(mamba_extension(), mamba.directions(given)))
    want = shapes.oracle(VIM, given, [0, 1])
    assert timing.relative_error(got, want) < 1e-6


@pytest.mark.parametrize("shape", [VIM, PRUNED], ids=["dense", "pruned"])
@pytest.mark.parametrize("gated", [True, False])
def test_mamba_in_place_of_our_scan(shape: ScanShape, gated: bool) -> None:
    given = shapes.operands(shape, CPU)
    if not gated:
        del given["z"]
    got = mamba.scan(mamba_extension())(**given, scale=0.5)
    want = 0.5 * shapes.oracle(shape, given, list(range(shape.batch)))
    assert timing.relative_error(got, want) < 1e-6


def test_mamba_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mamba, "BUILD", tmp_path)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    with pytest.raises(RuntimeUnavailableError, match="MAMBA_SSM_SOURCE and run the step"):
        mamba.load()
    with pytest.raises(RuntimeUnavailableError, match=r"lacks selective_scan\.cpp, "):
        mamba.build(tmp_path)


def test_triton_baseline() -> None:
    pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA")
    code = """
import torch
from tolerances import relative_error
from benchmarks.gpu import shapes, triton_scan
from benchmarks.gpu.timing import relative_error
from checkout import PYTHONPATH
from gpu_check_cases import CROSS, GROUP, PLAIN, PRUNED, VIM
for shape in (VIM, PRUNED, PLAIN, CROSS, GROUP):
    given = shapes.operands(shape, torch.device("cpu"))
    got = triton_scan.scan(**given, params_by_step=shape.params_by_step)
    error = relative_error(got, shapes.oracle(shape, given, list(range(shape.batch))))
    assert error < 1e-6, (shape, error)
"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    env["PYTHONPATH"] = PYTHONPATH
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
