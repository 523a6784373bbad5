"""Latency and throughput of several sessions in one run, with the machine's floor beside them.

Subjects run in turn, one sample each a round, so that drift hits all alike; their outputs are
compared in the same run. Times are only comparable inside one report.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import onnxruntime

from vssm.runtimes.library import exp2_rate, library_info, product_rate
from vssm.runtimes.session import Session, checked_threads, compare_outputs, plural
from vssm.types import Array, Steps

# The inputs of a batch, as `Session.run` takes them.
MakeInputs = Callable[[int], Array | Mapping[str, Array]]
# Large enough that a matrix product is bound by arithmetic, small enough for tens of milliseconds.
_SIDE = 1024
_SAMPLES = 9
_MOVED = 0.1  # a limit that is off by more is another machine's


def machine_rates(threads: Collection[int]) -> MachineRates:
    """Measure what the kernels' vectors do on one thread, and multiply-adds by thread count."""
    # The floor takes vectors to scale with the threads; a matrix product is measured at each count.
    isa = library_info().cpu_isa
    macs = {count: _macs(count) for count in set(threads)}
    return MachineRates(exp2=exp2_rate(isa), products=product_rate(isa), macs=macs)


def moved_rates(before: MachineRates, after: MachineRates) -> list[str]:
    """A sentence if a limit at the end of a run is more than a tenth off the one at its start.

    Floors are then those of another machine than the one that was timed: other work came or went.
    """
    pairs = {
        "exp2": (before.exp2, after.exp2),
        "products": (before.products, after.products),
        **{
            f"matrix products ({plural(count, 'thread')})": (rate, after.macs[count])
            for count, rate in before.macs.items()
        },
    }
    moved = [
        f"{name} {new / old - 1:+.0%}"
        for name, (old, new) in pairs.items()
        if abs(new / old - 1) > _MOVED
    ]
    if not moved:
        return []
    return [
        f"the floors moved while this was measured ({', '.join(moved)} at the end): other work ran "
        "on the machine, so do not quote times over the floor; measure again"
    ]


def _macs(threads: int) -> float:
    """Multiply-adds a second of ONNX Runtime's float32 matrix product."""
    from onnx import TensorProto, helper  # tables of a report need none

    shape = [_SIDE, _SIDE]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "ab"],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, shape)],
    )
    # Both are fixed: a newer onnx writes newer ones by default, which ONNX Runtime may not read.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    feeds = {"a": matrix, "b": matrix}
    session.run(None, feeds)
    times = []
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - start)
    # The median: a machine that others use as well has slow outliers.
    return float(_SIDE**3 / np.median(times))


@dataclass(frozen=True)
class Contender:
    """One thing that is timed.

    Attributes:
        name: as it stands in the table.
        open: a session with that many threads.
        exps: evaluations of exp in its scans, an image.
        macs: multiply-adds of its matrix products and convolutions, an image.
        same_as: name of the subject whose logits it must reproduce, None for a reference.
        products: multiplications of its scans with one decay for all states, an image. Those of
            other scans pass beside their exponentials.
    """

    name: str
    open: Callable[[int], Session]
    exps: int
    macs: int
    same_as: str | None = None
    products: int = 0


@dataclass(frozen=True)
class MachineRates:
    """What one thread of this machine can do, measured in the same run, by thread count.

    Attributes:
        exp2: exp2 evaluations a second of one thread, with the kernel's own vector exp2.
        products: multiplications, each with an addition, a second of one thread's vectors.
        macs: float32 multiply-adds a second of a large matrix product, by threads.
    """

    exp2: float
    products: float
    macs: dict[int, float]

    def scan_floor_ms(self, subject: Contender, batch: int, threads: int) -> float:
        """Milliseconds that the scans of `batch` images take at the least."""
        seconds = subject.exps / self.exp2 + subject.products / self.products
        return 1e3 * seconds * batch / threads

    def floor_ms(self, subject: Contender, batch: int, threads: int) -> float:
        """The scans plus the multiply-adds of matrix products, with nothing overlapped."""
        products = 1e3 * subject.macs * batch / self.macs[threads]
        return self.scan_floor_ms(subject, batch, threads) + products


@dataclass(frozen=True)
class Timing:
    """One subject at one batch size and thread count; times in milliseconds a batch.

    The floor is None where the machine's limits were not measured: on a GPU.
    """

    subject: str
    batch: int
    threads: int
    median_ms: float
    p95_ms: float
    min_ms: float
    samples: int
    images_per_s: float
    floor_ms: float | None
    over_floor: float | None
    info: str
    difference: float | None = None


@dataclass(frozen=True)
class KindTime:
    """Milliseconds of one kind of work, and its floor where the arithmetic gives it one."""

    kind: str
    ms: float
    floor_ms: float | None

    @property
    def over_floor(self) -> float | None:
        """Its time over its floor; None without one."""
        return self.ms / self.floor_ms if self.floor_ms else None


@dataclass(frozen=True)
class BenchReport:
    """Everything one run measured.

    Attributes:
        rows: a row for every subject, batch size and thread count.
        rates: the machine's own limits; None on a GPU.
        operators: milliseconds by operator type of the kernel session, batch 1, one thread; empty
            on a GPU, where ONNX Runtime times the host's calls alone.
        scan_over_floor: time of our scans over their floor, from `operators`.
        context: machine, versions, dtype, command.
        notes: what one should know besides, in sentences.
        kinds: the time of `operators` by kind of work.
    """

    rows: list[Timing]
    rates: MachineRates | None
    operators: dict[str, float]
    scan_over_floor: float | None
    context: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kinds: list[KindTime] = field(default_factory=list)

    def row(self, subject: str, *, batch: int = 1, threads: int = 1) -> Timing:
        """The row of a subject.

        Raises:
            KeyError: it was not measured.
        """
        for row in self.rows:
            if (row.subject, row.batch, row.threads) == (subject, batch, threads):
                return row
        raise KeyError(f"no row for subject={subject!r}, batch={batch}, threads={threads}")


def check_arguments(batches: Sequence[int], threads: Sequence[int], samples: int) -> None:
    """Refuse what `measure` would refuse, before anything is made ready for it.

    Raises:
        ValueError: there is no number, one is below 1, or named twice; too many threads.
    """
    for name, values in (("batches", batches), ("threads", threads), ("samples", (samples,))):
        if not values or min(values) < 1:
            raise ValueError(f"{name}={list(values)}: must be at least 1; give positive numbers")
        if len(set(values)) < len(values):
            raise ValueError(f"{name}={list(values)} names one twice; name each once")
    for count in threads:
        checked_threads(count)


def measure(
    subjects: Sequence[Contender],
    inputs: tuple[int, ...] | MakeInputs,
    rates: MachineRates | None,
    *,
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1,),
    samples: int = 21,
    progress: Steps = lambda *_: None,
) -> list[Timing]:
    """Time every subject at every batch size and thread count.

    Args:
        subjects: what to time; sessions are opened once a thread count.
        inputs: (3, height, width) of images of noise, or what makes the inputs of a batch.
        rates: from `machine_rates`; None for rows without a floor.
        batches: batch sizes.
        threads: thread counts.
        samples: timed runs of each, after two that are not.
        progress: called before every round of runs.

    Raises:
        ValueError: an argument is below 1, or outputs that must agree do not.
    """
    check_arguments(batches, threads, samples)
    rows: list[Timing] = []
    # In images, as a batch of 8 takes longer than one of 1.
    done, total = 0, len(threads) * sum(batches) * (_UNTIMED + samples)

    def tell(images: int, note: str) -> None:
        nonlocal done
        progress("measuring, images", done, total, note)
        done += images

    for count in threads:
        sessions: list[Session] = []
        try:
            # Into a list that is there already: if the third does not
            # open, the first two are closed.
            sessions.extend(subject.open(count) for subject in subjects)
            for batch in batches:
                images = inputs(batch) if callable(inputs) else noise(inputs, batch)
                note = f"batch {batch}, {plural(count, 'thread')}"
                round_begins = functools.partial(tell, batch, note)
                times, logits = _alternate(sessions, images, samples, round_begins)
                for i, subject in enumerate(subjects):
                    floor = None if rates is None else rates.floor_ms(subject, batch, count)
                    difference = _difference(subjects, logits, i)
                    info = str(sessions[i].info)
                    row = _row(subject.name, (batch, count), times[i], floor_ms=floor, info=info)
                    rows.append(replace(row, difference=difference))
        finally:
            for session in reversed(sessions):
                session.close()
    progress("measuring, images", total, total)
    return rows


def noise(image_shape: tuple[int, ...], batch: int) -> Array:
    """Standard normal float32 images, the same for the same shape and batch."""
    shape = (batch, *image_shape)
    return np.random.default_rng(batch).standard_normal(shape).astype(np.float32)


_UNTIMED: Final = 2  # rounds


def _alternate(
    sessions: Sequence[Session],
    images: Array | Mapping[str, Array],
    samples: int,
    round_begins: Callable[[], None],
) -> tuple[list[list[float]], list[Array]]:
    """Seconds of `samples` runs of each session, taken in turn, and each session's logits."""
    # The first run allocates and may tune; its outputs are compared, its time is not taken.
    round_begins()
    logits = [_compared(session, session.run(images)) for session in sessions]
    round_begins()
    for session in sessions:
        session.run(images)
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(samples):
        # One sample each in turn: a clock that drops or a neighbour that wakes up hits all of them.
        round_begins()
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(images)
            taken.append(time.perf_counter() - start)
    return times, logits


def _compared(session: Session, outputs: Mapping[str, Array]) -> Array:
    """What sessions of one model must agree in: the main output, or the scores of what is found."""
    if not session.manifest.gives_boxes:
        return outputs[session.manifest.main_output.name]
    scores = outputs["scores"]
    # As many as may be told: a detection at the threshold may be there in one of them alone.
    most = max(len(scores), int(session.manifest.config["most"]))
    return np.pad(scores, (0, most - len(scores)))


def _difference(subjects: Sequence[Contender], logits: Sequence[Array], index: int) -> float | None:
    subject = subjects[index]
    if subject.same_as is None:
        return None
    reference = next(x for s, x in zip(subjects, logits, strict=True) if s.name == subject.same_as)
    difference, same = compare_outputs(logits[index], reference)
    if not same:
        raise ValueError(
            f"logits of {subject.name!r} differ from {subject.same_as!r} by {difference:.1e} of "
            "the largest; a timing of wrong numbers says nothing: run vssm check"
        )
    return difference


def _row(
    name: str,
    batch_threads: tuple[int, int],
    seconds: list[float],
    *,
    floor_ms: float | None,
    info: str,
) -> Timing:
    batch, threads = batch_threads
    milliseconds = 1e3 * np.asarray(seconds)
    median = float(np.median(milliseconds))
    return Timing(
        subject=name,
        batch=batch,
        threads=threads,
        median_ms=median,
        p95_ms=float(np.percentile(milliseconds, 95)),
        min_ms=float(milliseconds.min()),
        samples=len(seconds),
        images_per_s=1e3 * batch / median,
        floor_ms=floor_ms,
        over_floor=None if floor_ms is None else median / floor_ms,
        info=info,
    )
