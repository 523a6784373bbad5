"""TokenGather against torch.topk, sort and gather, and against copying the rows that are kept."""

from __future__ import annotations

import torch
from benchmarks.gpu.native import VariantKernels
from benchmarks.gpu.report import Case, Report, Work, main
from benchmarks.gpu.shapes import DTYPES
from benchmarks.gpu.timing import Clock, Subject, Times, copies_for, sizes
from torch import Tensor

from vssm.native_library import find_library
from vssm.ops import reference
from vssm.ops.kernels import LIBRARY

OURS = "vssm"
TORCH = "torch.topk, sort, gather"
COPY = "copy of the kept rows"


def run(
    report: Report,
    clock: Clock,
    kernels: VariantKernels | None = None,
    shape: tuple[int, int, int, int] = (128, 197, 384, 157),
) -> None:
    """Two float16 tensors, as Vim's stages gather them; `shape`: batch, seqlen, width, kept."""
    batch, seqlen, width, num_keep = shape
    kernels = kernels or VariantKernels(find_library(LIBRARY))
    case: Case = {"model": "vim_tiny", "dtype": "float16"}
    case |= {"batch": batch, "seqlen": seqlen, "width": width, "kept": num_keep}
    first = operands(batch, seqlen, width, clock.device)
    copies = copies_for(sizes(first), clock.cache_bytes)
    given = [first, *([t.clone() for t in first] for _ in range(copies - 1))]
    score, place, *xs = first
    kept, rows = reference.token_gather(score, place, xs, num_keep=num_keep)
    want = [kept, *rows]
    sources = [torch.stack(rows) for _ in given]
    subjects = [
        Subject(OURS, lambda i: kernels.gathered(given[i], num_keep)),
        Subject(TORCH, lambda i: by_topk(given[i], num_keep)),
        Subject(COPY, lambda i: [kept, *sources[i].clone()]),
    ]

    def check(taken: Times) -> tuple[float, float]:
        same = all(torch.equal(a, b) for a, b in zip(taken.last, want, strict=True))
        return (0.0 if same else float("inf")), 0.0

    work = Work(bytes=sizes(first[:2]) + sizes([kept]) + 2 * sizes(rows))
    caches = ("warm", "cold")
    report.measure(
        case, subjects, clock, check, ours={OURS}, work=work, copies=copies, caches=caches
    )


def operands(batch: int, seqlen: int, width: int, device: torch.device) -> list[Tensor]:
    """Distinct scores, positions in order, two streams."""
    make = torch.Generator(device=device).manual_seed(0)
    score = torch.randn(batch, seqlen, generator=make, device=device)
    place = torch.arange(seqlen, dtype=torch.int32, device=device)[None]
    streams = torch.randn(2, batch, seqlen, width, generator=make, device=device)
    return [score, place, *streams.to(DTYPES["float16"])]


def by_topk(given: list[Tensor], num_keep: int) -> list[Tensor]:
    """What one writes in PyTorch: positions, then the rows of each stream."""
    score, place, *xs = given
    slots = score.topk(num_keep, dim=1, sorted=False).indices.sort(dim=1).values
    index = [slots[..., None].expand(-1, -1, x.shape[2]) for x in xs]
    rows = [x.gather(1, i) for x, i in zip(xs, index, strict=True)]
    return [place.expand_as(score).gather(1, slots), *rows]


if __name__ == "__main__":
    main("gathers", run)
