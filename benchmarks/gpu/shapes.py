"""The scans that are timed: shapes, operands, the least work, and what they should give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from benchmarks.gpu.report import Case, Work
from benchmarks.gpu.timing import sizes
from torch import Tensor

from vssm.ops import reference

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Largest error against the float64 oracle on the same operands, over the largest magnitude: twice
# what rounding an output costs a half type, and float32 sums in another order.
ALLOWED = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}
_STREAMS = ("u", "delta", "B", "C", "z")


@dataclass(frozen=True)
class ScanShape:
    """The scan node of one layer: `shared` lists the operands of one direction for all."""

    model: str
    d_inner: int
    seqlen: int
    batch: int
    dtype: str
    d_state: int = 16
    directions: int = 2
    shared: str = ""
    gated: bool = True
    pruned: bool = False

    @property
    def case(self) -> Case:
        """What a row says of it."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "batch": self.batch,
            "seqlen": self.seqlen,
            "directions": self.directions,
        }

    def axis(self, operand: str) -> int:
        """Size of an operand's direction axis."""
        return 1 if operand in self.shared.split() else self.directions

    @property
    def params_by_step(self) -> bool:
        """PlainMamba's directions share their step sizes, step by step."""
        return "delta" in self.shared.split()

    def work(self, operands: dict[str, Tensor]) -> Work:
        """Exponentials, special functions and bytes that any kernel needs.

        A softplus is an exp2 and a log2, the gate an exp2 and a reciprocal: all on the special
        function unit. Exponentials that directions share exactly are counted once.
        """
        scans = self.directions if max(self.axis("delta"), self.axis("A")) > 1 else 1
        channels = self.batch * self.seqlen * self.d_inner
        exps = channels * scans * self.d_state
        y = channels * operands["u"].element_size()
        return Work(
            exps=exps,
            specials=exps + channels * (2 * self.axis("delta") + 2 * self.gated),
            bytes=sizes(operands.values()) + y,
        )


def vim(name: str, batch: int, dtype: str, seqlen: int = 197) -> ScanShape:
    """A layer of vim_tiny or vim_small, both directions; below 197 tokens, pruned."""
    inner = {"vim_tiny": 384, "vim_small": 768}[name]
    return ScanShape(name, inner, seqlen, batch, dtype, pruned=seqlen < 197)


def plain_mamba_l3(batch: int, dtype: str) -> ScanShape:
    """A layer of plain_mamba_l3: four directions that share all but B."""
    return ScanShape("plain_mamba_l3", 896, 196, batch, dtype, directions=4, shared="u delta A C D")


def hierarchical(batch: int, dtype: str) -> list[ScanShape]:
    """The first and third stages of vmamba_tiny, and two of groupmamba_tiny's (a group a node)."""
    cross = {"d_state": 1, "directions": 4, "shared": "u", "gated": False}
    group = {"d_state": 1, "directions": 1, "gated": False}
    return [
        ScanShape("vmamba_tiny stage 1", 96, 3136, batch, dtype, **cross),
        ScanShape("vmamba_tiny stage 3", 384, 196, batch, dtype, **cross),
        ScanShape("groupmamba_tiny stage 1", 16, 3136, batch, dtype, **group),
        ScanShape("groupmamba_tiny stage 3", 87, 196, batch, dtype, **group),
    ]


def operands(shape: ScanShape, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """Operands in the operator's layout; step sizes between 1e-3 and 1, as trained models have."""
    make = torch.Generator(device=device).manual_seed(seed)
    dtype = DTYPES[shape.dtype]
    batch, seqlen, inner, states = shape.batch, shape.seqlen, shape.d_inner, shape.d_state

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=make, device=device)

    found = {
        "u": normal(batch, seqlen, shape.axis("u"), inner),
        "delta": normal(batch, seqlen, shape.axis("delta"), inner),
        "A": -torch.exp(normal(shape.axis("A"), inner, states)),
        "B": normal(batch, seqlen, shape.axis("B"), states),
        "C": normal(batch, seqlen, shape.axis("C"), states),
        "D": normal(shape.axis("D"), inner),
        "delta_bias": normal(shape.axis("delta"), inner) - 3,
        "order": _order(shape, device),
        "gap": _gap(shape, make, device),
    }
    if shape.gated:
        found["z"] = normal(batch, seqlen, inner)
    return {k: v.to(dtype) if k in _STREAMS else v for k, v in found.items()}


def _order(shape: ScanShape, device: torch.device) -> Tensor:
    steps = torch.arange(shape.seqlen, dtype=torch.int32, device=device)
    rows = [steps, steps.flip(0)]
    if shape.directions > 2:
        side = round(shape.seqlen**0.5)
        turned = steps.reshape(side, side).T.reshape(-1)
        rows += [turned, turned.flip(0)]
    return torch.stack(rows[: shape.directions])[None].contiguous()


def _gap(shape: ScanShape, make: torch.Generator, device: torch.device) -> Tensor:
    """All ones; in a pruned model one to three by image, as a schedule of ratio 0.8 leaves."""
    size = (shape.batch if shape.pruned else 1, shape.directions, shape.seqlen)
    gap = torch.ones(size, dtype=torch.int32, device=device)
    if shape.pruned:
        drawn = torch.rand(size, generator=make, device=device)
        gap += (drawn > 0.8).to(torch.int32) + (drawn > 0.95).to(torch.int32)
    return gap


def oracle(shape: ScanShape, given: dict[str, Tensor], images: list[int]) -> Tensor:
    """The float64 result (images, seqlen, d_inner) for some of the images."""
    picked = {}
    for name, value in given.items():
        by_image = name in _STREAMS or (name in {"order", "gap"} and value.shape[0] > 1)
        some = value[images] if by_image else value
        picked[name] = some if name in {"order", "gap"} else some.double()
    return reference.selective_scan(**picked, params_by_step=shape.params_by_step)
