"""Tests of `vssm.files.progress`."""

from __future__ import annotations

import importlib.util
import io
import types

import pytest

from vssm.files import progress
from vssm.files.progress import automatic, drawn, shows_progress
from vssm.files.terminal import Terminal
from vssm.types import Steps


def _clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    clock = types.SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_has_lines_of_count_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = _clock(monkeypatch), io.StringIO()
    with drawn(Terminal(file=log)) as tell:
        tell("opening the model", 0, 0)
        for step in range(13):
            tell("training, steps", step, 1300, f"epoch 1 of 30, loss 2.3{step:02}")
            clock.now += 4.0
        tell("tracing [b]\x1b", 0, 2)
    assert log.getvalue().splitlines() == [
        "opening the model",
        "training, steps",
        # After 5 s, then every 30; what does not fit is left out, the rate first.
        "training, steps: 2 of 1,300, 4.0 s each, 1:26:32 left, epoch 1 of 30, loss 2.302",
        "training, steps: 10 of 1,300, 1:26:00 left, epoch 1 of 30, loss 2.310",
        "tracing [b]\\x1b",
    ]
    assert all(len(line) <= 80 for line in log.getvalue().splitlines())


@pytest.mark.parametrize("total", [2**63, 10**400], ids=["64 bits", "no float"])
def test_a_time_beyond_any_calendar_is_left_out(
    total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _clock(monkeypatch).now = 4.0
    stage = progress.Phase("measuring", 1, total, "kernel", 0, 0.0)
    assert stage.text(9999).endswith(", 4.0 s each, kernel")


def test_the_first_figures_have_a_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the first step takes; and of a long note its beginning stays."""
    clock, log = _clock(monkeypatch), io.StringIO()
    with drawn(Terminal(file=log)) as tell:
        for step, now in ((0, 0.0), (0, 12.0), (1, 17.0)):
            clock.now = now
            tell("training, steps", step, 75_060, "loss 2.3025, top-1 71.20%, epoch 1 of 30")
    assert log.getvalue().splitlines() == [
        "training, steps",
        "training, steps: 1 of 75,060, 14 days, 18:26:43 left, loss 2.3025, top-1 71.20%",
    ]


def test_a_part_of_a_work_that_is_shown_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    @shows_progress
    def part(*, progress: Steps = automatic) -> Steps:
        return progress

    monkeypatch.setenv("FORCE_COLOR", "1")
    with drawn(Terminal(file=io.StringIO(), force_terminal=True)):
        assert part() is automatic
    assert part() is not automatic


def test_the_rate_is_that_of_this_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stopped run had done took none of its time."""
    clock, log = _clock(monkeypatch), io.StringIO()
    with drawn(Terminal(file=log)) as tell:
        tell("evaluating images", 600, 1000)
        clock.now = 10.0
        tell("evaluating images", 700, 1000, "top-1 71.20%")
    said = log.getvalue().splitlines()[-1]
    assert said == "evaluating images: 700 of 1,000, 10.0/s, 0:00:30 left, top-1 71.20%"


@pytest.mark.parametrize("width", [80, 60, 50])
def test_a_bar_is_one_line(width: int) -> None:
    screen = io.StringIO()
    console = Terminal(file=screen, force_terminal=True, width=width, color_system=None)
    with drawn(console) as tell:
        tell("loading PyTorch", 0, 0)
        for step in (0, 500_000, 1_000_000):
            tell("evaluating images", step, 1_281_167, "top-1 71.20%")
            tell("gap-0: validating, images", step, 1_281_167, "a note of many words " * 9)
    # The cursor goes up a line for each line but the last that was drawn: two bars, two lines.
    assert "\x1b[3A" not in screen.getvalue()
    assert screen.getvalue().count("\x1b[1A") > 0


def test_a_function_draws_where_somebody_sees_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @shows_progress
    def work(*, progress: Steps = automatic) -> Steps:
        progress("working", 1, 3)
        return progress

    assert work() is automatic  # nobody sees it here
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    assert work() is not automatic
    assert "1 of 3" in capsys.readouterr().err
    told: list[tuple[object, ...]] = []
    work(progress=lambda *step: told.append(step))
    assert told == [("working", 1, 3)]
    assert capsys.readouterr().err == ""


def test_a_notebook_that_cannot_draw_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    @shows_progress
    def work(*, progress: Steps = automatic) -> Steps:
        return progress

    monkeypatch.setenv("FORCE_COLOR", "1")  # as its kernel has it
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no ipywidgets
    assert work() is automatic
