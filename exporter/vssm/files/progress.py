"""How far a long work is: a bar in a terminal or a notebook, lines in a log."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, ParamSpec, TypeVar

from rich.cells import cell_len
from rich.console import Console

from vssm.files.terminal import Terminal
from vssm.files.text import shown

P = ParamSpec("P")
R = TypeVar("R")
# Seconds between a phase's name and its first figures in a log, and between later ones.
_FIRST: Final = 5.0
_SECONDS: Final = 30.0
_WIDTH: Final = 80
_drawing: Final = ContextVar("drawing", default=False)
_BAR: Final = 10


def automatic(phase: str, done: int, total: int, note: str = "", /) -> None:
    """Stands for a bar, where somebody sees it: in a terminal, or a notebook with ipywidgets."""


def shows_progress(function: Callable[P, R]) -> Callable[P, R]:
    """Where `progress` is `automatic`, the function draws a bar, if somebody sees it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        console = Terminal(stderr=True)
        told = kwargs.get("progress", automatic) is not automatic
        # A part of a work that is shown already is not shown by itself.
        if told or not _watched(console) or _drawing.get():
            return function(*args, **kwargs)
        with drawn(console) as shown_steps:
            kwargs["progress"] = shown_steps
            return function(*args, **kwargs)

    return call


@dataclass
class Phase:
    """How far one phase of a work is.

    Attributes:
        name: what is being done.
        done: steps that are done.
        total: of how many; 0 and 1 for a phase that counts nothing.
        note: what else there is to say.
        start: the steps that were done when it began.
        began: when that was.
    """

    name: str
    done: int
    total: int
    note: str
    start: int
    began: float

    def text(self, width: int) -> str:
        """Count, rate, time left and note, as far as they are known and fit into `width`."""
        made, seconds = self.done - self.start, time.monotonic() - self.began
        count = f"{self.done:,} of {self.total:,}" if self.total > 1 else ""
        rate = left = ""
        if made > 0 and seconds > 0 and self.total > 1:
            speed = made / seconds
            rate = f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"
            with contextlib.suppress(OverflowError):  # longer than any calendar
                left = f"{timedelta(seconds=round((self.total - self.done) / speed))} left"
        notes = shown(self.note).split(", ")
        parts = [part for part in (count, rate, left, *notes) if part]
        # The rate can be done without first, then the end of the note, and the count last.
        for least in (rate, *reversed(notes), left):
            if cell_len(", ".join(parts)) <= width:
                break
            parts = [part for part in parts if part != least]
        return ", ".join(parts)[:width]


class Shown:
    """Shows the phases of a long work; what reports may call it from threads of its own.

    Attributes:
        last: the phase that was told last; None before the first.
    """

    def __init__(self) -> None:
        self.last: Phase | None = None
        self._phases: dict[str, Phase] = {}
        # A signal's handler may tell something while its own thread is at it.
        self._lock = threading.RLock()

    def __call__(self, phase: str, done: int, total: int, note: str = "", /) -> None:
        """Say that `done` of `total` steps of a phase are done."""
        with self._lock:
            told = self._phases.get(phase)
            if told is None or done < told.done:
                told = Phase(phase, done, total, note, done, time.monotonic())
                self._phases[phase] = told
            told.done, told.total, told.note, self.last = done, total, note, told
            self.show(told)

    def show(self, told: Phase) -> None:
        """Show it, or not now."""
        raise NotImplementedError


class _Log(Shown):
    """A line when a phase begins, soon after, and now and then."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._due: dict[str, float] = {}

    def show(self, told: Phase) -> None:
        """A phase is named at once, its steps now and then."""
        now, name = time.monotonic(), shown(told.name)[: _WIDTH // 2]
        if told.name not in self._due:
            self._due[told.name] = now + _FIRST
            self._console.print(name, soft_wrap=True, highlight=False)
        # Not before there is a rate, or the time left would be told only the next time.
        elif now >= self._due[told.name] and (told.done > told.start or told.total <= 1):
            self._due[told.name] = now + _SECONDS
            text = told.text(_WIDTH - cell_len(name) - 2)
            self._console.print(f"{name}: {text}", soft_wrap=True, highlight=False)


class _Bars(Shown):
    """A bar for each phase that is not over."""

    def __init__(self, console: Console, bars: Any) -> None:
        super().__init__()
        self._console, self._bars = console, bars
        self._tasks: dict[str, Any] = {}

    def show(self, told: Phase) -> None:
        """Draw its bar; one that counts nothing goes when another phase begins."""
        phase, name = told.name, shown(told.name)[: _WIDTH // 2]
        for other in [k for k in self._tasks if k != phase and self._phases[k].total <= 1]:
            self._bars.remove_task(self._tasks.pop(other))
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(name, total=None, text="")
        text = told.text(min(self._console.width, 2 * _WIDTH) - cell_len(name) - _BAR - 6)
        total = told.total if told.total > 1 else None  # None: something moves all the same
        self._bars.update(self._tasks[phase], completed=told.done, total=total, text=text)
        if 0 < told.total <= told.done:
            # Gone when done, so that a phase which comes again has a bar of its own.
            self._bars.remove_task(self._tasks.pop(phase))


@contextmanager
def drawn(console: Console) -> Iterator[Shown]:
    """Bars on a terminal or in a notebook, lines elsewhere."""
    before = _drawing.set(True)
    try:
        with _bars(console) if _watched(console) else nullcontext() as bars:
            yield _Log(console) if bars is None else _Bars(console, bars)
    finally:
        _drawing.reset(before)


def _watched(console: Console) -> bool:
    """Whether somebody sees a bar there."""
    # rich calls a notebook a terminal as well, as its kernel asks for colours. It draws there with
    # ipywidgets, and warns at each step where they are missing.
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal


def _bars(console: Console) -> Any:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=_BAR),
        TextColumn("{task.fields[text]}", markup=False),
    )
    sys.stdout.flush()
    # Transient: bars that are done say nothing that the report does not.
    return Progress(*columns, console=console, transient=True)
