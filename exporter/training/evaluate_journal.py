"""What an evaluation has done so far, in a file that a killed process leaves usable.

One JSON document a line: first what is evaluated and how, then each batch with its rows. A line is
appended whole by one write; the part of one that a kill may leave is cut off at the next start.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from exporter.errors import ArtifactError


@dataclass(frozen=True)
class Row:
    """The result for one image.

    Attributes:
        top: the best classes, best first; empty where the image could not be read.
        best: softmax probability of the first of them.
        target: that of the image's own class.
        error: why the image could not be read.
    """

    top: tuple[int, ...] = ()
    best: float = 0.0
    target: float = 0.0
    error: str | None = None


class Journal:
    """The journal of one evaluation; a context manager that holds it against other processes.

    Args:
        path: the file; made where it is not there.
        header: what is evaluated and how.
        restart: forget what is there.

    Raises:
        ArtifactError: it belongs to another evaluation, is damaged, is in use, or cannot be
            written.
    """

    def __init__(self, path: Path, header: Mapping[str, str], *, restart: bool = False) -> None:
        self.path = path
        self.done: list[list[Row]] = []
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ArtifactError(
                f"path={path} cannot be written ({error.strerror}); give another with --results"
            ) from error
        try:
            self._lock()
            if restart:
                os.ftruncate(self._file, 0)
            self._resume(dict(header))
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._file)

    def append(self, rows: Sequence[Row]) -> None:
        """The next batch."""
        self._write([astuple(row) for row in rows])
        self.done.append(list(rows))

    def remove(self) -> None:
        """The evaluation is over and its results are written."""
        self.path.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that ended just now has removed the file that was opened: its lock holds nobody.
            if not os.path.samestat(os.fstat(self._file), os.stat(self.path)):
                raise BlockingIOError
        except OSError as error:
            raise ArtifactError(
                f"path={self.path} is in use by another evaluation; wait for it, or give other "
                "--results"
            ) from error

    def _resume(self, header: dict[str, str]) -> None:
        """Read what is there, cut a torn line off, or begin."""
        text = self._read()
        whole = text[: text.rfind(b"\n") + 1]
        os.ftruncate(self._file, len(whole))
        if not whole:
            self._write(header)
            return
        try:
            found, *batches = [json.loads(line) for line in whole.splitlines()]
            self.done = [[_row(entry) for entry in batch] for batch in batches]
            if not isinstance(found, dict):
                raise TypeError("its first line is no object")
        except (ValueError, TypeError) as error:
            raise ArtifactError(
                f"path={self.path} is damaged ({error}); begin anew with --restart"
            ) from error
        for key in {**header, **found}:
            if found.get(key) != header.get(key):
                raise ArtifactError(
                    f"path={self.path} is of another evaluation: {key}={found.get(key)}, now "
                    f"{header.get(key)}; run it to its end as it was begun, give other --results, "
                    "or begin anew with --restart"
                )

    def _read(self) -> bytes:
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            return file.read()

    def _write(self, document: Any) -> None:
        line = f"{json.dumps(document)}\n".encode()
        try:
            written = os.write(self._file, line)
        except OSError as error:
            raise ArtifactError(
                f"path={self.path} cannot be written ({error.strerror}); make room and run again"
            ) from error
        if written != len(line):
            raise ArtifactError(f"path={self.path}: the disk is full; make room and run again")


def _row(entry: Any) -> Row:
    top, best, target, error = entry
    return Row(tuple(top), best, target, error)
