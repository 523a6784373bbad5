"""The log of a training run: a CSV file with a row a step, and TensorBoard where it is installed.

The CSV file has no times, so a run that was stopped leaves the same bytes as one that was not.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self

from vssm.errors import ArtifactError
from vssm.extras import is_installed
from vssm.files.atomic import discard_unfinished

COLUMNS = ("step", "epoch", "lr", "loss")
_HEAD = (",".join(COLUMNS) + "\n").encode()


@dataclass(frozen=True)
class LogRow:
    """One step: its number and epoch, both from 1 on, and the mean loss over its images."""

    step: int
    epoch: int
    lr: float
    loss: float

    def line(self) -> bytes:
        """As the file has it; `repr` of a float gives back the same float."""
        return f"{self.step},{self.epoch},{self.lr!r},{self.loss!r}\n".encode()


class RunLog:
    """The log of one run; a context manager that holds its directory against other processes.

    Args:
        path: the CSV file; made where it is not there.

    Raises:
        ArtifactError: it is in use, is no such log, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._board: Any = None
        try:
            # O_APPEND: reading moves the offset, and a row must go to the end all the same.
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise ArtifactError(
                f"log={path} cannot be written ({error.strerror}); name another directory"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_head()
        except BaseException as error:
            os.close(self._file)
            # Raised by the lock alone: somebody else has it.
            if isinstance(error, BlockingIOError):
                raise ArtifactError(
                    f"log={path} is in use by another run; wait for it, or name another directory"
                ) from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)
        if self._board is not None:
            self._board.close()

    def begin(self, done: int) -> None:
        """Forget what lies behind `done` steps: it is done again, to the same numbers.

        Raises:
            ArtifactError: rows are missing before it.
        """
        rows = self._lines()[1:]
        if len(rows) < done:
            raise ArtifactError(
                f"log={self.path} has {len(rows)} rows, but {done} steps are done; put back the "
                "file that belongs there, or begin anew in another directory"
            )
        # Cut, not written anew: a kill between the two would lose rows that a state relies on.
        keep = len(_HEAD) + sum(map(len, rows[:done])) if self._lines() else 0
        os.ftruncate(self._file, keep)
        if keep == 0:
            self._write(_HEAD)
        if is_installed("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            folder = str(self.path.parent / "tensorboard")
            # `purge_step` hides what a stopped run wrote of the steps that are done again.
            self._board = SummaryWriter(folder, purge_step=done + 1)

    def add(self, row: LogRow) -> None:
        """The next step.

        Raises:
            ArtifactError: the disk is full.
        """
        self._write(row.line())
        if self._board is not None:
            for name in ("lr", "loss", "epoch"):
                self._board.add_scalar(f"train/{name}", getattr(row, name), row.step)

    def add_validation(self, step: int, top1: float, loss: float) -> None:
        """What the weights of a step do on the validation images, for TensorBoard alone."""
        if self._board is not None:
            self._board.add_scalar("val/top1", top1, step)
            self._board.add_scalar("val/loss", loss, step)

    def sync(self) -> None:
        """Bring all rows to the disk, before a state is written that relies on them."""
        os.fsync(self._file)
        if self._board is not None:
            self._board.flush()

    def losses(self, last: int) -> list[float]:
        """Of the last steps, so many."""
        return [float(line.split(b",")[-1]) for line in self._lines()[1:][-last:]]

    def _check_head(self) -> None:
        text = self._read()
        # A kill may have left a part of the first line.
        if text and not text.startswith(_HEAD) and not _HEAD.startswith(text):
            raise ArtifactError(
                f"log={self.path} is no log of a training run; name another directory"
            )

    def _lines(self) -> list[bytes]:
        """Whole lines; the part of one that a kill may leave is none."""
        return [line for line in self._read().splitlines(keepends=True) if line.endswith(b"\n")]

    def _read(self) -> bytes:
        # A second descriptor: the file object closes its own, and ours holds the lock.
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            return file.read()

    def _write(self, data: bytes) -> None:
        try:
            written = os.write(self._file, data)
        except OSError as error:
            raise ArtifactError(
                f"log={self.path} cannot be written ({error.strerror}); make room, then --resume"
            ) from error
        # A full disk may take a part of a row and report no error until the next one.
        if written != len(data):
            raise ArtifactError(f"log={self.path}: the disk is full; make room, then --resume")


def remove_leftovers(directory: Path) -> None:
    """Delete the unfinished files that a killed run left beside those of `files.atomic_path`."""
    names = ("state", "finetuned", "finetuned_ema", "finetuned_best")
    for name in (*(f"{n}.safetensors" for n in names), "finetune.json", "validation.csv"):
        discard_unfinished(directory / name)
