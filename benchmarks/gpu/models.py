"""Whole Vim models in PyTorch under CUDA graphs: our kernels, mamba-ssm's, torch.compile.

One model serves every subject of a case: the same weights and the same layers, with another scan
in their place. Pruned models keep their gaps with mamba-ssm too (see mamba.scan).
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from benchmarks.gpu import compiled, doubling, mamba, shapes
from benchmarks.gpu.report import Report, main
from benchmarks.gpu.timing import Clock, Subject, one_line, relative_error
from torch import Tensor

import vssm
from vssm.models.base import VisionModel
from vssm.models.schedules import default_schedules
from vssm.ops import operators as ops

OURS = "vssm"
MAMBA = "mamba-ssm"
COMPILED_SCAN = "PyTorch, scan by torch.compile"
COMPILED_MODEL = "vssm, model by torch.compile"
# Other choices of tokens in half precision change logits by more than rounding does: this only
# tells one model from another, as `vssm bench` does.
SAME_MODEL = 0.2
# The logits' column of vssm.parity.compare.TOLERANCES, which needs polygraphy.
LOGITS = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 6e-2}
_CHECKED = 2  # images compared with the oracle

Scan = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One model at one batch size and dtype; `compiled`: against torch.compile."""

    name: str
    schedule: str | None
    batch: int
    dtype: str
    compiled: bool = False

    @property
    def case(self) -> dict[str, str | int]:
        """What a row says of it."""
        kind = "dense" if self.schedule is None else f"pruned {self.schedule}"
        kind += ", torch.compile" if self.compiled else ""
        return {"model": self.name, "kind": kind, "dtype": self.dtype, "batch": self.batch}


def cases() -> Iterator[Case]:
    """Those of the targets first, those that compile a model last."""
    schedules = {name: default_schedules()[name] for name in ("vim_tiny", "vim_small")}
    first = [Case(n, s, 128, "float16") for n in schedules for s in (None, schedules[n])]
    first += [Case(name, None, 1, "float16") for name in schedules]
    yield from first
    sizes = itertools.product(schedules, (1, 8, 32, 128), shapes.DTYPES, (False, True))
    for name, batch, dtype, pruned in sizes:
        found = Case(name, schedules[name] if pruned else None, batch, dtype)
        if found not in first:
            yield found
    for name, batch in itertools.product(schedules, (128, 1)):
        yield Case(name, None, batch, "float16", compiled=True)


@dataclass(frozen=True)
class Oracle:
    """A model's float32 weights, and what float64 says of the checked images."""

    model: VisionModel
    images: Tensor
    logits: Tensor


@functools.lru_cache(maxsize=4)
def oracle(name: str, schedule: str | None, device: torch.device) -> Oracle:
    """The model with seeded weights, on the CPU, and its exact logits, computed on `device`."""
    parsed = None if schedule is None else vssm.PruneSchedule.parse(schedule)
    model = vssm.create_model(name, schedule=parsed)
    make = torch.Generator().manual_seed(0)
    images = torch.randn(_CHECKED, 3, *model.image_size, generator=make)
    exact = copy.deepcopy(model).use_backend("reference").double().to(device)
    with torch.no_grad():
        logits = exact(images.double().to(device)).cpu()
    return Oracle(model, images, logits)


def run(report: Report, clock: Clock) -> None:
    """Every case until the time is over."""
    # float32 is float32: cuDNN's own default is TF32, with ten bits of mantissa. Not by way of
    # conv.fp32_precision: with that alone torch.export, which asks for cuDNN's flags, is an error.
    torch.backends.cudnn.allow_tf32 = False
    extension = None
    try:
        extension = mamba.load()
    except Exception as error:
        report.absent(MAMBA, one_line(error))

    def one(found: Case) -> None:
        exact = oracle(found.name, found.schedule, clock.device)
        case(report, clock, found, exact, extension)

    report.each(cases(), one)


def case(report: Report, clock: Clock, found: Case, exact: Oracle, extension: Any) -> None:
    """Check and time one model."""
    model = in_dtype(exact.model, shapes.DTYPES[found.dtype]).to(clock.device)
    images = exact.images.repeat(-(-found.batch // _CHECKED), 1, 1, 1)[: found.batch]
    images = images.to(clock.device)
    want = exact.logits[: found.batch].to(clock.device)
    allowed = LOGITS[found.dtype] if found.schedule is None else SAME_MODEL
    made = _subjects(found, model, images, extension)
    report.measure(
        found.case,
        [Subject(name, call) for name, call in made.items()],
        clock,
        lambda taken: (relative_error(taken.last[: len(want)], want), allowed),
        ours={name for name in made if name.startswith(OURS)},
    )


def _subjects(
    found: Case, model: VisionModel, images: Tensor, extension: Any
) -> dict[str, Callable[[int], Tensor]]:
    """Calls that give the logits."""
    made = {OURS: _forward(model, images)}
    if found.compiled:
        scan = torch.compile(compiled.plain(doubling.doubled), dynamic=False)
        made[COMPILED_SCAN] = _forward(model, images, scan)
        made[COMPILED_MODEL] = _forward(torch.compile(model, dynamic=False), images)
    elif extension is not None:
        made[MAMBA] = _forward(model, images, mamba.scan(extension))
    return made


def _forward(
    model: Callable[[Tensor], Tensor], images: Tensor, scan: Scan | None = None
) -> Callable[[int], Tensor]:
    """The model on the images, with `scan` for `ops.selective_scan` where one is given."""

    def call(_: int) -> Tensor:
        with torch.no_grad():
            if scan is None:
                return model(images)
            with mock.patch.object(ops, "selective_scan", _directions_inside(scan)):
                return model(images)

    return call


def _directions_inside(scan: Scan) -> Scan:
    """A scan of (batch, seqlen, K, ...) for a model whose streams are (batch, K, seqlen, ...)."""

    def called(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **others: Any) -> Tensor:
        streams = (u, delta, B, C)
        if others.pop("direction_axis", 2) == 1:
            streams = tuple(t.transpose(1, 2) for t in streams)
        u, delta, B, C = streams
        return scan(u, delta, A, B, C, **others)

    return called


def in_dtype(model: VisionModel, dtype: torch.dtype) -> VisionModel:
    """A copy with its projections in `dtype`; what exports keep in float32 stays so."""
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if not twin.stays_wide(name):
            parameter.data = parameter.data.to(dtype)
    return twin


if __name__ == "__main__":
    main("models", run)
