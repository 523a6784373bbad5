"""How gpu_check times: copies of the operands, and calls that meet them in turn."""

from __future__ import annotations

import pytest
import torch
from benchmarks.gpu import timing
from benchmarks.gpu.timing import HostClock, Subject, copies_for, measure, relative_error


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HostClock:
    monkeypatch.setattr(timing, "SAMPLE_US", 0.01)
    return HostClock()


def test_copies_outgrow_the_cache() -> None:
    assert [copies_for(size, 100) for size in (1, 99, 100, 101, 1000, 0)] == [200, 3, 2, 2, 2, 200]


def test_cold_calls_meet_every_copy_in_turn(clock: HostClock) -> None:
    met: list[int] = []
    subject = Subject("one", met.append)
    times = measure([subject], clock, copies=3, caches=("cold",), samples=2, lost=print)
    assert times[0].calls == 3
    assert met[-6:] == [0, 1, 2] * 2
    assert len(times[0].taken) == 2


def test_warm_calls_meet_one_copy(clock: HostClock) -> None:
    met: list[int] = []
    times = measure([Subject("one", met.append)], clock, copies=3, samples=2, lost=print)
    assert set(met) == {0}
    assert [t.cache for t in times] == ["warm"]


def test_samples_are_taken_in_turn(clock: HostClock) -> None:
    met: list[str] = []
    subjects = [Subject(name, lambda _, name=name: met.append(name)) for name in "ab"]
    measure(subjects, clock, samples=3, lost=print)
    assert met[-6:] == ["a", "b"] * 3


def test_a_subject_that_fails_is_told_and_left_out(clock: HostClock) -> None:
    told: list[tuple[str, str]] = []

    def broken(_: int) -> None:
        raise RuntimeError("no such kernel\nand more")

    subjects = [Subject("broken", broken), Subject("good", lambda i: i)]
    times = measure(subjects, clock, samples=2, lost=lambda *why: told.append(why))
    assert [(t.subject, t.last) for t in times] == [("good", 0)]
    assert told == [("broken", "RuntimeError: no such kernel")]


def test_calls_are_repeated_until_a_sample_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HostClock()
    monkeypatch.setattr(clock, "microseconds", lambda run: run() or 25.0)
    (times,) = measure([Subject("one", lambda _: None)], clock, samples=2, lost=print)
    assert times.calls == 20
    assert times.taken == (1.25, 1.25)
    assert times.percentile(50) == 1.25


def test_errors_of_numbers_that_are_not_finite_or_not_there() -> None:
    want = torch.tensor([1.0, -2.0])
    assert relative_error(torch.tensor([1.0, -1.0]), want) == 0.5
    assert relative_error(torch.tensor([1.0, float("nan")]), want) == float("inf")
    assert relative_error(torch.tensor([1.0]), want) == float("inf")
