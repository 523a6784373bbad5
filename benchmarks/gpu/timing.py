"""Device times of several subjects, taken in turn.

A sample is the replay of a CUDA graph of many calls, between two device events: launches cost what
they cost inside a model, and the processor's own time is left out. "warm" calls find the same
operands again; "cold" ones walk through copies that are together twice the last-level cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

SAMPLES = 25
WARM_UPS = 3
SAMPLE_US = 500.0  # calls are repeated until a sample is about this long
MAX_CALLS = 200


@dataclass
class Prepared:
    """Calls made ready: `run` makes them all, and `last` is what the last one of a run gave."""

    run: Callable[[], Any]
    last: Any = None


class Clock(Protocol):
    """How calls are made ready and timed."""

    device: torch.device
    cache_bytes: int

    def begin(self) -> None:
        """Start a measurement; what was prepared before is not run again."""
        ...

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> Prepared:
        """All the calls as one run."""
        ...

    def microseconds(self, run: Callable[[], Any]) -> float:
        """The time of one run."""
        ...


class CudaClock:
    """CUDA graphs and device events."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        self.begin()

    def begin(self) -> None:
        """Give this measurement's graphs one pool of memory, held by a first graph of nothing.

        They run in turn and in the order of their capture, so that temporaries may share it.
        """
        self._pool = torch.cuda.graph_pool_handle()
        self._anchor = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._anchor, pool=self._pool):
            torch.zeros(1, device=self.device)

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> Prepared:
        """Capture the calls in a graph, after warming up on a side stream."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            for call in calls:
                last = call()
        torch.cuda.synchronize()
        return Prepared(graph.replay, last)  # every replay writes to the same memory

    def microseconds(self, run: Callable[[], Any]) -> float:
        """The second of two runs in a row, so that the card never waits for the processor."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        run()
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)


class HostClock:
    """Wall time of plain calls: what the tests of these programs use, where there is no GPU."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.cache_bytes = 1 << 20

    def begin(self) -> None:
        """Nothing to do."""

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> Prepared:
        """The calls one after the other."""

        def run() -> None:
            for call in calls:
                prepared.last = call()

        prepared = Prepared(run)
        for _ in range(WARM_UPS):
            calls[0]()
        return prepared

    def microseconds(self, run: Callable[[], Any]) -> float:
        """Wall time; the work must be over when `run` returns."""
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)


@dataclass(frozen=True)
class Subject:
    """One thing that is timed: `call(i)` runs it on copy i of the operands."""

    name: str
    call: Callable[[int], Any]


@dataclass(frozen=True)
class Times:
    """Microseconds a call, one number a sample, and what the last timed call gave."""

    subject: str
    cache: str
    calls: int
    taken: tuple[float, ...]
    last: Any = None

    def percentile(self, q: float) -> float:
        """The q-th percentile of the samples."""
        return float(np.percentile(self.taken, q))


def copies_for(operand_bytes: int, cache_bytes: int) -> int:
    """Copies of the operands that are together at least twice the cache, and at least two."""
    return max(2, -(-2 * cache_bytes // max(operand_bytes, 1)))


def measure(
    subjects: Sequence[Subject],
    clock: Clock,
    *,
    copies: int = 1,
    caches: Sequence[str] = ("warm",),
    samples: int = SAMPLES,
    lost: Callable[[str, str], None],
) -> list[Times]:
    """Time every subject with every state of the cache, one sample of each a round.

    Args:
        subjects: what to time.
        clock: how.
        copies: copies of the operands that "cold" walks through.
        caches: "warm", "cold" or both.
        samples: samples of each.
        lost: told the name of a subject that cannot be made ready, and why.
    """
    clock.begin()
    ready: list[tuple[Subject, str, int, Prepared]] = []
    for subject in subjects:
        try:
            ready += [_ready(subject, cache, clock, copies) for cache in caches]
        except Exception as error:  # a baseline that fails must not take the others with it
            ready = [item for item in ready if item[0] is not subject]
            lost(subject.name, one_line(error))
    taken: list[list[float]] = [[] for _ in ready]
    for _ in range(samples):
        for (_, _, calls, prepared), times in zip(ready, taken, strict=True):
            times.append(clock.microseconds(prepared.run) / calls)
    return [
        Times(subject.name, cache, calls, tuple(times), prepared.last)
        for (subject, cache, calls, prepared), times in zip(ready, taken, strict=True)
    ]


def _ready(
    subject: Subject, cache: str, clock: Clock, copies: int
) -> tuple[Subject, str, int, Prepared]:
    """A subject with its calls prepared, as many as make a sample of useful length."""
    once = clock.prepare([lambda: subject.call(0)])
    single = max(min(clock.microseconds(once.run) for _ in range(3)), 0.1)
    calls = int(min(max(SAMPLE_US / single, 1), MAX_CALLS))
    if cache == "cold":
        calls = -(-calls // copies) * copies  # whole rounds: each copy is met after all others
    places = [i % copies if cache == "cold" else 0 for i in range(calls)]
    prepared = clock.prepare([lambda place=place: subject.call(place) for place in places])
    return subject, cache, calls, prepared


def one_line(error: BaseException) -> str:
    """An exception's kind and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest magnitude; infinite where numbers are not finite."""
    if got.shape != want.shape:
        return float("inf")
    difference = (got.double() - want.double()).abs().max() / want.double().abs().max()
    return float(difference) if torch.isfinite(difference) else float("inf")


def sizes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of some tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)
