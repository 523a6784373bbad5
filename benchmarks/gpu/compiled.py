"""Our scan against PyTorch's own means under torch.compile, at the shapes of the targets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks.gpu import doubling, scans, shapes
from benchmarks.gpu.native import VariantKernels
from benchmarks.gpu.report import Report, main
from benchmarks.gpu.scans import Contender
from benchmarks.gpu.shapes import ScanShape
from benchmarks.gpu.timing import Clock
from torch import Tensor

from vssm.native_library import find_library
from vssm.ops.kernels import LIBRARY

RECURRENCES = {
    "torch.compile, doubling": doubling.doubled,
    "torch.compile, associative_scan": doubling.associative,
}


def cases() -> Iterator[ScanShape]:
    """Vim's layers in float16; each is compiled anew, so there are few."""
    for name in ("vim_tiny", "vim_small"):
        yield from (shapes.vim(name, batch, "float16") for batch in (128, 1))


def run(report: Report, clock: Clock) -> None:
    """Every case until the time is over."""
    kernels = VariantKernels(find_library(LIBRARY))

    def one(shape: ScanShape) -> None:
        torch.compiler.reset()
        scans.case(report, clock, shape, functools.partial(contenders, shape, kernels))

    report.each(cases(), one)


def contenders(
    shape: ScanShape,
    kernels: VariantKernels,
    given: list[dict[str, Tensor]],
    compiler: Callable[[Any], Any] | None = None,
) -> Iterator[Contender]:
    """Our kernel and the compiled forms; `compiler` stands in for torch.compile."""
    compiler = compiler or functools.partial(torch.compile, dynamic=False)
    yield scans.ours(shape, given, kernels)
    for name, recurrence in RECURRENCES.items():
        compiled = compiler(plain(recurrence))

        def call(copy: int, compiled: Any = compiled) -> Tensor:
            result: Tensor = compiled(**given[copy])
            return result

        yield Contender(name, call, ours=False)


def plain(recurrence: doubling.Recurrence) -> Callable[..., Tensor]:
    """The baseline's scan with one of its recurrences, as a function: torch.compile wants one."""

    def scan(*streams: Tensor, **others: Any) -> Tensor:
        return doubling.scan(*streams, **others, recurrence=recurrence)

    return scan


if __name__ == "__main__":
    main("compiled", run)
