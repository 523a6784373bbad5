"""Stages, rows, documents, shapes and a stand-in for mamba-ssm, for the tests of gpu_check."""

from __future__ import annotations

import copy
import json
import os
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.gpu import models, result
from benchmarks.gpu.program import Report
from benchmarks.gpu.result import Ceilings, Document, Row, StageResult, Work
from benchmarks.gpu.shapes import ScanShape
from benchmarks.gpu.stages import Stage, run_stage
from torch import Tensor

import vssm
from vssm.files.json import Node
from vssm.ops import reference

RATES = Ceilings(ex2_per_s=1e12, copy_bytes_per_s=2e12, launch_us=2.0)
VIM = ScanShape("vim_tiny", 6, 9, 2, "float32")
PRUNED = ScanShape("vim_tiny", 6, 9, 3, "float32", pruned=True)
PLAIN = ScanShape("plain_mamba_l3", 6, 9, 2, "float32", directions=4, shared="u delta A C D")
CROSS = ScanShape("vmamba", 6, 9, 2, "float32", d_state=1, directions=4, shared="u", gated=False)
GROUP = ScanShape("groupmamba", 6, 9, 2, "float32", d_state=1, directions=1, gated=False)


def stage(*commands: list[str], name: str = "one", limit: float = 30, **options: Any) -> Stage:
    return Stage(name, "a test", limit, limit, lambda _: commands, **options)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def ran(tested: Stage, folder: Path, *, quick: bool = False) -> StageResult:
    log = folder / "stage.log"
    return run_stage(tested, log, quick=quick, env=os.environ, cwd=folder)


def row(subject: str, microseconds: float, *, stage: str = "scans", **case: Any) -> Row:
    work = case.pop("work", Work())
    return Row(
        stage=stage,
        case=case,
        subject=subject,
        cache=case.pop("cache", "warm"),
        median_us=microseconds,
        p5_us=microseconds,
        p95_us=microseconds,
        samples=25,
        calls=4,
        error=0.0,
        allowed=1e-3,
        work=work,
    )


def document(**fields: Any) -> Document:
    started = "2026-11-21T00:00:00+00:00"
    return Document(started, "benchmarks/gpu_check.sh", quick=False, commit="abc", **fields)


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


def lines(report: Report, kind: str) -> list[Any]:
    """What a program wrote, of one kind, read as gpu_check reads it."""
    if not report.path.exists():
        return []
    read = [Node(json.loads(line)) for line in report.path.read_text().splitlines()]
    reader = {"row": result.row, "absent": result.absent}[kind]
    return [reader(node.at(kind)) for node in read if kind in node.value]


def micro_oracle(schedule: str | None) -> models.Oracle:
    """A small Vim in place of the real one, which takes long on the CPU."""
    parsed = None if schedule is None else vssm.PruneSchedule.parse(schedule)
    sizes = {"depth": 2, "d_model": 16, "image_size": 32}
    model = vssm.create_model("vim_tiny", schedule=parsed, num_classes=10, **sizes)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return models.Oracle(model, images, copy.deepcopy(model).double()(images.double()))


def alive(process: int) -> bool:
    """Whether it still runs; a zombie that nobody has asked for does not."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True
