"""Training a pruned model further: the loop over steps, and what it reports."""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from typing_extensions import Self

from vssm.errors import RuntimeUnavailableError, VssmError
from vssm.evaluation.data import ImageFolder, in_order
from vssm.models.base import VisionModel
from vssm.training.augment import Example, load_batch
from vssm.training.log import LogRow, RunLog
from vssm.training.mix import loss_of, mix
from vssm.training.recipe import Draw, Recipe
from vssm.training.state import State
from vssm.types import Progress


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
        if self.world == 1:
            return
        # One reduction: one for each of hundreds of tensors would wait for the others as often.
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

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
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, value)
        if any(other != found[0] for other in found):
            raise VssmError(
                f"{name}={found} differs between the processes; they must see the same files: "
                "start them with the same arguments on a shared file system"
            )


STATE_FILE = "state.safetensors"
LOG_FILE = "log.csv"


@dataclass(frozen=True)
class TrainingRun:
    """What is trained on what, and how the work is laid out; only `recipe` changes numbers.

    Attributes:
        recipe: the numbers.
        folder: the images and their classes.
        directory: for the state and the log.
        header: what must be the same when the run goes on.
        workers: processes that load images, for each process that trains.
        micro_batch: images of one pass, whose gradients are added up; None for the whole share of
            a process. It changes sums in their last bits.
        save_every: steps between states, beside the one at the end of each epoch.
    """

    recipe: Recipe
    folder: ImageFolder
    directory: Path
    header: Mapping[str, Any]
    workers: int
    micro_batch: int | None
    save_every: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.recipe.steps(len(self.folder.pictures))

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.recipe.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Trained:
    """What a run did.

    Attributes:
        images: of the data set.
        steps: in all.
        resumed: of them, those that a run before had done and saved.
        loss: mean over the last epoch.
        seconds: of the other steps, loading included.
        images_per_s: over these seconds; None where nothing was left to do.
    """

    images: int
    steps: int
    resumed: int
    loss: float
    seconds: float
    images_per_s: float | None


def train(
    model: VisionModel,
    run: TrainingRun,
    group: Group,
    *,
    log: RunLog | None,
    teacher: nn.Module | None = None,
    progress: Progress = lambda _: None,
) -> tuple[State, Trained]:
    """Train `model` in place, from the state in the directory where there is one.

    Args:
        model: with the weights to begin with, on the group's device.
        run: what to do.
        group: the processes that do it.
        log: the log, in the process that leads.
        teacher: the model to distil from, where the recipe does.
        progress: called with a line of text after every step.

    Raises:
        ArtifactError: the state there is of another run, or a file cannot be written.
        ValueError: an image cannot be read.
        VssmError: the loss is not finite, or a worker was killed.
    """
    model.train()
    state, path = State.begin(model, run.recipe), run.directory / STATE_FILE
    if path.exists():
        state.load(path, run.header)
    # A process that sees another state, or none, would make other steps and be waited for.
    group.agree("step", state.step)
    resumed, start = state.step, time.perf_counter()
    if log is not None:
        log.begin(resumed)
    for batch in _batches(run, group, first=resumed):
        epoch = state.step // run.steps_per_epoch
        lr = run.recipe.learning_rate(epoch)
        loss = _gradients(state, batch, run, group, teacher)
        state.advance(lr, run.recipe.ema)
        if log is not None:
            log.add(LogRow(state.step, epoch + 1, lr, loss))
            if state.step % run.save_every == 0 or state.step % run.steps_per_epoch == 0:
                # The rows first: `begin` refuses a state that has more steps than the log has rows.
                log.sync()
                state.save(path, run.header)
        progress(_line(state.step, loss, lr, run, (time.perf_counter() - start, resumed)))
    # The time is that of the slowest process.
    group.wait()
    seconds = time.perf_counter() - start
    model.eval()
    losses = [math.nan] if log is None else log.losses(run.steps_per_epoch)
    done = state.step - resumed
    return state, Trained(
        images=len(run.folder.pictures),
        steps=run.steps,
        resumed=resumed,
        loss=sum(losses) / len(losses),
        seconds=seconds,
        images_per_s=done * run.recipe.batch / seconds if done else None,
    )


def _batches(run: TrainingRun, group: Group, *, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Classes and inputs of this process's share of every step from `first` on."""
    load = functools.partial(load_batch, recipe=run.recipe, size=tuple(run.header["image_size"]))
    # Made as they are needed: all epochs of a large data set would not fit into memory.
    shares, ahead = itertools.tee(_shares(run, group, first))
    batches = ([example for example, _ in share] for share in ahead)
    for share, pixels in zip(shares, in_order(load, batches, workers=run.workers), strict=True):
        classes = torch.tensor([target for _, target in share])
        yield classes.to(group.device), torch.from_numpy(pixels).to(group.device)


def _shares(run: TrainingRun, group: Group, first: int) -> Iterator[list[tuple[Example, int]]]:
    """The images that this process has of every step, with their classes."""
    per_epoch, batch = run.steps_per_epoch, run.recipe.batch
    for epoch in range(first // per_epoch, run.recipe.epochs):
        order = run.recipe.order(epoch, len(run.folder.pictures))
        for step in range(max(0, first - epoch * per_epoch), per_epoch):
            # The place in the whole batch: what an image draws does not depend on the processes.
            chosen = enumerate(order[step], start=step * batch)
            # In strides, so that the repeats of an image go to different processes, as DeiT's do.
            mine = list(chosen)[group.rank :: group.world]
            pictures = [(place, run.folder.pictures[index]) for place, index in mine]
            yield [
                (Example(str(run.folder.root / p.path), epoch, place), p.target)
                for place, p in pictures
            ]


def _gradients(
    state: State,
    batch: tuple[Tensor, Tensor],
    run: TrainingRun,
    group: Group,
    teacher: nn.Module | None,
) -> float:
    """Leave the gradients of the mean loss over all processes; return that loss."""
    model, recipe, (classes, images) = state.model, run.recipe, batch
    # By rank: each process mixes the images that it has.
    rng = recipe.generator(Draw.MIX, state.step, group.rank)
    images, targets = mix(images, classes, run.header["num_classes"], recipe, rng)
    # float64, so that the passes of a step add no rounding of their own to the loss.
    total = torch.zeros((), dtype=torch.float64, device=group.device)
    size = run.micro_batch or len(images)
    for some, goals in zip(images.split(size), targets.split(size), strict=True):
        taught = None
        if teacher is not None:
            with torch.no_grad():
                taught = teacher(some)
        loss = loss_of(model(some), goals, taught, recipe)
        # By the whole batch: gradients of passes and processes are then only to be added.
        (loss / recipe.batch).backward()
        total += loss.detach()
    # Which parameters have none is up to the model, so every process leaves out the same.
    group.sum_gradients([p.grad for p in model.parameters() if p.grad is not None])
    mean = group.sum(total).item() / recipe.batch
    if not math.isfinite(mean):
        raise VssmError(
            f"loss={mean} at step {state.step + 1} is not finite; begin again with a smaller lr "
            "(--lr), from weights that are whole"
        )
    return mean


def _line(step: int, loss: float, lr: float, run: TrainingRun, since: tuple[float, int]) -> str:
    seconds, resumed = since
    speed = (step - resumed) / seconds
    left = timedelta(seconds=round((run.steps - step) / speed))
    return (
        f"epoch {(step - 1) // run.steps_per_epoch + 1} of {run.recipe.epochs}, step {step:,} of "
        f"{run.steps:,}, loss {loss:.4f}, lr {lr:.1e}, {speed * run.recipe.batch:.1f} images/s, "
        f"{left} left"
    )
