"""Exported Vim models in ONNX Runtime's CUDA provider, beside the same models in PyTorch.

Times are device events on the session's stream, without a CUDA graph: ONNX Runtime enqueues from
the host in between. PyTorch's of the stage "models" are inside a graph; those here are plain calls.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import exporter
from benchmarks.gpu import models
from benchmarks.gpu.models import Case
from benchmarks.gpu.program import Report, main
from benchmarks.gpu.result import Work
from benchmarks.gpu.timing import SAMPLES, WARM_UPS, Clock, Times, one_line, relative_error
from exporter.artifact import open_artifact
from exporter.runtimes.ort_cuda import OrtCudaSession

SUBJECT = "ort-cuda"


def exports(quick: bool) -> Iterator[tuple[str, str | None, str]]:
    """Name, schedule and dtype, the target's first."""
    for name in ("vim_small", "vim_tiny"):
        for schedule in (None, str(exporter.default_schedule(name))):
            yield name, schedule, "float16"
    if not quick:
        yield "vim_tiny", None, "float32"


def run(report: Report, clock: Clock) -> None:
    """Every export at every batch size until the time is over."""
    for name, schedule, dtype in exports(report.quick):
        if report.over:
            report.absent(f"{name} {schedule or 'dense'} {dtype}", "the stage's time was over")
            continue
        exact = models.oracle(name, schedule, clock.device)
        try:
            with tempfile.TemporaryDirectory() as folder:
                exporter.export(exact.model, Path(folder) / "out", dtype=dtype, weights=False)
                opened = open_artifact(Path(folder) / "out", only=("model.onnx",))
                with OrtCudaSession(opened, timed=True) as session:
                    for batch in (128, 1, 8, 32):
                        found = Case(name, schedule, batch, dtype)
                        _measure(report, session, found, exact)
        except Exception as error:
            report.wrong(f"{SUBJECT}, {name} {schedule or 'dense'} {dtype}", one_line(error))


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

    report.rows(found.case, [times], check, ours={SUBJECT}, work=Work())


if __name__ == "__main__":
    main("ort", run)
