"""A training step of a few blocks: native gradients of the scan against autograd through a loop.

    python benchmarks/backward.py [--model vim_tiny] [--blocks 2] [--batch 8] [--threads 1]
                                  [--schedule 1:0.8] [--samples 7] [--quadratic]

One step is forward, mean of the squared logits, backward; no optimiser. Against the kernels:

- oracle: autograd through vssm.ops.reference, every direction of a layer together;
- loop: autograd through a loop over the steps, each direction on its own;
- plain loop: the same, but x[:, t] in place of unbind (benchmarks/plain_loop.py, what the public
  repositories fall back to): the gradient of each of these is as large as x, so its time is
  quadratic in the length. It is measured on request.

All take the same step on the same weights in turn, and their gradients are compared before any time
is printed: each parameter's, over the largest of that parameter by the oracle. Under the steps
stand the scans by themselves: forward and backward of one layer's node with the same operands.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from plain_loop import plain_recurrence
from torch import Tensor

import vssm
from vssm.ops import operators as ops
from vssm.ops import reference
from vssm.runtimes.ort import cpu_name

_TOLERANCE = 1e-4
Step = Callable[[], dict[str, Tensor]]
Recurrence = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def linear_recurrence(span: Tensor, A: Tensor, inject: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What `reference._recurrence` computes, a step at a time and a direction at a time."""
    outputs = []
    for k in range(inject.shape[2]):
        decay = torch.exp(torch.einsum("bte,en->bten", span[:, :, k], A[k % len(A)]))
        source = torch.einsum("bte,btn->bten", inject[:, :, k], B[:, :, k])
        h = torch.zeros_like(decay[:, 0])
        steps = []
        columns = (decay.unbind(1), source.unbind(1), C[:, :, k].unbind(1))
        for a, b, c in zip(*columns, strict=True):
            h = a * h + b
            steps.append(torch.einsum("ben,bn->be", h, c))
        outputs.append(torch.stack(steps, dim=1))
    return torch.stack(outputs, dim=2)


def main() -> None:
    """Time the steps, then the scans, and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vim_tiny")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--schedule")
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--quadratic", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    schedule = vssm.PruneSchedule.parse(options.schedule) if options.schedule else None
    model = vssm.create_model(options.model, schedule=schedule, depth=options.blocks).train()
    images = torch.randn(options.batch, 3, *model.image_size, generator=_seed())
    print(
        f"{cpu_name()}, torch {torch.__version__}, {options.threads} threads, float32: "
        f"{options.model}, {options.blocks} blocks, batch {options.batch}"
    )
    loops = {"loop": linear_recurrence}
    if options.quadratic:
        loops["plain loop"] = plain_recurrence
    report("step", lambda: step(model, images), loops, options.samples)
    operands = recorded_operands(model, images)
    report("scan", lambda: scan_step(operands), loops, options.samples)


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def step(model: torch.nn.Module, images: Tensor) -> dict[str, Tensor]:
    """One step; the gradients by parameter."""
    model.zero_grad(set_to_none=True)
    model(images).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def recorded_operands(model: torch.nn.Module, images: Tensor) -> dict[str, object]:
    """What the model's first scan is called with."""
    calls: list[dict[str, object]] = []
    scan = ops.selective_scan

    def record(*tensors: Tensor, **rest: object) -> Tensor:
        calls.append(dict(zip(("u", "delta", "A", "B", "C"), tensors, strict=True)) | rest)
        return scan(*tensors, **rest)  # type: ignore[arg-type]

    with mock.patch.object(ops, "selective_scan", record), torch.no_grad():
        model(images)
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in calls[0].items()}


def scan_step(operands: dict[str, object]) -> dict[str, Tensor]:
    """Forward and backward of one node; the gradients by operand."""
    leaves = {
        k: v.detach().requires_grad_(v.is_floating_point()) if isinstance(v, Tensor) else v
        for k, v in operands.items()
    }
    ops.selective_scan(**leaves).square().mean().backward()  # type: ignore[arg-type]
    return {k: v.grad for k, v in leaves.items() if isinstance(v, Tensor) and v.grad is not None}


def by_autograd(*tensors: Tensor, backend: str = "auto", **rest: object) -> Tensor:
    """The oracle where a model calls an operator."""
    return reference.selective_scan(*tensors, **rest)  # type: ignore[arg-type]


def report(name: str, run: Step, loops: dict[str, Recurrence], samples: int) -> None:
    """Median milliseconds of each formula, and their ratio to the kernels'."""

    def oracle() -> dict[str, Tensor]:
        with mock.patch.object(ops, "selective_scan", by_autograd):
            return run()

    def through(recurrence: Recurrence) -> dict[str, Tensor]:
        with mock.patch.object(reference, "_recurrence", recurrence):
            return oracle()

    runs = {"kernels": run, "oracle": oracle}
    runs |= {key: functools.partial(through, loop) for key, loop in loops.items()}
    want = {k: v.clone() for k, v in oracle().items()}
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(samples + 1):
        for key, formula in runs.items():
            start = time.perf_counter()
            got = formula()
            times[key].append(1e3 * (time.perf_counter() - start))
            error = largest_error(got, want)
            if not error <= _TOLERANCE:
                raise SystemExit(f"{key} has gradients {error:.1e} off: its timing says nothing")
    medians = {key: float(np.median(taken[1:])) for key, taken in times.items()}
    for key, median in medians.items():
        low, high = np.percentile(times[key][1:], (5, 95))
        ratio = median / medians["kernels"]
        print(f"{name} {key:>10}: {median:8.1f} ms ({low:.1f} to {high:.1f}), {ratio:5.1f} times")
    print(f"{name} gradients of the kernels: {largest_error(run(), want):.1e} from the oracle's")


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Over all gradients, each over its own largest magnitude."""
    if set(got) != set(want):
        raise SystemExit(f"gradients of {sorted(set(got) ^ set(want))} are there once only")
    return max(
        float((got[k] - w).abs().max() / w.abs().max().clamp_min(1e-30)) for k, w in want.items()
    )


if __name__ == "__main__":
    main()
