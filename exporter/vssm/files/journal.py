"""What a long run has done so far, in a file that a killed process leaves usable.

One JSON document a line: first what is run and how, then an entry for each batch. A line is
appended whole by one write; the part of one that a kill may leave is cut off at the next start.
"""

from __future__ import annotations

import fcntl
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from vssm.errors import ArtifactError

Entry = TypeVar("Entry")
_Held = TypeVar("_Held", bound="HeldFile")


class HeldFile:
    """A file that is appended to; a context manager that holds it against other processes.

    Args:
        path: the file; made where it is not there.
        name: what errors call the path.
        what: what runs, such as "evaluation".
        elsewhere: the remedy where this file cannot be had.
        again: what to do once there is room on the disk.

    Raises:
        ArtifactError: it is in use, or cannot be written.
    """

    def __init__(self, path: Path, *, name: str, what: str, elsewhere: str, again: str) -> None:
        self.path = path
        self._file_name, self._again = f"{name}={path}", again
        try:
            # O_APPEND: reading moves the offset, and a line must go to the end all the same.
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ArtifactError(
                f"{self._file_name} cannot be written ({error.strerror}); {elsewhere}"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that ended just now has removed the file that was opened: its lock holds nobody.
            if not os.path.samestat(os.fstat(self._file), os.stat(path)):
                raise BlockingIOError
        except OSError as error:
            self.close()
            raise ArtifactError(
                f"{self._file_name} is in use by another {what}; wait for it, or {elsewhere}"
            ) from error

    def __enter__(self: _Held) -> _Held:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it."""
        os.close(self._file)

    def read(self) -> bytes:
        """All of it."""
        # A second descriptor: the file object closes its own, and ours holds the lock.
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            return file.read()

    def write(self, line: bytes) -> None:
        """Append a line.

        Raises:
            ArtifactError: the disk is full.
        """
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise ArtifactError(
                f"{self._file_name} cannot be written ({error.strerror}); make room{self._again}"
            ) from error
        # A full disk may take a part of a line and report no error until the next one.
        if written != len(line):
            raise ArtifactError(f"{self._file_name}: the disk is full; make room{self._again}")

    def cut(self, size: int) -> None:
        """Forget what lies behind the first `size` bytes."""
        os.ftruncate(self._file, size)

    def sync(self) -> None:
        """Bring what was written to the disk."""
        os.fsync(self._file)


class JsonJournal(HeldFile, ABC, Generic[Entry]):
    """The journal of one run; a context manager that holds it against other processes.

    A subclass says what an entry is, and for messages what runs and which option moves it. A file
    in which nothing was done yet is nobody's: a run with another header takes it over.

    Args:
        path: the file; made where it is not there.
        header: what is run and how.
        restart: forget what is there.

    Raises:
        ArtifactError: it belongs to another run, is damaged, is in use, or cannot be written.
    """

    what: ClassVar[str]  # such as evaluation
    option: ClassVar[str]  # such as --results

    def __init__(self, path: Path, header: Mapping[str, str], *, restart: bool = False) -> None:
        elsewhere = f"give another {self.option}"
        super().__init__(
            path, name="path", what=self.what, elsewhere=elsewhere, again=" and run again"
        )
        self.done: list[Entry] = []
        try:
            if restart:
                self.cut(0)
            self._resume(dict(header))
        except BaseException:
            self.close()
            raise

    @staticmethod
    @abstractmethod
    def to_json(entry: Entry) -> Any:
        """An entry as JSON holds it."""

    @staticmethod
    @abstractmethod
    def from_json(document: Any) -> Entry:
        """The entry again.

        Raises:
            ValueError, TypeError, LookupError: it is none.
        """

    def begun(self) -> bool:
        """Whether there is work that another run would lose."""
        return bool(self.done)

    def append(self, entry: Entry) -> None:
        """The next batch."""
        self._write(self.to_json(entry))
        self.done.append(entry)

    def remove(self) -> None:
        """The run is over and its results are written."""
        self.path.unlink()

    def _resume(self, header: dict[str, str]) -> None:
        """Read what is there, cut a torn line off, or begin."""
        text = self.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.cut(len(whole))
        if not whole:
            self._write(header)
            return
        try:
            found, *entries = [json.loads(line) for line in whole.splitlines()]
            self.done = [self.from_json(entry) for entry in entries]
            if not isinstance(found, dict):
                raise TypeError("its first line is not an object")
        except (ValueError, TypeError, LookupError) as error:
            raise ArtifactError(
                f"path={self.path} is damaged ({error}); begin anew with --restart"
            ) from error
        if found != header and not self.begun():
            self.cut(0)
            self._write(header)
            return
        # Over the keys of both: one that an older version did not write is a difference too.
        for key in {**header, **found}:
            if found.get(key) != header.get(key):
                raise ArtifactError(
                    f"path={self.path} is of another {self.what}: {key}={found.get(key)}, now "
                    f"{header.get(key)}; run it to its end as it was begun, give another "
                    f"{self.option}, or begin anew with --restart"
                )

    def _write(self, document: Any) -> None:
        self.write(f"{json.dumps(document)}\n".encode())
