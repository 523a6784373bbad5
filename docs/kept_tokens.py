"""Draws kept_tokens.png, the picture in README: patches that a pruned Vim keeps of a photograph.

    python docs/kept_tokens.py

There are no trained weights of full size in this repository, so a small Vim first learns, in about
two minutes on a CPU, to tell crops of scikit-learn's two photographs apart. What it keeps of the
flower is drawn by `vssm visualize`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.nn import functional

import vssm

_SIDE: Final = 224
_MODEL: Final = {"num_classes": 2, "image_size": _SIDE, "depth": 12, "d_model": 64, "d_state": 8}
_SCHEDULE: Final = {3: 0.7, 6: 0.7, 9: 0.7}
_STEPS, _BATCH, _RATE = 120, 8, 1e-3
_MEAN, _STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def crops(photographs: list[Image.Image], rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """Normalised random crops (batch, 3, side, side), and which photograph each is of."""
    labels = rng.integers(0, len(photographs), _BATCH)
    images = []
    for label in labels:
        photograph = photographs[label]
        size = int(rng.integers(96, min(photograph.size)))
        left, top = (int(rng.integers(0, extent - size)) for extent in photograph.size)
        crop = photograph.crop((left, top, left + size, top + size)).resize((_SIDE, _SIDE))
        images.append((np.asarray(crop, np.float32) / 255 - _MEAN) / _STD)
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2)), torch.from_numpy(labels)


def train(photographs: list[Image.Image]) -> torch.nn.Module:
    """A pruned Vim that tells crops of the photographs apart."""
    rng = np.random.default_rng(0)
    model = vssm.create_model("vim_tiny", schedule=vssm.PruneSchedule(_SCHEDULE), **_MODEL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    for _ in range(_STEPS):
        images, labels = crops(photographs, rng)
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def main() -> None:
    """Train, export, and draw."""
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    with tempfile.TemporaryDirectory() as folder:
        photograph = Path(folder, "flower.png")
        flower.save(photograph)
        vssm.export(train([china, flower]), Path(folder, "model"))
        vssm.visualize(
            vssm.ModelSource(str(Path(folder, "model"))), [photograph], Path(folder, "pictures")
        )
        (kept,) = Path(folder, "pictures").glob("*_kept.png")
        Image.open(kept).convert("RGB").quantize(128).save(
            Path(__file__).with_suffix(".png"), optimize=True
        )


if __name__ == "__main__":
    main()
