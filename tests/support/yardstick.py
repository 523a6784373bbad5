"""Limits of time that mean the same on a slower machine.

A limit is in seconds of the machine that it was written on. Where one is broken, a fixed piece of
Python is timed in the same process, and the limit grows by as much as that took longer than there.
"""

from __future__ import annotations

import time

# What `_fixed_work` took in a process that had imported torch, on the machine of the limits.
SECONDS_THERE = 0.2


def too_slow(seconds: float, limit: float) -> bool:
    """Whether `seconds` of this process's time, just spent, are more than `limit` allows here."""
    return seconds > limit and seconds > limit * _slowness()


def _slowness() -> float:
    started = time.process_time()
    _fixed_work()
    return (time.process_time() - started) / SECONDS_THERE


def _fixed_work() -> None:
    """What readers do: look up, call, append, and keep objects that the collector walks through.

    A full collection goes through everything that the process holds, so this takes longer in a
    process that has imported more, as a reader does.
    """
    kept: list[object] = []
    nest: object = None
    handlers = {"push": kept.append, "hash": hash}
    for i in range(200_000):
        nest = (nest,)
        handlers["push" if i % 4 else "hash"](i)
