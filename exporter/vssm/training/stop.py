"""Ctrl-C between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from typing_extensions import Self


class StopBetweenSteps:
    """Holds Ctrl-C and SIGTERM back until a step is over; a second one is not held back.

    A context manager, which lets go at its end of what it still holds. A signal that is ignored (as
    Ctrl-C is in a background job of a shell script) or that nobody handles is left alone, and so
    are all of them outside the main thread, where Python cannot handle any.
    """

    def __init__(self) -> None:
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._held: int | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):  # the constants for "ignored" and "default" are not
                    self._before[number] = handler
                    signal.signal(number, self._hold)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None:
            self.let_go()

    @property
    def asked(self) -> bool:
        """Whether a signal waits."""
        return self._held is not None

    def let_go(self) -> None:
        """Do what the signal that waits would have done.

        Raises:
            KeyboardInterrupt, SystemExit: as its handler has it.
        """
        held, self._held = self._held, None
        if held is not None:
            self._before[held](held, None)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self._held is not None:
            self._before[number](number, frame)
        self._held = number
