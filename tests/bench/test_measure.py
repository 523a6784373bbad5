"""The benchmark times what it says, checks what it times, and knows the floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest

from vssm.artifact.manifest import Manifest, TensorInfo
from vssm.bench.measure import (
    BenchReport,
    Contender,
    MachineRates,
    machine_rates,
    measure,
    moved_rates,
)
from vssm.bench.page import page
from vssm.commands.tables import bench_tables
from vssm.runtimes.session import RuntimeInfo, Session
from vssm.types import Array

RATES = MachineRates(exp2=1e9, products=1e9, macs={1: 1e10, 2: 2e10})
MANIFEST = Manifest(
    name="fake",
    config={},
    inputs=(TensorInfo("images", "float32", ("batch", 3, 4, 4)),),
    outputs=(TensorInfo("logits", "float32", ("batch", 2)),),
    dtype="float32",
    opset=18,
    files={},
    operators={},
    versions={},
)


class Fake(Session):
    """Sleeps a while, answers a constant, and counts."""

    def __init__(self, threads: int, seconds: float, answer: float) -> None:
        super().__init__(MANIFEST, RuntimeInfo("fake", "body", "1", "here", threads))
        self.seconds, self.answer, self.runs, self.closed = seconds, answer, 0, False

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        assert not self.closed
        self.runs += 1
        time.sleep(self.seconds)
        return {"logits": np.full((len(feeds["images"]), 2), self.answer, np.float32)}

    def close(self) -> None:
        self.closed = True


def fake(seconds: float = 0.0, answer: float = 1.0) -> tuple[Callable[[int], Session], list[Fake]]:
    opened: list[Fake] = []

    def open_session(threads: int) -> Session:
        opened.append(Fake(threads, seconds, answer))
        return opened[-1]

    return open_session, opened


def test_rows_hold_times_rates_and_floor() -> None:
    open_slow, slow = fake(0.004)
    open_fast, fast = fake(0.002, answer=1.05)
    subjects = [
        Contender("slow", open_slow, exps=1_000_000, macs=10_000_000),
        Contender("fast", open_fast, exps=1, macs=1, same_as="slow"),
    ]
    told: list[tuple[object, ...]] = []
    asked = {"batches": (1, 4), "threads": (1, 2), "samples": 5}
    rows = measure(subjects, (3, 4, 4), RATES, **asked, progress=lambda *step: told.append(step))  # type: ignore[arg-type]
    # In images, before each of the 7 rounds: what is left is known after the first of them.
    assert [step[1] for step in told[:8]] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [step[1] for step in told[8:10]] == [11, 15]
    assert told[-1] == ("measuring, images", 70, 70)
    assert [(r.subject, r.batch, r.threads) for r in rows] == [
        (name, batch, threads)
        for threads in (1, 2)
        for batch in (1, 4)
        for name in ("slow", "fast")
    ]
    report = BenchReport(rows, RATES, {"Conv": 1.0}, None)
    row = report.row("slow", batch=4, threads=2)
    # 4e6 exps on two threads of 1e9/s, 4e7 multiply-adds at 2e10/s.
    assert row.floor_ms == pytest.approx(2.0 + 2.0)
    assert row.median_ms >= 4.0
    assert row.p95_ms >= row.median_ms >= row.min_ms
    assert row.images_per_s == pytest.approx(4e3 / row.median_ms)
    assert row.over_floor == pytest.approx(row.median_ms / row.floor_ms)
    assert report.row("fast").difference == pytest.approx(0.05)
    assert report.row("fast").median_ms < report.row("slow").median_ms
    assert [s.runs for s in (*slow, *fast)] == [2 * (2 + 5)] * 4
    assert all(s.closed for s in (*slow, *fast))
    with pytest.raises(KeyError, match=r"batch=3"):
        report.row("slow", batch=3)


def test_floors_that_moved_are_said() -> None:
    same = MachineRates(exp2=1.09e9, products=0.92e9, macs={1: 1.09e10, 2: 1.9e10})
    assert moved_rates(RATES, same) == []
    busy = MachineRates(exp2=0.8e9, products=1e9, macs={1: 1e10, 2: 2.3e10})
    (sentence,) = moved_rates(RATES, busy)
    assert "exp2 -20%, matrix products (2 threads) +15% at the end" in sentence
    assert "measure again" in sentence


def test_wrong_numbers_are_not_timed() -> None:
    open_right, right = fake()
    open_wrong, _ = fake(answer=1.5)
    open_nan, _ = fake(answer=float("nan"))
    for open_bad in (open_wrong, open_nan):
        subjects = [
            Contender("right", open_right, 1, 1),
            Contender("bad", open_bad, 1, 1, same_as="right"),
        ]
        with pytest.raises(ValueError, match=r"logits of 'bad' differ from 'right'"):
            measure(subjects, (3, 4, 4), RATES, batches=(1,), samples=1)
    assert all(session.closed for session in right)


@pytest.mark.parametrize(
    "options", [{"batches": ()}, {"batches": (0,)}, {"threads": (0,)}, {"samples": 0}], ids=str
)
def test_bad_arguments(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1"):
        measure([], (3, 4, 4), RATES, **options)


def test_what_would_be_measured_twice_or_hang_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batches=\[1, 1\] names one twice"):
        measure([], (3, 4, 4), RATES, batches=(1, 1))
    with pytest.raises(ValueError, match=r"threads=100000 is outside"):
        measure([], (3, 4, 4), RATES, threads=(100_000,))


def test_sessions_are_closed_where_another_does_not_open() -> None:
    open_right, right = fake()

    def refuse(_: int) -> Session:
        raise RuntimeError("none here")

    with pytest.raises(RuntimeError, match=r"none here"):
        measure([Contender("a", open_right, 1, 1), Contender("b", refuse, 1, 1)], (3, 4, 4), RATES)
    assert [session.closed for session in right] == [True]


def test_the_machine_is_measured() -> None:
    rates = machine_rates([1])
    assert 1e7 < rates.exp2 < 1e12
    assert 1e8 < rates.macs[1] < 1e13
    work = Contender("scans", fake()[0], 1000, 1, products=500)
    expected = 2e6 / rates.exp2 + 1e6 / rates.products
    assert rates.scan_floor_ms(work, 2, 1) == pytest.approx(expected)


def test_a_gpu_has_rows_without_a_floor() -> None:
    open_session, _ = fake()
    rows = measure([Contender("gpu", open_session, 1, 1)], (3, 4, 4), None, batches=(1,), samples=1)
    assert (rows[0].floor_ms, rows[0].over_floor) == (None, None)
    report = BenchReport(rows, None, {}, None, {"gpu": "H100"})
    text = page(report)
    assert "floor was not measured" in text
    assert "time by operator" not in text
    assert text.count("<svg") == 1
    assert len(bench_tables(report)) == 2


def test_page_shows_rows_and_escapes() -> None:
    open_session, _ = fake()
    rows = measure(
        [Contender("a<b", open_session, 1, 1)], (3, 4, 4), RATES, batches=(1,), samples=1
    )
    text = page(BenchReport(rows, RATES, {"Conv": 1.0, "MatMul": 3.0}, 1.4, {"cpu": "x&y"}))
    assert "a&lt;b" in text
    assert "x&amp;y" in text
    assert "<td>75%</td>" in text
    assert "1.40 times their floor" in text
    assert text.count("<svg") == 1


def test_detectors_agree_in_their_scores() -> None:
    """How many there are may differ by one at the threshold; what is found may not."""
    manifest = replace(
        MANIFEST,
        config={"most": 4},
        inputs=(TensorInfo("images", "float32", (1, 3, 4, 4)),),
        outputs=(TensorInfo("boxes", "float32", ("detections", 4)),),
    )

    def opened(*scores: float) -> Callable[[int], Session]:
        session = Fake(1, 0.0, 0.0)
        session.manifest = manifest
        found = {"boxes": np.zeros((len(scores), 4)), "scores": np.array(scores)}
        session.run = lambda images: found  # type: ignore[method-assign,assignment]
        return lambda threads: session

    def difference(*scores: float) -> float | None:
        one = Contender("one", opened(0.9, 0.5), exps=0, macs=0)
        other = Contender("other", opened(*scores), exps=0, macs=0, same_as="one")
        return measure([one, other], (3, 4, 4), None, batches=(1,), samples=1)[1].difference

    assert difference(0.9, 0.5, 0.05) == pytest.approx(0.05 / 0.9)
    with pytest.raises(ValueError, match=r"differ from 'one' by 5\.6e-01"):
        difference(0.9)
