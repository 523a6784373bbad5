"""TokenGather against torch.topk, sort and gather, and against copying the rows that are kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.native import Kernels
from benchmarks.gpu.program import Report, label, main
from benchmarks.gpu.result import Work
from benchmarks.gpu.shapes import DTYPES
from benchmarks.gpu.timing import Clock, Subject, copies_for, measure, sizes
from exporter import reference

OURS = "vssm"
TORCH = "torch.topk, sort, gather"
COPY = "copy of the kept rows"


def run(
    report: Report,
    clock: Clock,
    kernels: Kernels | None = None,
    shape: tuple[int, int, int, int] = (128, 197, 384, 157),
) -> None:
    """Two float16 tensors, as Vim's stages gather them; `shape`: batch, seqlen, width, kept."""
    batch, seqlen, width, num_keep = shape
    kernels = kernels or Kernels()
    case = {"model": "vim_tiny", "dtype": "float16", "batch": batch, "seqlen": seqlen}
    first = operands(batch, seqlen, width, clock.device)
    copies = copies_for(sizes(first), clock.cache_bytes)
    given = [first, *([t.clone() for t in first] for _ in range(copies - 1))]
    made = [kernels.gather(score, place, xs, num_keep) for score, place, *xs in given]
    target = torch.empty(2, batch, num_keep, width, dtype=first[2].dtype, device=clock.device)
    sources = [torch.zeros_like(target) for _ in given]
    subjects = [
        Subject(OURS, lambda i: made[i][0]()),
        Subject(TORCH, lambda i: by_topk(given[i], num_keep)),
        Subject(COPY, lambda i: target.copy_(sources[i])),
    ]
    times = measure(
        subjects, clock, copies=copies, caches=("warm", "cold"), lost=_losing(report, label(case))
    )
    score, place, *xs = first
    kept, rows = reference.token_gather(score, place, xs, num_keep=num_keep)
    found = {OURS: made[0][1], TORCH: by_topk(first, num_keep)}
    for name, got in found.items():
        same = all(torch.equal(a, b) for a, b in zip(got, [kept, *rows], strict=True))
        if not same:
            report.wrong(f"{name}, {label(case)}", "it gathers other rows than the oracle")
            times = [t for t in times if t.subject != name]
    work = Work(bytes=sizes(first[:2]) + kept.numel() * kept.element_size() + 2 * sizes(rows))
    report.rows(case, times, dict.fromkeys((OURS, TORCH, COPY), (0.0, 0.0)), work)


def _losing(report: Report, case: str) -> Callable[[str, str], None]:
    def lost(name: str, why: str) -> None:
        report.wrong(f"{name}, {case}", why)

    return lost


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
