"""An export with kernels against a plain PyTorch loop over the sequence, one thread, batch 1.

    python benchmarks/plain_loop.py [--model vim_tiny] [--schedule 10:0.8] [--samples 15]

The plain loop is what the public repositories fall back to without their CUDA kernel: all decays
at once, then one step after another with one contraction each, each direction on its own. Beside
it PyTorch is timed with this package's kernels, which is what a model runs by default, and with
the reference, which does every direction of a layer together and contracts 64 steps at once.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import vssm
from vssm.models.base import VisionModel
from vssm.ops import reference


def plain_recurrence(span: Tensor, A: Tensor, inject: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What `reference._recurrence` computes, a step at a time and a direction at a time."""
    outputs = []
    for k in range(inject.shape[2]):
        decay = torch.exp(torch.einsum("bte,en->bten", span[:, :, k], A[k % len(A)]))
        source = torch.einsum("bte,btn->bten", inject[:, :, k], B[:, :, k])
        h = torch.zeros_like(decay[:, 0])
        steps = []
        for t in range(inject.shape[1]):
            h = decay[:, t] * h + source[:, t]
            steps.append(torch.einsum("ben,bn->be", h, C[:, t, k]))
        outputs.append(torch.stack(steps, dim=1))
    return torch.stack(outputs, dim=2)


def main() -> None:
    """Time them in turn and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vim_tiny")
    parser.add_argument("--schedule")
    parser.add_argument("--samples", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    schedule = vssm.PruneSchedule.parse(options.schedule) if options.schedule else None
    model = vssm.create_model(options.model, schedule=schedule)
    shape = (1, 3, *model.image_size)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with tempfile.TemporaryDirectory() as directory:
        vssm.export(model, Path(directory) / "out", weights=False)
        with vssm.open_session(Path(directory) / "out", threads=1) as session:
            print(session.info)
            report(model, session, images, options.samples)


def report(model: VisionModel, session: vssm.Session, images: np.ndarray, samples: int) -> None:
    """Print median milliseconds, and the ratio to the kernels'."""

    def in_torch(backend: str) -> np.ndarray:
        with torch.inference_mode():
            return model.use_backend(backend)(torch.from_numpy(images)).numpy()

    def plain() -> np.ndarray:
        with mock.patch.object(reference, "_recurrence", plain_recurrence):
            return in_torch("reference")

    runs = {
        "kernels": lambda: session.run(images)["logits"],
        "PyTorch, kernels": lambda: in_torch("kernel"),
        "PyTorch, reference": lambda: in_torch("reference"),
        "PyTorch, plain loop": plain,
    }
    want = in_torch("reference")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            got = run()
            times[name].append(1e3 * (time.perf_counter() - start))
            if not np.abs(got - want).max() <= 1e-4 * np.abs(want).max():
                raise SystemExit(f"{name} gives other numbers: a timing of these says nothing")
    medians = {name: float(np.median(taken[1:])) for name, taken in times.items()}
    for name, median in medians.items():
        print(f"{name:>19}: {median:8.1f} ms, {median / medians['kernels']:5.1f} times the kernels")


if __name__ == "__main__":
    main()
