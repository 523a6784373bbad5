"""A counterfactual of the scan, for this experiment alone: a kept token's input counts g times.

Alignment lets the state decay through the g - 1 pruned places before a kept token and adds nothing
there, so the state shrinks. Here the kept token's input stands for those places too: delta is g
times as long in both terms, h = exp(g delta A) h + g delta B u.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vssm.ops import operators as ops

KEY = "held"  # of variants; the schedule is that of "gap"


@contextmanager
def held_input(key: str) -> Iterator[None]:
    """Scans inside hold the input, where the variant `key` says so."""
    if not key.startswith(KEY):
        yield
        return
    scan = ops.selective_scan

    def held(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> Tensor:
        return scan(u, delta, A, times_gap(B, **rest), C, **rest)

    with mock.patch.object(ops, "selective_scan", held):
        yield


def times_gap(
    B: Tensor, *, order: Tensor, gap: Tensor, params_by_step: bool = False, **_: Any
) -> Tensor:
    """B (batch, seqlen, 1 or K, states), each row times the gap of the step that uses it."""
    gap = torch.cat([torch.ones_like(gap[..., :1]), gap[..., 1:]], dim=-1)  # h = 0 before
    batch = max(len(gap), len(order))
    gap, order = (x.expand(batch, -1, -1) for x in (gap, order))
    if not params_by_step:  # from steps to tokens
        gap = torch.zeros_like(gap).scatter(2, order.long(), gap)
    return B * gap.transpose(1, 2)[..., None].to(B.dtype)
