"""The ablation's loop: every variant on every batch, so that all see the same images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from exporter.flops import count
from exporter.models.base import VisionModel
from exporter.training.ablate_fused import fuse_leftovers
from exporter.training.ablate_plan import Variant

Batch = tuple[npt.NDArray[np.float32], Sequence[int]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of an image, as `flops.count`; `unaligned`: the published rule without gaps."""

    published: int
    unaligned: int
    true: int


@dataclass
class Outcome:
    """What one variant did: images and hits, and the seconds of every batch with its size."""

    images: int = 0
    correct: int = 0
    batches: list[tuple[int, float]] = field(default_factory=list)

    @property
    def top1(self) -> float:
        """Share of the images whose class came first."""
        return self.correct / self.images

    def images_per_s(self) -> tuple[float, int]:
        """Median over the largest batches but the first, where there are others; and how many."""
        size = max(n for n, _ in self.batches)
        timed = [seconds for n, seconds in self.batches if n == size]
        timed = timed[1:] or timed
        return size / statistics.median(timed), len(timed)


def prepare(
    variant: Variant, model: VisionModel, *, operators: str, device: str
) -> tuple[VisionModel, Cost]:
    """The variant's model, ready to run, and its cost.

    Raises:
        ValueError: the variant or `operators` does not fit.
    """
    if variant.fused:
        fuse_leftovers(model)
    work, gaps = count(model), _once_a_layer(model)
    model.use_operators(operators).to(device)
    return model, Cost(work.published, work.published - gaps, work.true)


def measure(
    models: Mapping[str, VisionModel],
    batches: Iterable[Batch],
    *,
    total: int,
    device: str,
    progress: Progress = lambda _: None,
) -> dict[str, Outcome]:
    """Run every model on every batch, in turn.

    Raises:
        ValueError: logits are not finite, or there is no image.
    """
    found = {key: Outcome() for key in models}
    seen = 0
    for images, targets in batches:
        if not len(targets):
            continue
        array = torch.from_numpy(images).to(device)
        wanted = np.asarray(targets)
        for key, model in models.items():
            logits, seconds = _timed(model, array, device)
            if not np.isfinite(logits).all():
                raise ValueError(f"variant={key} has logits that are NaN or infinite: it overflows")
            outcome = found[key]
            outcome.images += len(targets)
            outcome.correct += int((logits.argmax(1) == wanted).sum())
            outcome.batches.append((len(targets), seconds))
        seen += len(targets)
        progress(f"{seen:,} of {total:,} images, {len(models)} variants")
    if seen == 0:
        raise ValueError("no image can be read; give a folder of image files")
    return found


def _timed(model: VisionModel, images: torch.Tensor, device: str) -> tuple[npt.NDArray[Any], float]:
    start = time.perf_counter()
    with torch.inference_mode():
        logits = model(images).float().cpu()  # which waits for the device
    seconds = time.perf_counter() - start
    return logits.numpy(), seconds


def _once_a_layer(model: VisionModel) -> int:
    """Alignment's part of the published figure: it counts once a layer, not once a direction."""
    directions = {cost.directions for _, cost in model.block_costs()}
    if len(directions) != 1:
        raise AssertionError("models that prune have layers of one kind")
    return count(model).alignment // directions.pop()


def machine(device: str) -> str:
    """What ran, for reports."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    threads = "" if device == "cuda" else f", {torch.get_num_threads()} threads"
    return f"torch {torch.__version__} on {name}{threads}, float32"
