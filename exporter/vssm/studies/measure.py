"""The ablation's loop: every variant on every batch, so that all see the same images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vssm.files.journal import JsonJournal
from vssm.models.base import VisionModel
from vssm.models.cost import count
from vssm.models.fused_tokens import fuse_leftovers
from vssm.runtimes.ort import cpu_name
from vssm.runtimes.session import plural
from vssm.studies.plan import Variant
from vssm.types import Steps

_MEASURING = "measuring, images"


@dataclass(frozen=True)
class Step:
    """One batch through every run.

    Attributes:
        unreadable: files that are no readable images: path and error.
        hits: by run, a "1" for every readable image whose class came first, else a "0".
        seconds: by run; nothing where no image could be read.
        first: whether it was the first batch of its call, in which runs warm up.
    """

    unreadable: tuple[tuple[str, str], ...]
    hits: Mapping[str, str]
    seconds: Mapping[str, float]
    first: bool


class AblationJournal(JsonJournal[Step]):
    """The journal of one ablation, a step a batch."""

    what = "ablation"
    # The journal lies in the output directory, so this is what moves it.
    option = "-o"

    @staticmethod
    def to_json(entry: Step) -> Any:
        """A step as an object."""
        return asdict(entry)

    @staticmethod
    def from_json(document: Any) -> Step:
        """A step again."""
        unreadable = tuple((path, error) for path, error in document["unreadable"])
        return Step(unreadable, document["hits"], document["seconds"], document["first"])


# Images, their classes, and the files that could not be read.
Batch = tuple[npt.NDArray[np.float32], Sequence[int], Sequence[tuple[str, str]]]


@dataclass(frozen=True)
class VariantCost:
    """Multiply-adds of an image, as `flops.count`; `unaligned`: the published rule without gaps."""

    published: int
    unaligned: int
    true: int


@dataclass
class Outcome:
    """What one run did: a "1" or "0" an image in `hits`; of every batch size, seconds, `first`."""

    hits: str = ""
    batches: list[tuple[int, float, bool]] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Images that it saw."""
        return len(self.hits)

    @property
    def correct(self) -> int:
        """Images whose class came first."""
        return self.hits.count("1")

    @property
    def top1(self) -> float:
        """Share of the images whose class came first."""
        return self.correct / self.images

    def seconds_per_image(self) -> list[float]:
        """Of the largest batches but a call's first, where there are others."""
        # Smaller batches, the last or those with unreadable files, have another speed.
        size = max(n for n, _, _ in self.batches)
        full = [(seconds, first) for n, seconds, first in self.batches if n == size]
        timed = [seconds for seconds, first in full if not first] or [s for s, _ in full]
        return [seconds / size for seconds in timed]

    def images_per_s(self) -> float:
        """By the median: a batch that something else held up must not move it."""
        return 1 / statistics.median(self.seconds_per_image())


def prepare(
    variant: Variant, model: VisionModel, *, backend: str, device: str
) -> tuple[VisionModel, VariantCost]:
    """The variant's model, ready to run, and its cost.

    Raises:
        ValueError: the variant or `backend` does not fit.
    """
    if variant.fused:
        fuse_leftovers(model)
    work, gaps = count(model), _once_a_layer(model)
    model.use_backend(backend).to(device)
    return model, VariantCost(work.published, work.published - gaps, work.true)


def measure(
    models: Mapping[str, VisionModel],
    batches: Iterable[Batch],
    *,
    total: int,
    device: str,
    journal: AblationJournal | None = None,
    progress: Steps = lambda *_: None,
) -> dict[str, Outcome]:
    """Run every model on every batch, in turn.

    Args:
        models: by the runs' keys.
        batches: those that the journal lacks.
        total: files of all batches.
        device: where the models are.
        journal: gets each batch as soon as it is done; None for none.
        progress: called after every run, with the images that all runs have seen, as it were.

    Returns:
        What every run did, in the batches of the journal too.

    Raises:
        ValueError: logits are not finite, or there is no image.
        ArtifactError: the journal cannot be written.
    """
    steps = [] if journal is None else [*journal.done]
    seen = sum(_files(step) for step in steps)
    progress(_MEASURING, seen, total)
    first = True
    for images, targets, unreadable in batches:
        hits, seconds = {}, {}
        if len(targets):
            array = torch.from_numpy(images).to(device)
            wanted = np.asarray(targets)
            # In turn on each batch, so that all are held up alike when the machine is busy.
            for number, (key, model) in enumerate(models.items()):
                progress(_MEASURING, seen + len(targets) * number // len(models), total, key)
                logits, seconds[key] = _timed(model, array, device)
                # argmax takes NaN for the largest, and it would count as a class.
                if not np.isfinite(logits).all():
                    raise ValueError(
                        f"variant={key} has logits that are NaN or infinite: it overflows"
                    )
                right = logits.argmax(1) == wanted
                hits[key] = "".join("01"[int(hit)] for hit in right)
        # A batch of which nothing could be read warms nothing up.
        steps.append(Step(tuple(unreadable), hits, seconds, first and bool(hits)))
        if journal is not None:
            journal.append(steps[-1])
        first = first and not hits
        seen += len(targets) + len(unreadable)
        progress(_MEASURING, seen, total)
    return _outcomes(models, steps)


def _outcomes(keys: Iterable[str], steps: Sequence[Step]) -> dict[str, Outcome]:
    found = {key: Outcome() for key in keys}
    for step in steps:
        for key, hits in step.hits.items():
            found[key].hits += hits
            found[key].batches.append((len(hits), step.seconds[key], step.first))
    if any(outcome.images == 0 for outcome in found.values()):
        raise ValueError("no image can be read; give a folder of image files")
    return found


def _files(step: Step) -> int:
    return len(next(iter(step.hits.values()), "")) + len(step.unreadable)


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
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    threads = "" if device == "cuda" else f", {plural(torch.get_num_threads(), 'thread')}"
    return f"{name}{threads}, float32, torch {torch.__version__}"
