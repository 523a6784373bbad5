"""Types that several rooms share. Standard library and numpy only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
Progress = Callable[[str], None]
Steps = Callable[[str, int, int], None]  # a phase, its steps that are done, and of how many
