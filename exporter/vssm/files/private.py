"""Bytes that were checked, as a path that no other process can put other bytes behind.

Runtimes and the dynamic loader open files by name. Between the check of a file and that, another
process may replace it. What was read and hashed is therefore put into memory that has a name of
its own and is sealed: from then on nobody can change it, not even this process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from vssm.errors import RuntimeUnavailableError
from vssm.files.regular import LIBRARY, read_regular

_EXECUTABLE: Final = 0x10  # MFD_EXEC, which Linux knows since 6.3; before that all are
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


@contextlib.contextmanager
def private_path(data: bytes, name: str) -> Iterator[str]:
    """A path to exactly these bytes, for as long as the context lasts; `name` is for debuggers."""
    descriptor = _sealed(data, name, 0)
    try:
        yield _path_of(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class LibraryCopy:
    """A native library as it was when it was read.

    Attributes:
        source: the file that it was read from.
        sha256: of the bytes that were read, and that run.
        path: what the dynamic loader is given.
    """

    source: Path
    sha256: str
    path: str


_copies: dict[str, str] = {}  # SHA-256 of a library -> path of its sealed copy


def library_copy(source: Path) -> LibraryCopy:
    """The library's bytes in memory, kept until the process ends; the same bytes are kept once.

    The loader knows a library by its path: were the descriptor closed, its number could come to
    mean another library, and the loader would answer with the first.

    Raises:
        OSError: the file cannot be read.
        RuntimeUnavailableError: this system runs no code from memory.
    """
    data = read_regular(source, limit=LIBRARY)
    digest = sha256(data).hexdigest()
    if digest not in _copies:
        try:
            _copies[digest] = _path_of(_sealed(data, source.name, _EXECUTABLE))
        except PermissionError as error:
            raise RuntimeUnavailableError(
                f"library={source} cannot be run from memory ({error.strerror}), where nobody can "
                "change what was checked; let the system's vm.memfd_noexec be 0 or 1"
            ) from error
    return LibraryCopy(source, digest, _copies[digest])


def _path_of(descriptor: int) -> str:
    # Good in this process alone: to a child, "self" is the child, and the descriptor is closed.
    return f"/proc/self/fd/{descriptor}"


def _sealed(data: bytes, name: str, flags: int) -> int:
    common = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        # The name is cut, since Linux takes 249 bytes at most.
        descriptor = os.memfd_create(name[:200], common | flags)
    # A kernel before 6.3 refuses the flag as unknown.
    except OSError:
        if not flags:
            raise
        descriptor = os.memfd_create(name[:200], common)
    try:
        rest = memoryview(data)
        # In a loop, as one write takes no more than 2 GiB.
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
