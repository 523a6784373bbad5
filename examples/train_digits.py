"""Train a small Vim on real handwritten digits and write its official-key checkpoint.

    python examples/train_digits.py

Runs on one CPU thread, deterministically for a given seed. In the second half of the epochs every
other step prunes by the demo's schedule with gap alignment, so that one set of weights serves the
dense model and the pruned one; `--dense` leaves that out, which shows pruning zero-shot.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import digits
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import vssm

_EPOCHS: Final = 18
# The scan's decays of a larger batch leave the caches: 16 and 32 cost the same an image, 64 more.
_BATCH: Final = 32
_LEARNING_RATE: Final = 2e-3
_WARM_UP: Final = 0.1  # share of the steps
_WEIGHT_DECAY: Final = 0.05
_CLIP_NORM: Final = 1.0
_PRUNED_FROM: Final = 0.5  # share of the epochs
_MAX_DEGREES, _MAX_SHIFT, _SCALES = 10.0, 2.0, (0.9, 1.15)  # shift in pixels


@dataclass(frozen=True)
class Data:
    """Normalised images (n, 3, 32, 32) and their labels (n,)."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> Data:
        """From what `digits.load_digits_split` returns."""
        return cls(torch.from_numpy(digits.normalise(images)), torch.from_numpy(labels))

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Data:
        """The first `count` images."""
        return Data(self.images[:count], self.labels[:count])

    def batches(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in the given order, the last one possibly smaller."""
        for index in order.split(_BATCH):
            yield self.images[index], self.labels[index]


def create(alignment: str | None = None) -> nn.Module:
    """The example's model: dense, or pruned by the demo's schedule with this alignment."""
    schedule = None
    if alignment is not None:
        # What the published checkpoint was trained with; it is no longer the default.
        schedule = vssm.PruneSchedule.parse(digits.SCHEDULE, alignment=alignment, conv="compact")
    return vssm.create_model(digits.MODEL_NAME, schedule=schedule, **digits.MODEL)


def train(
    data: Data, *, epochs: int, seed: int, dense: bool = False
) -> tuple[nn.Module, list[float]]:
    """Train from the seeded initial weights.

    Args:
        data: what to learn.
        epochs: passes over it.
        seed: of the order of the images and of their augmentation.
        dense: never prune; else every other step of the second half of the epochs does.

    Returns:
        The dense model in eval mode, and the mean loss of each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    model, pruned = create(), create("gap")
    # One set of parameters: the pruned model holds the dense one's.
    pruned.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    steps = epochs * math.ceil(len(data) / _BATCH)
    optimizer = torch.optim.AdamW(_parameter_groups(model), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    losses, start = [], time.perf_counter()
    for epoch in range(epochs):
        prunes = not dense and epoch >= _PRUNED_FROM * epochs
        total = 0.0
        order = torch.randperm(len(data), generator=generator)
        for number, (images, labels) in enumerate(data.batches(order)):
            network = pruned if prunes and number % 2 else model
            loss = functional.cross_entropy(network(augment(images, generator)), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(labels)
        losses.append(total / len(data))
        spent = time.perf_counter() - start
        left = spent / (epoch + 1) * (epochs - epoch - 1)
        print(
            f"epoch {epoch + 1:>2}/{epochs}  loss {losses[-1]:.4f}"
            f"{'  (half pruned)' if prunes else ''}  {spent:4.0f} s, about {left:.0f} s left",
            flush=True,
        )
    return model, losses


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale and shift each normalised image a little; what comes in is black."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle = torch.deg2rad(uniform(-_MAX_DEGREES, _MAX_DEGREES))
    shrink = 1 / uniform(*_SCALES)
    reach = 2 * _MAX_SHIFT / digits.IMAGE_SIZE  # affine_grid's unit is half an image
    cos, sin = shrink * angle.cos(), shrink * angle.sin()
    rows = [cos, -sin, uniform(-reach, reach), sin, cos, uniform(-reach, reach)]
    theta = torch.stack(rows, dim=1).reshape(count, 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    black = torch.from_numpy(digits.normalise(np.zeros((1, 1, 1, 3), np.uint8)))
    return functional.grid_sample(images - black, grid, align_corners=False) + black


@torch.inference_mode()
def accuracy(model: nn.Module, data: Data) -> float:
    """Share of the images that the model classifies rightly."""
    right = 0
    for images, labels in data.batches(torch.arange(len(data))):
        right += int((model(images).argmax(1) == labels).sum())
    return right / len(data)


def accuracies(weights: dict[str, Tensor], data: Data) -> dict[str, float]:
    """Accuracy of the dense model and of the pruned ones, by name."""
    variants = {"dense": None, "pruned, gap": "gap", "pruned, none": "none"}
    found = {}
    for name, alignment in variants.items():
        model = create(alignment)
        model.load_state_dict(weights)
        found[name] = accuracy(model, data)
    return found


def save(model: nn.Module, path: Path) -> None:
    """Write the weights as safetensors, aside first, so that a failure leaves no half file."""
    aside = path.with_name(path.name + ".partial")
    weights = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, aside, metadata={"format": "pt"})
    os.replace(aside, path)


def _rate(step: int, steps: int) -> float:
    """Linear warm-up to 1, then a cosine to 0."""
    warm_up = _WARM_UP * steps
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / (steps - warm_up))


def _parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Weight matrices decay; biases, norms, embeddings and the scan's A and D do not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() >= 2 and name.endswith(".weight")
        (decayed if matrix else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": _WEIGHT_DECAY},
        {"params": kept, "weight_decay": 0.0},
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, write the checkpoint, print what it reaches on the held-out images."""
    parser = argparse.ArgumentParser(description="Train a small Vim on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=_EPOCHS, help=f"default {_EPOCHS}")
    parser.add_argument("--seed", type=int, default=0, help="of shuffling and augmentation")
    parser.add_argument("--output", type=Path, default=Path("vim_digits.safetensors"))
    parser.add_argument("--dense", action="store_true", help="train without pruned steps")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few images")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error(f"--epochs={options.epochs} is below 1; train for one epoch at least")
    torch.set_num_threads(1)  # sums in one order: the same weights every time
    split = digits.load_digits_split()
    train_data = Data.of(split.train_images, split.train_labels)
    test_data = Data.of(split.test_images, split.test_labels)
    if options.quick:
        train_data, test_data, options.epochs = train_data.first(64), test_data.first(64), 4
    model, losses = train(train_data, epochs=options.epochs, seed=options.seed, dense=options.dense)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save(model, options.output)
    parameters = sum(p.numel() for p in model.parameters())
    size = options.output.stat().st_size
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print(f"wrote {options.output}: {parameters:,} parameters, {size / 1e6:.2f} MB")
    print(f"accuracy on {len(test_data)} held-out images, schedule {digits.SCHEDULE}:")
    for name, share in accuracies(model.state_dict(), test_data).items():
        print(f"  {name:<13} {100 * share:.2f} %")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
