"""What computed the custom operators in PyTorch: counted where they run, not where chosen."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()
_OPEN: list[Counter[tuple[str, str]]] = []


@contextmanager
def record_backends() -> Iterator[Counter[tuple[str, str]]]:
    """Count what computes the custom operators while the block is open.

    Every thread of the process is counted, since autograd runs backward passes in threads of its
    own. What PyTorch does not run is not: a replayed CUDA graph, a graph that is only traced.

    Yields:
        Runs by (operator, backend), such as {("GatedSelectiveScan", "kernel"): 24}; the backend is
        "kernel" (this package's library) or "reference" (PyTorch). A backward pass is an operator
        of its own, "GatedSelectiveScan backward".
    """
    ran: Counter[tuple[str, str]] = Counter()
    with _LOCK:
        _OPEN.append(ran)
    try:
        yield ran
    finally:
        with _LOCK:
            _OPEN[:] = [other for other in _OPEN if other is not ran]


@contextmanager
def unrecorded() -> Iterator[None]:
    """Count nothing while the block is open: what runs in it is tried, and not the model's."""
    with _LOCK:
        kept = _OPEN[:]
        _OPEN.clear()
    try:
        yield
    finally:
        with _LOCK:
            _OPEN[:0] = kept


def note_run(operator: str, backend: str) -> None:
    """Count one run of an operator, once it is done."""
    with _LOCK:
        for ran in _OPEN:
            ran[operator, backend] += 1
