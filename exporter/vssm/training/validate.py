"""How good the weights are after each epoch, on images that nothing is trained on."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional

from vssm.artifact.manifest import Preprocessing
from vssm.checkpoints.load import save_safetensors
from vssm.errors import ArtifactError, VssmError
from vssm.evaluation.data import ImageFolder, load_in_order, open_images
from vssm.files.atomic import atomic_write_bytes

if TYPE_CHECKING:
    from vssm.training.log import RunLog
    from vssm.training.loop import Group, TrainingRun
    from vssm.training.state import State
    from vssm.training.stop import StopBetweenSteps
    from vssm.types import Steps

VALIDATION_FILE: Final = "validation.csv"
BEST_FILE: Final = "finetuned_best.safetensors"
_PHASE: Final = "validating, images"
_BATCH: Final = 32
_HEAD: Final = "epoch,step,top1,loss\n"


@dataclass(frozen=True)
class Validated:
    """How good the weights were.

    Attributes:
        epoch: epochs done; 0 before the first step.
        step: steps done.
        top1: share of the images whose class came first, in [0, 1].
        loss: mean cross-entropy over the images as they are, without smoothing.
    """

    epoch: int
    step: int
    top1: float
    loss: float

    def line(self) -> str:
        """As the file has it; `repr` of a float gives back the same float."""
        return f"{self.epoch},{self.step},{self.top1!r},{self.loss!r}\n"


def best_of(rows: Sequence[Validated]) -> Validated | None:
    """The first of the best; None of none."""
    return max(rows, key=lambda row: row.top1, default=None)


class Validator:
    """Measures the weights of a run before it begins and after each epoch, and keeps the best.

    Every process measures a share of the images; the one that leads writes. A row is written once
    its epoch's state and the best weights are on the disk, so that a run which was killed in
    between measures that epoch again and nothing else.

    Args:
        run: the run, which has images to validate on.
        state: what is trained.
        group: the processes that do it.

    Attributes:
        rows: what was measured, an epoch each.
        seconds: what it took in this process.

    Raises:
        ArtifactError: rows or weights of epochs that are done are missing, or no rows.
    """

    def __init__(self, run: TrainingRun, state: State, group: Group) -> None:
        assert run.val is not None
        self._run, self._folder, self._state, self._group = run, run.val, state, group
        self._path, self._best = run.directory / VALIDATION_FILE, run.directory / BEST_FILE
        self.rows = self._read()
        self.seconds = 0.0

    def measure(self, log: RunLog | None, stop: StopBetweenSteps | None, progress: Steps) -> None:
        """Where an epoch has just ended or none has begun: measure, and keep the weights if best.

        Raises:
            ValueError: an image cannot be read.
            VssmError: the model overflows, or a worker was killed.
            KeyboardInterrupt, SystemExit: as a signal that waits has it.
        """
        epoch, rest = divmod(self._state.step, self._run.steps_per_epoch)
        if rest or len(self.rows) > epoch:
            return
        start, model = time.perf_counter(), self._state.model
        model.eval()
        row = Validated(epoch, self._state.step, *self._measured(stop, progress))
        model.train()
        best = best_of(self.rows)
        self.rows.append(row)
        if log is not None:
            if best is None or row.top1 > best.top1:
                labels = model.labels or self._run.lesson.labels
                save_safetensors(model.state_dict(), self._best, labels=labels)
            text = "".join([_HEAD, *(row.line() for row in self.rows)])
            atomic_write_bytes(self._path, text.encode())
            log.add_validation(row.step, row.top1, row.loss)
        self.seconds += time.perf_counter() - start

    def _measured(self, stop: StopBetweenSteps | None, progress: Steps) -> tuple[float, float]:
        """Top-1 and mean loss over all images."""
        pictures, group = self._folder.pictures, self._group
        batches = [pictures[i : i + _BATCH] for i in range(0, len(pictures), _BATCH)]
        mine = batches[group.rank :: group.world]
        files = [self._folder.places(some) for some in mine]
        found = torch.zeros(2, dtype=torch.float64, device=group.device)  # right images, loss
        progress(_PHASE, 0, len(pictures))
        loads = load_in_order(files, self._spec(), workers=self._run.workers)
        for number, (some, loaded) in enumerate(zip(mine, loads, strict=True), start=1):
            if error := next(filter(None, loaded.errors), None):
                raise ValueError(f"val: {error}")
            with torch.no_grad():
                images = torch.from_numpy(loaded.images).to(group.device)
                logits = self._state.model(images).double()
            targets = torch.tensor([picture.target for picture in some], device=group.device)
            # argmax takes NaN for the largest, and it would count as a class.
            if not torch.isfinite(logits).all():
                raise VssmError(
                    f"val: logits after step {self._state.step} are NaN or infinite; begin again "
                    "with a smaller lr (--lr), from weights that are whole"
                )
            found[0] += (logits.argmax(1) == targets).sum()
            found[1] += functional.cross_entropy(logits, targets, reduction="sum")
            progress(_PHASE, min(number * group.world * _BATCH, len(pictures)), len(pictures))
            # The state of this epoch is saved, so there is no step to wait for.
            if stop is not None:
                stop.let_go()
        right, loss = (group.sum(found) / len(pictures)).tolist()
        return right, loss

    def _spec(self) -> Preprocessing:
        model = self._state.model
        return model.preprocessing() or Preprocessing.for_image_size(model.image_size)

    def _read(self) -> list[Validated]:
        """The rows of what the state has done; what lies behind it is measured again."""
        step, per_epoch = self._state.step, self._run.steps_per_epoch
        if step == 0:
            return []
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        try:
            rows = [
                Validated(int(epoch), int(at), float(top1), float(loss))
                for epoch, at, top1, loss in (line.split(",") for line in lines[1:])
            ][: step // per_epoch + 1]
        except ValueError:
            rows = []
        # The last epoch's may be missing: a state is saved before it is measured.
        whole = [row.epoch for row in rows] == list(range(len(rows)))
        if not whole or len(rows) < -(-step // per_epoch) or not os.path.isfile(self._best):
            raise ArtifactError(
                f"{self._path} has no whole rows of the epochs that are done, or {BEST_FILE} is "
                "missing; put back the files that belong there, or begin anew in another directory"
            )
        return rows


def open_validation(root: Path, data: ImageFolder) -> ImageFolder:
    """The images to validate on, their folders matched by name to those that are trained on.

    Raises:
        ValueError: there are none, or a folder is called otherwise.
    """
    val = open_images(root, len(data.classes), labels=data.classes, name="val")
    for i, (ours, theirs) in enumerate(zip(val.classes, data.classes, strict=True)):
        if ours != theirs:  # none of the names is known, so that they were taken by their order
            raise ValueError(
                f"val={root}: the folder of class {i} is {ours!r}, but {theirs!r} in "
                f"data={data.root}; give the folders of both the same names"
            )
    return val
