"""Whole Vim models as engines of full TensorRT with our plugins, beside those in PyTorch.

Each engine is built for one batch size. Its work is captured into CUDA graphs as that of
models.py is, its inputs and outputs staying on the GPU, so that the times of both compare.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.gpu import models
from benchmarks.gpu.models import Case
from benchmarks.gpu.report import Report, main
from benchmarks.gpu.timing import Clock, Subject, relative_error
from torch import Tensor

import vssm
from vssm.models.schedules import default_schedules
from vssm.runtimes.tensorrt import api
from vssm.runtimes.tensorrt.build import EngineRequest, build_plan

SUBJECT = "tensorrt"


def cases() -> Iterator[Case]:
    """Those of the targets first."""
    for name in ("vim_small", "vim_tiny"):
        yield Case(name, None, 128, "float16")
    for name in ("vim_small", "vim_tiny"):
        yield Case(name, default_schedules()[name], 128, "float16")
        yield Case(name, None, 1, "float16")


class Engine:
    """An engine on PyTorch's memory and current stream, for the one batch that it was built for."""

    def __init__(self, plan: bytes, images: Tensor) -> None:
        package = api.load_package(api.TENSORRT)
        self._log = api.logger(package)
        self._runtime = package.Runtime(self._log)
        engine = self._runtime.deserialize_cuda_engine(plan)
        self._engine = self._made(engine, "load the engine")
        size = api.activation_bytes(engine)
        self._activations = torch.empty(max(1, size), dtype=torch.uint8, device=images.device)
        memory = self._activations.data_ptr()
        self._context = self._made(api.create_context(package, engine, memory, size), "open it")
        self._tensors = dict(self._place(package, images))
        self._device = images.device

    def _made(self, value: Any, what: str) -> Any:
        if not value:
            raise RuntimeError(f"TensorRT cannot {what}: {'; '.join(self._log.complaints[-3:])}")
        return value

    def _place(self, package: Any, images: Tensor) -> Iterator[tuple[str, Tensor]]:
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            if self._engine.get_tensor_mode(name) == package.TensorIOMode.INPUT:
                tensor = images
                self._made(self._context.set_input_shape(name, tuple(images.shape)), "take it")
            else:
                dtype = np.dtype(package.nptype(self._engine.get_tensor_dtype(name)))
                shape = (len(images), *tuple(self._engine.get_tensor_shape(name))[1:])
                tensor = torch.from_numpy(np.empty(shape, dtype)).to(images.device)
            self._context.set_tensor_address(name, tensor.data_ptr())
            yield name, tensor

    def __call__(self, _: int) -> Tensor:
        """Enqueue once on the current stream; the logits, in the same memory every time."""
        stream = 0  # the CPU, in tests
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device).cuda_stream
        self._made(self._context.execute_async_v3(stream), "run the engine")
        return self._tensors["logits"]


def run(report: Report, clock: Clock) -> None:
    """Every case until the time is over; timings of one build help the next."""
    package = api.load_package(api.TENSORRT)
    report.line(tensorrt=str(package.__version__))
    with tempfile.TemporaryDirectory() as folder:

        def one(found: Case) -> None:
            exact = models.oracle(found.name, found.schedule, clock.device)
            case(report, clock, found, exact, Path(folder))

        report.each(cases(), one)


def case(report: Report, clock: Clock, found: Case, exact: models.Oracle, folder: Path) -> None:
    """Export, build, check and time one engine."""
    output = Path(tempfile.mkdtemp(dir=folder)) / "out"
    made = vssm.export(exact.model, output, dtype=found.dtype, weights=False)
    request = EngineRequest(batch=(found.batch, found.batch, found.batch))
    plan = build_plan(made.model_path, request, cache=folder / "timing.cache")
    images = exact.images.repeat(-(-found.batch // len(exact.images)), 1, 1, 1)[: found.batch]
    want = exact.logits[: found.batch]
    allowed = models.LOGITS[found.dtype] if found.schedule is None else models.SAME_MODEL
    engine = Engine(plan.data, images.contiguous().to(clock.device))
    report.measure(
        found.case,
        [Subject(SUBJECT, engine)],
        clock,
        lambda taken: (relative_error(taken.last[: len(want)].cpu(), want), allowed),
        ours={SUBJECT},
    )


if __name__ == "__main__":
    main("engines", run)
