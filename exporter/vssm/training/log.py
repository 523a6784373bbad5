"""The log of a training run: a CSV file with a row a step, and TensorBoard where it is installed.

The CSV file has no times, so a run that was stopped leaves the same bytes as one that was not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vssm.errors import ArtifactError
from vssm.extras import is_installed
from vssm.files.atomic import discard_unfinished
from vssm.files.journal import HeldFile

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


class RunLog(HeldFile):
    """The log of one run; a context manager that holds its directory against other processes.

    Args:
        path: the CSV file; made where it is not there.

    Raises:
        ArtifactError: it is in use, is no such log, or cannot be written.
    """

    _board: Any = None

    def __init__(self, path: Path) -> None:
        elsewhere = "name another directory"
        super().__init__(path, name="log", what="run", elsewhere=elsewhere, again=", then --resume")
        text = self.read()
        # A kill may have left a part of the first line.
        if text and not text.startswith(_HEAD) and not _HEAD.startswith(text):
            self.close()
            raise ArtifactError(f"log={path} is not a log of a training run; {elsewhere}")

    def close(self) -> None:
        """Let go of the file, and of TensorBoard's."""
        super().close()
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
        self.cut(keep)
        if keep == 0:
            self.write(_HEAD)
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
        self.write(row.line())
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
        super().sync()
        if self._board is not None:
            self._board.flush()

    def losses(self, last: int) -> list[float]:
        """Of the last steps, so many."""
        return [float(line.split(b",")[-1]) for line in self._lines()[1:][-last:]]

    def _lines(self) -> list[bytes]:
        """Whole lines; the part of one that a kill may leave is none."""
        return [line for line in self.read().splitlines(keepends=True) if line.endswith(b"\n")]


def remove_leftovers(directory: Path) -> None:
    """Delete the unfinished files that a killed run left beside those of `files.atomic_path`."""
    names = ("state", "finetuned", "finetuned_ema", "finetuned_best")
    for name in (*(f"{n}.safetensors" for n in names), "finetune.json", "validation.csv"):
        discard_unfinished(directory / name)
