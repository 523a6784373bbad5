"""Kills a piece of work at each change that it makes to files, one after the other."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CHANGES = frozenset(
    {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
    | {"os.chmod", "ctypes.dlsym"}  # the latter: renameat2
)
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def forked(work: Callable[[], None], crash: int = 0) -> int:
    """Run `work` in a child, killed before its change number `crash`; returns its exit code.

    9 means that it was killed, 0 that it ended before. To be called in a process of one thread.
    """
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

    def counted() -> None:
        sys.addaudithook(count)
        work()

    return code_of(child(counted))


def child(work: Callable[[], None]) -> int:
    """The number of a forked process that does some work."""
    number = os.fork()
    if number:
        return number
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, repr(error).encode(errors="backslashreplace"))
    finally:
        os._exit(1)


def code_of(number: int) -> int:
    """Its exit code, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def torn(work: Callable[[Path], None], runs: Path, every: int = 1) -> int:
    """Do some work in folders of `runs`, each torn at another call that changes a file, and go on.

    Torn as by kill -9, a write half done. The folder "whole" has what is never torn.

    Args:
        work: is given the folder, which is there.
        runs: where the folders are made, by the numbers of the calls.
        every: from one call to the next; how many calls there are comes back.
    """

    def run(name: str, crash: int) -> int:
        return code_of(child(lambda: _torn(work, runs / name, crash)))

    assert run("whole", 0) == 0
    crash = 1
    while (code := run(str(crash), crash)) == 9:
        assert run(str(crash), 0) == 0, crash
        crash += every
    assert code == 0, (crash, code)
    return crash


def _torn(work: Callable[[Path], None], folder: Path, crash: int) -> None:
    left = crash

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if real.__name__ == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os._exit(9)
            return real(*args, **named)

        return call

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("write", "ftruncate", "fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    work(folder)


def running_in(folder: Path) -> list[int]:
    """Processes whose working directory is this one; torchrun's are in sessions of their own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "cwd") == str(folder):
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended, or is another user's
    return found


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
