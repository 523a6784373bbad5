"""Exported Vim models in ONNX Runtime's CUDA provider, beside the same models in PyTorch.

Times are device events on the session's stream, without a CUDA graph: ONNX Runtime enqueues from
the host in between. PyTorch's of models.py are inside a graph; those here are plain calls.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from benchmarks.gpu import models
from benchmarks.gpu.models import Case
from benchmarks.gpu.report import Case as Named
from benchmarks.gpu.report import Report, main
from benchmarks.gpu.timing import SAMPLES, WARM_UPS, Clock, Times, relative_error

import vssm
from vssm.artifact.directory import MODEL_FILE, open_artifact
from vssm.models.schedules import default_schedules
from vssm.runtimes.ort_cuda import OrtCudaSession

SUBJECT = "ort-cuda"


@dataclass(frozen=True)
class Export:
    """One exported file."""

    name: str
    schedule: str | None
    dtype: str

    @property
    def case(self) -> Named:
        """What its rows share."""
        return {"model": self.name, "kind": self.schedule or "dense", "dtype": self.dtype}


def exports() -> Iterator[Export]:
    """The target's first."""
    for name in ("vim_small", "vim_tiny"):
        for schedule in (None, default_schedules()[name]):
            yield Export(name, schedule, "float16")
    yield Export("vim_tiny", None, "float32")


def run(report: Report, clock: Clock) -> None:
    """Every export at every batch size until the time is over."""

    def one(found: Export) -> None:
        exact = models.oracle(found.name, found.schedule, clock.device)
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "out"
            vssm.export(exact.model, output, dtype=found.dtype, weights=False)
            opened = open_artifact(output, only=(MODEL_FILE,))
            with OrtCudaSession(opened, timed=True) as session:
                for batch in (128, 1, 8, 32):
                    at_batch = Case(found.name, found.schedule, batch, found.dtype)
                    _measure(report, session, at_batch, exact)

    report.each(exports(), one)


def _measure(report: Report, session: OrtCudaSession, found: Case, exact: models.Oracle) -> None:
    images = np.resize(exact.images.numpy(), (found.batch, *exact.images.shape[1:]))
    bound = session.on_device(images)
    bound.device_ms(WARM_UPS)
    taken = tuple(1e3 * ms for ms in bound.device_ms(SAMPLES))
    times = Times(SUBJECT, "warm", 1, taken, bound.outputs()["logits"])
    want = exact.logits[: found.batch]
    allowed = models.LOGITS[found.dtype] if found.schedule is None else models.SAME_MODEL

    def check(timed: Times) -> tuple[float, float]:
        return relative_error(torch.from_numpy(timed.last)[: len(want)], want), allowed

    report.rows(found.case, [times], check, ours={SUBJECT})


if __name__ == "__main__":
    main("ort", run)
