"""TokenGather and TokenScatter against PyTorch, and against copying the rows that they move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from benchmarks.gpu.native import VariantKernels
from benchmarks.gpu.report import Case, Report, Work, main
from benchmarks.gpu.shapes import DTYPES
from benchmarks.gpu.timing import Clock, Subject, Times, copies_for, sizes
from torch import Tensor

from vssm.native_library import find_library
from vssm.ops import reference
from vssm.ops.kernels import LIBRARY

GATHER, SCATTER = "TokenGather", "TokenScatter"
OURS = "vssm"
TORCH = {GATHER: "torch.topk, sort, gather", SCATTER: "torch.scatter"}
COPY = {GATHER: "copy of the kept rows", SCATTER: "copy of all rows"}


@dataclass(frozen=True)
class Move:
    """An operator that keeps, or puts back, `kept` of the `seqlen` tokens of each image."""

    operator: str
    batch: int
    seqlen: int
    width: int
    kept: int

    @property
    def case(self) -> Case:
        """What a row says of it."""
        return {"model": "vim_tiny", "dtype": "float16", **asdict(self)}


@dataclass(frozen=True)
class Bench:
    """What is timed on copies of the operands, the exact result, and the least work."""

    subjects: list[Subject]
    want: list[Tensor]
    work: Work


def run(
    report: Report,
    clock: Clock,
    kernels: VariantKernels | None = None,
    shape: tuple[int, int, int, int] = (128, 197, 384, 157),
) -> None:
    """In float16, as Vim's stages and their taps move rows; `shape`: batch, seqlen, width, kept."""
    native = kernels or VariantKernels(find_library(LIBRARY))

    def measure(move: Move) -> None:
        first = operands(move, clock.device)
        copies = copies_for(sizes(first), clock.cache_bytes)
        given = [first, *([t.clone() for t in first] for _ in range(copies - 1))]
        is_gather = move.operator == GATHER
        found = gather(native, given, move.kept) if is_gather else scatter(native, given)

        def check(taken: Times) -> tuple[float, float]:
            same = all(torch.equal(a, b) for a, b in zip(taken.last, found.want, strict=True))
            return (0.0 if same else float("inf")), 0.0

        report.measure(
            move.case,
            found.subjects,
            clock,
            check,
            ours={OURS},
            work=found.work,
            copies=copies,
            caches=("warm", "cold"),
        )

    report.each([Move(GATHER, *shape), Move(SCATTER, *shape)], measure)


def operands(move: Move, device: torch.device) -> list[Tensor]:
    """Of a gather distinct scores, positions in order and two streams; of a scatter two streams.

    A scatter's are all tokens and the kept ones, and with them the positions of the latter.
    """
    make = torch.Generator(device=device).manual_seed(0)
    score = torch.randn(move.batch, move.seqlen, generator=make, device=device)
    streams = torch.randn(2, move.batch, move.seqlen, move.width, generator=make, device=device)
    whole, other = streams.to(DTYPES["float16"])
    if move.operator == GATHER:
        place = torch.arange(move.seqlen, dtype=torch.int32, device=device)[None]
        return [score, place, whole, other]
    position = score.topk(move.kept, dim=1).indices.sort(dim=1).values.to(torch.int32)
    return [whole, other[:, : move.kept].contiguous(), position]


def gather(kernels: VariantKernels, given: Sequence[list[Tensor]], num_keep: int) -> Bench:
    """Two streams, as Vim's stages have them."""
    score, place, *xs = given[0]
    kept, rows = reference.token_gather(score, place, xs, num_keep=num_keep)
    want = [kept, *rows]
    sources = [torch.stack(rows) for _ in given]
    subjects = [
        Subject(OURS, lambda i: kernels.gathered(given[i], num_keep)),
        Subject(TORCH[GATHER], lambda i: by_topk(given[i], num_keep)),
        Subject(COPY[GATHER], lambda i: [kept, *sources[i].clone()]),
    ]
    return Bench(subjects, want, Work(bytes=sizes([score, place, kept]) + 2 * sizes(rows)))


def by_topk(given: list[Tensor], num_keep: int) -> list[Tensor]:
    """What one writes in PyTorch: positions, then the rows of each stream."""
    score, place, *xs = given
    slots = score.topk(num_keep, dim=1, sorted=False).indices.sort(dim=1).values
    index = [slots[..., None].expand(-1, -1, x.shape[2]) for x in xs]
    rows = [x.gather(1, i) for x, i in zip(xs, index, strict=True)]
    return [place.expand_as(score).gather(1, slots), *rows]


def scatter(kernels: VariantKernels, given: Sequence[list[Tensor]]) -> Bench:
    """One stream, as the taps of a dense head put it back."""
    base, x, position = given[0]
    y = reference.token_scatter(base, x, position)
    sources = [y.clone() for _ in given]
    subjects = [
        Subject(OURS, lambda i: [kernels.scattered(given[i])]),
        Subject(TORCH[SCATTER], lambda i: [by_scatter(given[i])]),
        Subject(COPY[SCATTER], lambda i: [sources[i].clone()]),
    ]
    return Bench(subjects, [y], Work(bytes=sizes([position]) + 2 * sizes([y])))


def by_scatter(given: list[Tensor]) -> Tensor:
    """What one writes in PyTorch."""
    base, x, position = given
    return base.scatter(1, position.long()[..., None].expand_as(x), x)


if __name__ == "__main__":
    main("gathers", run)
