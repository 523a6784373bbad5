"""Kills a piece of work before each change that it makes to files, one after the other."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_CHANGES = frozenset(
    {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
    | {"os.chmod", "ctypes.dlsym"}  # the latter: renameat2
)
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def forked(work: Callable[[], None], crash: int = 0) -> int:
    """Run `work` in a child, killed before its change number `crash`; returns its exit code.

    9 means that it was killed, 0 that it ended before. To be called in a process of one thread.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = crash

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        changes = event in _CHANGES
        if event == "open":
            changes = isinstance(arguments[2], int) and bool(arguments[2] & _FOR_WRITING)
        if changes:
            left -= 1
            if left == 0:
                os._exit(9)

    try:
        sys.addaudithook(count)
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, repr(error).encode(errors="backslashreplace"))
    finally:
        os._exit(1)


def crashes(
    work: Callable[[], None], prepare: Callable[[], None], stride: int = 1
) -> Iterator[int]:
    """After each crash, its number; `prepare` makes the state that each begins with."""
    crash = 1
    while True:
        prepare()
        code = forked(work, crash)
        if code == 0:
            return
        assert code == 9, (crash, code)
        yield crash
        crash += stride


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every path below, hidden ones too, with its content."""
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None
        for p in sorted(directory.rglob("*"))
    }
