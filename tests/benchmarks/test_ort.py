"""What of gpu_check's stages "ort" and "ceilings" runs without a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu import models, ort, timing
from benchmarks.gpu.program import Report
from gpu_check_cases import lines, micro_oracle
from torch import Tensor

from vssm.errors import RuntimeUnavailableError
from vssm.native_library import find_library


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report("ort", tmp_path / "found.jsonl")


class StandInSession:
    """What `ort.py` asks of a session with a GPU, without one."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def on_device(self, images: Any) -> StandInSession:
        self.batch = len(images)
        return self

    def device_ms(self, samples: int) -> list[float]:
        return [0.25] * samples

    def outputs(self) -> dict[str, Any]:
        return {"logits": self.logits.repeat(self.batch, 1)[: self.batch].float().numpy()}


def test_ort_rows(report: Report) -> None:
    exact = micro_oracle(None)
    ort._measure(report, StandInSession(exact.logits), models.Case("m", None, 3, "float16"), exact)
    wrong = StandInSession(exact.logits * 1.1)
    ort._measure(report, wrong, models.Case("m", None, 3, "float16"), exact)
    (found,) = lines(report, "row")
    assert (found.subject, found.median_us, found.samples) == (ort.SUBJECT, 250.0, timing.SAMPLES)
    assert len(report.failures) == 1


def test_the_card_s_library() -> None:
    try:
        library = ctypes.CDLL(str(find_library("vssm_gpu_bench")))
    except RuntimeUnavailableError as error:
        pytest.skip(f"built where there is a CUDA compiler: {error}")
    assert library.vssm_gpu_threads() == 256
    assert library.vssm_gpu_ex2_per_block() == 8 * 256
    assert library.vssm_gpu_nothing(None) == (0 if torch.cuda.is_available() else 1)
