"""Every exponent of one input of a scan at a time, and what float64 makes of it.

The rules by which a result in float32 is judged:

- A subnormal number may count as zero, as an input, as a result and in between.
- Where a number on the way is finite but within a factor of eight of the largest float, or beyond,
  an infinity or NaN may stand for the result; a finite result must still be the right one.
- delta + delta_bias is rounded to float32 before anything else.
- Everywhere else: NaN where float64 has NaN, the same infinity where it has one, and a number
  within the tolerance times the sum of the magnitudes of its terms.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vssm.ops.spec import OPERATORS

_LARGE = float(np.finfo(np.float32).max) / 8
_FLOOR = 2.0**-118  # what some 100 numbers below 2^-126 may add up to, times factors near 1
_EPS = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}
_INT = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
_MANTISSA_BITS = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
_EXPONENTS = {torch.float32: 256, torch.float16: 32, torch.bfloat16: 256}
BATCHED = {"B", "C"}  # have no channels: swept along the images
SEQLEN = 4
GAPS = (5, 2, 1, 3)  # that of the first step has no effect


@dataclass(frozen=True)
class Layout:
    """Sizes and attributes that choose one of a kernel's paths."""

    directions: int
    d_state: int
    shared: str = ""  # of u, delta, A, B, C, D: one direction for all
    params_by_step: int = 0
    delta_softplus: int = 1
    one_decay: bool = False  # for all states of a channel

    def axis(self, name: str) -> int:
        return 1 if name in self.shared.split() else self.directions

    @property
    def attributes(self) -> dict[str, int]:
        return {"params_by_step": self.params_by_step, "delta_softplus": self.delta_softplus}


LAYOUTS = (
    Layout(2, 16),
    Layout(1, 1),
    Layout(4, 3, shared="u delta A C D", params_by_step=1),
    Layout(2, 5, shared="u", delta_softplus=0),
    Layout(2, 9, shared="A", one_decay=True),
)


@dataclass(frozen=True)
class Sweep:
    """A call, the values in it, and its results in float64: of each, the bound on its terms."""

    inputs: dict[str, Tensor]
    values: Tensor  # of each channel, or each image
    along: int  # the axis of y that they lie along
    y: NDArray[np.float64]
    terms: NDArray[np.float64]
    beyond: NDArray[np.bool_]


def every_exponent(dtype: torch.dtype, *, few: bool = False) -> Tensor:
    """Both signs, every exponent, and of each the first, a middle and the last mantissa.

    So zeros, subnormal numbers, infinities and NaN are among them; and, closer together, numbers
    around the ends of exp, softplus and silu. `few`: middle mantissas, and the infinities.
    """
    bits = _MANTISSA_BITS[dtype]
    middle = (1 << bits) // 3
    mantissas = [middle] if few else [0, middle, (1 << bits) - 1]
    exponents = torch.arange(_EXPONENTS[dtype], dtype=torch.int64)
    found = (exponents[:, None] << bits) + torch.tensor(mantissas)
    found = torch.cat([found.flatten(), exponents[-1:] << bits])
    sign = 1 << (bits + (8 if dtype != torch.float16 else 5))
    both = torch.cat([found, found - sign])  # as a signed integer the sign bit is negative
    ends = torch.linspace(80, 110, 97)
    return torch.cat([both.to(_INT[dtype]).view(dtype), ends.to(dtype), -ends.to(dtype)])


@functools.lru_cache(maxsize=16)
def sweep(name: str, swept: str, layout: Layout, dtype: torch.dtype, *, few: bool = False) -> Sweep:
    """One call of a scan operator in which `swept` takes every exponent of its type."""
    values = every_exponent(dtype if swept in _typed(name) else torch.float32, few=few)
    batch, d_inner = (len(values), 3) if swept in BATCHED else (1, len(values))
    inputs = _ordinary(name, layout, batch, d_inner, dtype)
    if swept not in {"u", "D"}:
        inputs["D"].zero_()  # so that the results are as small as what is swept makes them
    target = inputs[swept]
    if swept in BATCHED:
        target[..., 0] = values[:, None, None]
    elif swept == "A":
        target[..., 0] = values
    else:
        target[...] = values
    y, terms, beyond = _scan(inputs, layout)
    return Sweep(inputs, values, 0 if swept in BATCHED else 2, y, terms, beyond)


def _typed(name: str) -> set[str]:
    return {o.name for o in OPERATORS[name].inputs if o.dtype == "T"}


def _ordinary(
    name: str, layout: Layout, batch: int, d_inner: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(0)
    symbols = {"batch": batch, "seqlen": SEQLEN, "d_inner": d_inner, "d_state": layout.d_state}
    symbols["1|d_state"] = 1 if layout.one_decay else layout.d_state
    found = {}
    for operand in OPERATORS[name].inputs:
        if operand.dtype == "int32":
            continue
        axis = {"Kd": "delta", "Ku": "u", "Ka": "A", "Kb": "B", "Kc": "C", "Ks": "D"}
        shape = [symbols[s] if s in symbols else layout.axis(axis[s]) for s in operand.shape]
        x = 0.5 + torch.rand(shape, generator=make)
        x = -x if operand.name == "A" else x
        found[operand.name] = x.to(dtype if operand.dtype == "T" else torch.float32)
    steps = torch.arange(SEQLEN, dtype=torch.int32)
    order = [steps, steps.flip(0), steps.roll(1), steps.roll(2)][: layout.directions]
    found["order"] = torch.stack(order)[None]
    gaps = torch.tensor(GAPS, dtype=torch.int32)
    # Agreeing gaps and others: directions that go on together share decays, or do not.
    found["gap"] = torch.stack([gaps, gaps, gaps.flip(0), gaps])[None, : layout.directions]
    return {o.name: found[o.name].contiguous() for o in OPERATORS[name].inputs}


def _scan(
    inputs: dict[str, Tensor], layout: Layout
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """The recurrence of selective_scan.h; beside it the sums of magnitudes."""
    x = {n: t.double().numpy() for n, t in inputs.items() if t.is_floating_point()}
    order, gap = inputs["order"][0].numpy(), inputs["gap"][0].numpy()
    batch, _, _, d_inner = x["u"].shape
    y = np.zeros((batch, SEQLEN, d_inner))
    terms, peak = np.zeros_like(y), np.zeros((batch, d_inner))
    with np.errstate(all="ignore"):
        for k in range(layout.directions):
            at = {n: k % layout.axis(n) for n in ("u", "delta", "A", "B", "C", "D")}
            h = np.zeros((batch, d_inner, layout.d_state))
            size = np.zeros_like(h)
            for t in range(SEQLEN):
                q = order[k, t]
                s = t if layout.params_by_step else q
                u, A = x["u"][:, q, at["u"]], x["A"][at["A"]]
                dt = x["delta"][:, s, at["delta"]] + x["delta_bias"][at["delta"]]
                dt = dt.astype(np.float32).astype(np.float64)
                dt = np.logaddexp(0, dt) if layout.delta_softplus else dt
                places = 1 if t == 0 else gap[k, t]
                span = dt * places
                if "delta0" in x:
                    span = dt + (places - 1) * x["delta0"][at["delta"]]
                argument = span[..., None] * A
                decay = np.exp(argument)
                inject = (dt * u)[..., None] * x["B"][:, s, at["B"], None]
                # The argument of a decay is rounded before it is raised, three times in all.
                lost = 1 + np.where(np.isfinite(argument), abs(argument) / 2, 0)
                h, size = decay * h + inject, decay * size * lost + abs(inject)
                c, skip = x["C"][:, s, at["C"], None], x["D"][at["D"]] * u
                y[:, q] += (h * c).sum(-1) + skip
                more = (size * abs(c)).sum(-1) + abs(skip)
                terms[:, q] += more
                grown = np.where(np.isfinite(argument), np.exp(np.minimum(argument, 99)), 0).max(-1)
                for part in (grown, size.max(-1), abs(dt), abs(span), abs(dt * u), more):
                    peak = np.fmax(peak, np.where(np.isfinite(part), part, 0))
        if "z" in x:
            gate = x["z"] * _sigmoid(x["z"])
            y, terms = y * gate, terms * abs(gate)
            peak = np.fmax(peak, np.where(np.isfinite(terms), terms, 0).max(1))
    return y, terms, np.broadcast_to((peak > _LARGE)[:, None], y.shape)


def _sigmoid(z: NDArray[np.float64]) -> NDArray[np.float64]:
    e = np.exp(-abs(z))
    return np.where(z < 0, e, 1) / (1 + e)


def errors(sweep: Sweep, got: Tensor) -> NDArray[np.float64]:
    """Of each result its error over the magnitudes of its terms; infinite where it breaks a rule.

    Half results may err by what their rounding costs a subnormal number, and are infinite beyond
    the largest number of their type, within a tolerance of which either is right.
    """
    y, found = sweep.y, got.double().numpy()
    most = float(torch.finfo(got.dtype).max)
    with np.errstate(all="ignore"):
        rounded = np.where(abs(y) > most * 1.01, np.sign(y) * np.inf, y)
        finite = np.isfinite(rounded)
        off = np.maximum(abs(found - rounded) - _FLOOR - _EPS[got.dtype], 0)
        relative = np.where(finite, np.where(off == 0, 0, off / sweep.terms), np.inf)
        same = (np.isnan(found) & np.isnan(rounded)) | (~finite & (found == rounded))
        near = (abs(y) > most * 0.99) & (abs(y) <= most * 1.01) & np.isinf(found)
        allowed = same | near | (sweep.beyond & ~np.isfinite(found))
    return np.where(allowed, 0, np.nan_to_num(relative, nan=np.inf))


def worst(sweep: Sweep, got: Tensor) -> tuple[float, str]:
    """The largest of `errors`, and where it is, in words."""
    found = errors(sweep, got)
    index = np.unravel_index(int(np.argmax(found)), found.shape)
    value = sweep.values[index[sweep.along]]
    text = f"at {float(value)!r}: {float(got[index])!r}, not {float(sweep.y[index])!r}"
    return float(found[index]), text
