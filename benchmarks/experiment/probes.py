"""How much of a dense model's accuracy hangs on what alignment keeps right: decays and order.

Nothing is pruned. Every second step of each scan decays twice, as if a place were missing before
it; or each scan takes the tokens in a random order, the same for all images. The convolution before
the scan is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from benchmarks.experiment.cases import DENSE, Case
from benchmarks.experiment.work import Images, right, variants
from torch import Tensor

from vssm.files.json import write_json
from vssm.ops import operators as ops

Steps = tuple[Tensor, Tensor]


def probe(case: Case, weights: Path, images: Images, output: Path) -> None:
    """Write how many images the dense model has right under each change."""
    if output.exists():
        return
    dense = [variants(case)[DENSE]]
    found = {}
    for name, change in CHANGES.items():
        with mock.patch.object(ops, "selective_scan", _changed(ops.selective_scan, change)):
            found[name] = right(case, dense, weights, images)[DENSE]
    write_json(output, {"images": images.total, "right": found})


def read(folder: Path) -> dict[str, float]:
    """Percent right by change, of what `probe` left there."""
    found = json.loads((folder / "probes.json").read_text())
    return {name: 100 * count / found["images"] for name, count in found["right"].items()}


def _changed(scan: Callable[..., Tensor], change: Callable[..., Steps]) -> Callable[..., Tensor]:
    def run(*operands: Tensor, order: Tensor, gap: Tensor, **rest: Any) -> Tensor:
        order, gap = change(order, gap)
        return scan(*operands, order=order, gap=gap, **rest)

    return run


def _nothing(order: Tensor, gap: Tensor) -> Steps:
    return order, gap


def _decays(order: Tensor, gap: Tensor) -> Steps:
    twice = gap.clone()
    twice[..., 1::2] *= 2
    return order, twice


def _order(order: Tensor, gap: Tensor) -> Steps:
    shuffled = torch.randperm(order.shape[-1], generator=torch.Generator().manual_seed(0))
    return order[..., shuffled].contiguous(), gap


CHANGES: Final[dict[str, Callable[..., Steps]]] = {
    "nothing changed": _nothing,
    "every second decay twice": _decays,
    "order shuffled": _order,
}
