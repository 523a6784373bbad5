"""Training a pruned model further: the loop over steps, and what it reports."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from typing_extensions import Self

from vssm.errors import RuntimeUnavailableError, VssmError
from vssm.evaluation.data import ImageFolder, in_order
from vssm.models.base import VisionModel
from vssm.training.lessons import Lesson
from vssm.training.log import LogRow, RunLog
from vssm.training.recipe import Draw
from vssm.training.state import State
from vssm.training.stop import StopBetweenSteps
from vssm.training.validate import Validated, Validator
from vssm.types import Steps


class Group:
    """The processes of a run; a context manager. Alone, every method is free.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL, a GPU for each process of a machine).

    Raises:
        ValueError: the device is neither.
        RuntimeUnavailableError: there is no such GPU.
    """

    def __init__(self, device: str) -> None:
        if device not in {"cpu", "cuda"}:
            raise ValueError(f"device={device!r} is neither cpu nor cuda; give one of them")
        # Without torchrun there is one process, and nothing to set up.
        self.world = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun sets these
        self.rank = int(os.environ.get("RANK", "0"))
        self.beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine
        self.restarted = False  # by torchrun, after one of them or a machine was lost
        self.device = torch.device(device)
        if device == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeUnavailableError(
                    "device='cuda': torch finds no GPU; train with device='cpu', or install a "
                    "build of torch for the driver of this machine"
                )
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)

    def __enter__(self) -> Self:
        if self.world > 1:
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            # An agent that took a lost one's place has started its processes once only.
            counts = self._gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
            self.restarted = max(counts) > 0
        return self

    def __exit__(self, *error: object) -> None:
        if self.world > 1:
            distributed.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Replace each by its sum over the processes, in place."""
        if self.world == 1 or not gradients:
            return
        # One reduction: one for each of hundreds of tensors would wait for the others as often.
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def average(self, buffers: Sequence[Tensor]) -> None:
        """Replace each by its mean over the processes, in place."""
        self.sum_gradients(buffers)
        for buffer in buffers if self.world > 1 else ():
            buffer.div_(self.world)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a number over the processes."""
        if self.world > 1:
            distributed.all_reduce(value)
        return value

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            distributed.barrier()

    def agree(self, name: str, value: Any) -> None:
        """Refuse to go on where processes differ.

        Raises:
            VssmError: they do.
        """
        if self.world == 1:
            return
        found = self._gather(value)
        if any(other != found[0] for other in found):
            raise VssmError(
                f"{name}={found} differs between the processes; they must see the same files: "
                "start them with the same arguments on a shared file system"
            )

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, value)
        return found


STATE_FILE = "state.safetensors"
LOG_FILE = "log.csv"
TRAINING = "training, steps"


@dataclass(frozen=True)
class TrainingRun:
    """What is trained on what, and how the work is laid out; only `lesson` changes numbers.

    Attributes:
        lesson: the numbers, the images and what is taught about them.
        directory: for the state and the log.
        header: what must be the same when the run goes on.
        workers: processes that load images, for each process that trains.
        micro_batch: images of one pass, whose gradients are added up; None for the whole share of
            a process. It changes sums in their last bits.
        save_every: steps between states, beside the one at the end of each epoch.
        val: images on which the weights are measured after each epoch; None for none.
    """

    lesson: Lesson
    directory: Path
    header: Mapping[str, Any]
    workers: int
    micro_batch: int | None
    save_every: int
    val: ImageFolder | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.lesson.recipe.steps(self.lesson.images)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.lesson.recipe.total(self.lesson.images)


@dataclass(frozen=True)
class Trained:
    """What a run did.

    Attributes:
        images: of the data set.
        steps: in all.
        resumed: of them, those that a run before had done and saved.
        loss: mean over the last epoch.
        seconds: of the other steps, loading included, validation not.
        images_per_s: over these seconds; None where nothing was left to do.
        validated: how good the weights were before the first step and after each epoch; nothing
            where there was nothing to validate on.
    """

    images: int
    steps: int
    resumed: int
    loss: float
    seconds: float
    images_per_s: float | None
    validated: tuple[Validated, ...]


def train(
    model: VisionModel,
    run: TrainingRun,
    group: Group,
    *,
    log: RunLog | None,
    teacher: nn.Module | None = None,
    progress: Steps = lambda *_: None,
) -> tuple[State, Trained]:
    """Train `model` in place, from the state in the directory where there is one.

    Args:
        model: with the weights to begin with, on the group's device.
        run: what to do.
        group: the processes that do it.
        log: the log, in the process that leads.
        teacher: the model to distil from, where the recipe does.
        progress: called after every step.

    Raises:
        ArtifactError: the state there is of another run, or a file cannot be written.
        ValueError: an image cannot be read.
        VssmError: the loss is not finite, or a worker was killed.
    """
    lesson, recipe = run.lesson, run.lesson.recipe
    lesson.prepare(model)
    model.train()
    state, path = State.begin(model, recipe), run.directory / STATE_FILE
    if path.exists():
        state.load(path, run.header)
    # A process that sees another state, or none, would make other steps and be waited for.
    group.agree("step", state.step)
    resumed, start = state.step, time.perf_counter()
    if log is not None:
        log.begin(resumed)
    validator = None if run.val is None else Validator(run, state, group)
    # Other processes would wait for the one that stops, so that several stop at once.
    with StopBetweenSteps() if group.world == 1 else nullcontext() as stop:
        if validator is not None:
            validator.measure(log, stop, progress)
        progress(TRAINING, resumed, run.steps)
        for batch in _batches(run, group, first=resumed):
            epoch = state.step // run.steps_per_epoch
            lr = recipe.rate_at(state.step, lesson.images)
            loss = _gradients(state, batch, run, group, teacher)
            state.advance(lr, recipe.ema)
            asked = stop is not None and stop.asked
            if log is not None:
                log.add(LogRow(state.step, epoch + 1, lr, loss))
                ends = state.step % run.steps_per_epoch == 0 or state.step == run.steps
                if state.step % run.save_every == 0 or ends or asked:
                    # The rows first: `begin` refuses a state of more steps than the log has rows.
                    log.sync()
                    state.save(path, run.header)
            if validator is not None:
                validator.measure(log, stop, progress)
            progress(TRAINING, state.step, run.steps, _note(epoch + 1, loss, run, validator))
            if stop is not None and asked:
                stop.let_go()
    # The time is that of the slowest process.
    group.wait()
    seconds = time.perf_counter() - start - (0.0 if validator is None else validator.seconds)
    model.eval()
    losses = [math.nan] if log is None else log.losses(run.steps_per_epoch)
    done = state.step - resumed
    return state, Trained(
        images=lesson.images,
        steps=run.steps,
        resumed=resumed,
        loss=sum(losses) / len(losses),
        seconds=seconds,
        images_per_s=done * recipe.batch / seconds if done else None,
        validated=() if validator is None else tuple(validator.rows),
    )


def _batches(run: TrainingRun, group: Group, *, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of this process's share of every step from `first` on."""
    # Made as they are needed: all epochs of a large data set would not fit into memory.
    shares = itertools.islice(_shares(run, group, first), run.steps - first)
    for pixels, targets in in_order(run.lesson.loader(), shares, workers=run.workers):
        yield torch.from_numpy(pixels).to(group.device), torch.from_numpy(targets).to(group.device)


def _shares(run: TrainingRun, group: Group, first: int) -> Iterator[list[Any]]:
    """The examples that this process has of every step; there is no end to them."""
    lesson, per_epoch, batch = run.lesson, run.steps_per_epoch, run.lesson.recipe.batch
    for epoch in itertools.count(first // per_epoch):
        order = lesson.recipe.order(epoch, lesson.images)
        for step in range(max(0, first - epoch * per_epoch), per_epoch):
            # The place in the whole batch: what an image draws does not depend on the processes.
            chosen = enumerate(order[step].tolist(), start=step * batch)
            # In strides, so that the repeats of an image go to different processes, as DeiT's do.
            mine = list(chosen)[group.rank :: group.world]
            yield [lesson.example(index, epoch, place) for place, index in mine]


def _gradients(
    state: State,
    batch: tuple[Tensor, Tensor],
    run: TrainingRun,
    group: Group,
    teacher: nn.Module | None,
) -> float:
    """Leave the gradients of the mean loss over all processes; return that loss."""
    model, lesson, batch_size = state.model, run.lesson, run.lesson.recipe.batch
    images, targets = lesson.mixed(*batch, state.step, group.rank)
    # float64, so that the passes of a step add no rounding of their own to the loss.
    total = torch.zeros((), dtype=torch.float64, device=group.device)
    size = run.micro_batch or len(images)
    with _drawing(lesson.recipe.generator(Draw.DROPOUT, state.step, group.rank), group.device):
        for some in zip(images.split(size), targets.split(size), strict=True):
            loss = lesson.loss(model, some, teacher)
            # By the whole batch: gradients of passes and processes are then only to be added.
            (loss / batch_size).backward()
            total += loss.detach()
    # Which parameters have none is up to the model, so every process leaves out the same.
    group.sum_gradients([p.grad for p in model.parameters() if p.grad is not None])
    # What batch norms have seen of this process's share.
    group.average([b for key, b in model.named_buffers() if ".running_" in key])
    mean = group.sum(total).item() / batch_size
    if not math.isfinite(mean):
        raise VssmError(
            f"loss={mean} at step {state.step + 1} is not finite; begin again with a smaller lr "
            "(--lr), from weights that are whole"
        )
    return mean


@contextlib.contextmanager
def _drawing(rng: np.random.Generator, device: torch.device) -> Iterator[None]:
    """What layers draw in here comes from `rng`; torch's own generators stay as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(rng.integers(1 << 62)))
        yield


def _note(epoch: int, loss: float, run: TrainingRun, validator: Validator | None) -> str:
    """The most important first, as a narrow terminal leaves out the last."""
    top1 = "" if validator is None else f"top-1 {validator.rows[-1].top1:.2%}, "
    return f"loss {loss:.4f}, {top1}epoch {epoch} of {-(-run.steps // run.steps_per_epoch)}"
