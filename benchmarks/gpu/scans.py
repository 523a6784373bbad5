"""Our scan against mamba-ssm's and Triton's, in every dtype, batch size and length.

Every case: both variants and the automatic choice, operands in the cache and not, outputs checked
against the float64 oracle. The cases that the targets ask for come first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.gpu import mamba, shapes
from benchmarks.gpu.native import VARIANTS, VariantKernels
from benchmarks.gpu.report import Report, main
from benchmarks.gpu.shapes import ALLOWED, DTYPES, ScanShape
from benchmarks.gpu.timing import (
    Clock,
    Subject,
    Times,
    copies_for,
    one_line,
    relative_error,
    sizes,
)
from torch import Tensor

from vssm.native_library import find_library
from vssm.ops.kernels import LIBRARY

OURS = "vssm"
MAMBA = "mamba-ssm"
TRITON = "triton"
SEPARATE = "vssm auto, a call a direction"
_LENGTHS = (197, 157, 125, 101)
_BATCHES = (128, 1, 8, 32)
# A baseline's own rounding: it may sum in its own type.
_BASELINE_FACTOR = 4.0


@dataclass(frozen=True)
class Baselines:
    """What is here to compare with; None where it is not."""

    mamba: Any = None
    triton: Any = None


@dataclass(frozen=True)
class Contender:
    """A subject: its call by copy, and how the scan (batch, seqlen, d_inner) is read from that."""

    name: str
    call: Callable[[int], Any]
    result: Callable[[Any], Tensor] = lambda y: y
    dense: bool = False  # it knows no gaps: checked against the scan with gaps of one
    ours: bool = True


Contenders = Callable[[list[dict[str, Tensor]]], Iterable[Contender]]


def cases() -> Iterator[ScanShape]:
    """The shapes, those of the targets first."""
    half = "float16"
    for name in ("vim_tiny", "vim_small"):
        yield from (shapes.vim(name, batch, half) for batch in _BATCHES[:2])
        yield from (shapes.vim(name, 128, half, seqlen) for seqlen in (157, 101))
    yield shapes.plain_mamba_l3(128, half)
    done = {(128, 197), (1, 197), (128, 157), (128, 101)}
    for dtype in DTYPES:
        for batch in _BATCHES:
            for seqlen in _LENGTHS:
                if dtype == half and (batch, seqlen) in done:
                    continue
                yield from (shapes.vim(n, batch, dtype, seqlen) for n in ("vim_tiny", "vim_small"))
    for batch in (1, 128):
        yield from shapes.hierarchical(batch, half)
    yield shapes.plain_mamba_l3(1, half)


def run(report: Report, clock: Clock) -> None:
    """Every case until the time is over."""
    kernels = VariantKernels(find_library(LIBRARY))
    baselines = find_baselines(report)

    def one(shape: ScanShape) -> None:
        made = functools.partial(_contenders, shape, kernels=kernels, baselines=baselines)
        case(report, clock, shape, made)

    report.each(cases(), one)


def find_baselines(report: Report) -> Baselines:
    """mamba-ssm and Triton, or a line that says why not."""
    found: dict[str, Any] = {}
    try:
        found["mamba"] = mamba.load()
    except Exception as error:
        report.absent(MAMBA, one_line(error))
    try:
        from benchmarks.gpu import triton_scan

        found["triton"] = triton_scan
    except ImportError as error:
        report.absent(TRITON, one_line(error))
    return Baselines(**found)


def case(report: Report, clock: Clock, shape: ScanShape, contenders: Contenders) -> None:
    """Check and time one shape; `contenders` makes them of the copies of its operands."""
    first = shapes.operands(shape, clock.device)
    copies = copies_for(sizes(first.values()), clock.cache_bytes)
    given = [first, *(_copy(first) for _ in range(copies - 1))]
    timed = {c.name: c for c in contenders(given)}
    images = sorted({0, shape.batch - 1})
    dense = {**first, "gap": torch.ones_like(first["gap"])}
    want = {knows: shapes.oracle(shape, o, images) for knows, o in ((False, first), (True, dense))}

    def check(taken: Times) -> tuple[float, float]:
        contender = timed[taken.subject]
        got = contender.result(taken.last)[images]
        allowed = allowed_of(shape) * (1.0 if contender.ours else _BASELINE_FACTOR)
        return relative_error(got, want[contender.dense]), allowed

    report.measure(
        shape.case,
        [Subject(c.name, c.call) for c in timed.values()],
        clock,
        check,
        ours={name for name, c in timed.items() if c.ours},
        work=shape.work(first),
        copies=copies,
        caches=("warm", "cold"),
    )


def allowed_of(shape: ScanShape) -> float:
    """The largest relative error of a kernel of ours."""
    return ALLOWED[DTYPES[shape.dtype]]


def _copy(operands: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in operands.items()}


def _contenders(
    shape: ScanShape,
    given: list[dict[str, Tensor]],
    *,
    kernels: VariantKernels,
    baselines: Baselines,
) -> Iterator[Contender]:
    for variant in VARIANTS:
        yield ours(shape, given, kernels, variant)
    if shape.model == "plain_mamba_l3":
        yield _separate(shape, given, kernels)
    if baselines.mamba is not None and shape.model.startswith("vim"):
        yield _mamba(given, baselines.mamba)
    if baselines.triton is not None:
        yield _triton(given, baselines.triton, by_step=shape.params_by_step)


def ours(
    shape: ScanShape, given: list[dict[str, Tensor]], kernels: VariantKernels, variant: str = "auto"
) -> Contender:
    """Our kernel in one of its variants."""
    by_step = shape.params_by_step

    def call(copy: int) -> Tensor:
        return kernels.scan_in(variant, given[copy], params_by_step=by_step)

    return Contender(f"{OURS} {variant}", call)


def _separate(
    shape: ScanShape, given: list[dict[str, Tensor]], kernels: VariantKernels
) -> Contender:
    """One call a direction, without the sum over them: what sharing is held against."""
    parts = [[_direction(o, k) for k in range(shape.directions)] for o in given]

    def call(copy: int) -> list[Tensor]:
        by_step = shape.params_by_step
        return [kernels.scan_in("auto", part, params_by_step=by_step) for part in parts[copy]]

    # It rounds every direction: no worse is asked of it than of a baseline.
    return Contender(SEPARATE, call, lambda ys: torch.stack(ys).double().sum(0), ours=False)


def _direction(operands: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """The operands of direction k alone; what is shared stays."""
    axes = {"u": 2, "delta": 2, "B": 2, "C": 2, "A": 0, "D": 0, "delta_bias": 0}
    axes |= {"order": 1, "gap": 1}
    found = {}
    for name, value in operands.items():
        axis = axes.get(name)
        alone = axis is not None and value.shape[axis] > 1
        found[name] = value.narrow(axis, k, 1).contiguous() if alone else value
    return found


def _mamba(given: list[dict[str, Tensor]], extension: Any) -> Contender:
    """A call a direction on operands turned beforehand, without the sum: in its favour."""
    prepared = [mamba.directions(o) for o in given]

    def call(copy: int) -> list[Tensor]:
        return mamba.run(extension, prepared[copy])

    return Contender(MAMBA, call, mamba.joined, dense=True, ours=False)


def _triton(given: list[dict[str, Tensor]], module: Any, *, by_step: bool) -> Contender:
    def call(copy: int) -> Tensor:
        result: Tensor = module.scan(**given[copy], params_by_step=by_step)
        return result

    return Contender(TRITON, call, ours=False)


if __name__ == "__main__":
    main("scans", run)
