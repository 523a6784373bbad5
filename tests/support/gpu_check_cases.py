"""Small shapes, a small model and a stand-in for mamba-ssm, for the tests of benchmarks/gpu."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.gpu import models
from benchmarks.gpu.report import Report
from benchmarks.gpu.shapes import ScanShape
from torch import Tensor

import vssm
from vssm.ops import reference

VIM = ScanShape("vim_tiny", 6, 9, 2, "float32")
PRUNED = ScanShape("vim_tiny", 6, 9, 3, "float32", pruned=True)
PLAIN = ScanShape("plain_mamba_l3", 6, 9, 2, "float32", directions=4, shared="u delta A C D")
CROSS = ScanShape("vmamba", 6, 9, 2, "float32", d_state=1, directions=4, shared="u", gated=False)
GROUP = ScanShape("groupmamba", 6, 9, 2, "float32", d_state=1, directions=1, gated=False)


class Recorded(Report):
    """A report that keeps its lines in place of printing them."""

    def __init__(self, **options: Any) -> None:
        self.lines: list[dict[str, Any]] = []
        super().__init__("table", write=lambda line: self.lines.append(json.loads(line)), **options)

    @property
    def found(self) -> list[dict[str, Any]]:
        """The times."""
        return [line for line in self.lines if "median_us" in line]

    @property
    def absent_ones(self) -> dict[str, str]:
        """What was not measured, and why."""
        return {a["not_measured"]: a["reason"] for a in self.lines if "not_measured" in a}

    @property
    def subjects(self) -> set[str]:
        """What has a time."""
        return {row["subject"] for row in self.found}


def mamba_extension() -> Any:
    """What mamba-ssm's extension computes, by the oracle; operands (batch, d_inner, seqlen)."""

    def fwd(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> list[Tensor]:
        D, z, bias, softplus = rest
        assert u.stride(-1) == delta.stride(-1) == B.stride(-1) == C.stride(-1) == 1
        steps = torch.arange(u.shape[2], dtype=torch.int32)[None, None]
        zeros = torch.zeros(u.shape[1])
        y = reference.selective_scan(
            *(t.transpose(1, 2)[:, :, None] for t in (u, delta)),
            A[None],
            *(t.permute(0, 3, 1, 2) for t in (B, C)),
            D=(zeros if D is None else D)[None],
            delta_bias=(zeros if bias is None else bias)[None],
            order=steps,
            gap=torch.ones_like(steps),
            delta_softplus=softplus,
        ).transpose(1, 2)
        gated = [] if z is None else [y * torch.nn.functional.silu(z)]
        return [y, torch.empty(0), *gated]

    return SimpleNamespace(fwd=fwd)


def micro_oracle(schedule: str | None) -> models.Oracle:
    """A small Vim in place of the real one, which takes long on the CPU."""
    parsed = None if schedule is None else vssm.PruneSchedule.parse(schedule)
    sizes = {"depth": 1, "d_model": 16, "image_size": 32}
    model = vssm.create_model("vim_tiny", schedule=parsed, num_classes=10, **sizes)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return models.Oracle(model, images, copy.deepcopy(model).double()(images.double()))
