"""Types that several rooms share. Standard library and numpy only."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

Array = npt.NDArray[Any]


class Steps(Protocol):
    """Is told how far a work is."""

    def __call__(self, phase: str, done: int, total: int, note: str = "", /) -> None:
        """Of a phase `done` steps of `total` are done; 0 or 1 where it counts nothing."""
