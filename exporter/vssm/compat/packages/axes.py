"""einops' rearrange and repeat, for where it is not installed: names, groups, 1 and `...`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Axis = list[str]  # the names that one axis is made of; none: an axis of size 1
_REST = "..."


def rearrange(tensor: Tensor, pattern: str, **sizes: int) -> Tensor:
    """Reorder, split and merge axes, as in "b d l -> b l d" or "d (b l) -> b d l".

    Raises:
        ValueError: the two sides do not name the same axes, or the sizes do not fit.
    """
    left, right = _sides(pattern, tensor.dim())
    before = [name for axis in left for name in axis]
    after = [name for axis in right for name in axis]
    if sorted(before) != sorted(after):
        raise ValueError(f"pattern={pattern!r} names other axes left than right; use repeat")
    known = _sizes(tensor, left, pattern, sizes)
    apart = tensor.reshape([known[name] for name in before])
    return _join(apart.permute([before.index(name) for name in after]), right, known)


def repeat(tensor: Tensor, pattern: str, **sizes: int) -> Tensor:
    """`rearrange` in which new axes on the right are repetitions, as in "n -> d n".

    Raises:
        ValueError: a new axis has no size, or an axis of the left is missing on the right.
    """
    left, right = _sides(pattern, tensor.dim())
    before = [name for axis in left for name in axis]
    after = [name for axis in right for name in axis]
    new = [name for name in after if name not in before]
    if missing := [n for n in before if n not in after] + [n for n in new if n not in sizes]:
        raise ValueError(f"pattern={pattern!r}: axes {missing} have no place or size; give them")
    known = {**_sizes(tensor, left, pattern, sizes), **{name: sizes[name] for name in new}}
    apart = tensor.reshape([known[name] for name in before])
    apart = apart.permute([before.index(name) for name in after if name in before])
    for place, name in enumerate(after):
        if name in new:
            apart = apart.unsqueeze(place)
    return _join(apart.expand([known[name] for name in after]), right, known)


def einsum(*arguments: Any) -> Tensor:
    """Einsum over named axes, the pattern last, as in "b l d, d n -> b l d n".

    Raises:
        ValueError: a side has groups, or the result names an axis that no operand has.
    """
    *tensors, pattern = arguments
    inputs, _, output = pattern.partition("->")
    terms = [term.split() for term in inputs.split(",")]
    wanted = output.split()
    names = sorted({name for term in terms for name in term})
    if "(" in pattern or _REST in pattern or set(wanted) - set(names) or len(names) > 26:
        raise ValueError(f"pattern={pattern!r} is not names alone on both sides; install einops")
    letter = {name: chr(ord("a") + i) for i, name in enumerate(names)}
    joined = ["".join(letter[name] for name in term) for term in [*terms, wanted]]
    return torch.einsum(f"{','.join(joined[:-1])}->{joined[-1]}", *tensors)


def _sides(pattern: str, rank: int) -> tuple[list[Axis], list[Axis]]:
    left, arrow, right = pattern.partition("->")
    if not arrow:
        raise ValueError(f"pattern={pattern!r} has no ->; write for example 'b d l -> b l d'")
    sides = [_parse(side, pattern) for side in (left, right)]
    rest = rank - sum(axis != [_REST] for axis in sides[0])
    names = [f".{i}" for i in range(rest)]
    if rest < 0 or (rest > 0 and [_REST] not in sides[0]):
        raise ValueError(f"pattern={pattern!r} does not fit a tensor of {rank} axes")
    first, second = ([a for axis in s for a in _spread(axis, names)] for s in sides)
    return first, second


def _spread(axis: Axis, rest: list[str]) -> list[Axis]:
    return [[name] for name in rest] if axis == [_REST] else [axis]


def _parse(side: str, pattern: str) -> list[Axis]:
    axes: list[Axis] = []
    group: Axis | None = None
    for token in side.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            group = []
        elif token == ")" and group is not None:
            axes.append(group)
            group = None
        elif group is not None:
            group.append(token)
        else:
            axes.append([] if token == "1" else [token])
    if group is not None or ")" in (name for axis in axes for name in axis):
        raise ValueError(f"pattern={pattern!r} has a bracket without its other one")
    return axes


def _sizes(tensor: Tensor, left: list[Axis], pattern: str, sizes: dict[str, int]) -> dict[str, Any]:
    """The size of every name on the left; at most one of an axis may be left out."""
    known: dict[str, Any] = dict(sizes)
    for axis, size in zip(left, tensor.shape, strict=True):
        product = 1
        for name in axis:
            product = product * known.get(name, 1)
        unknown = [name for name in axis if name not in known]
        if len(unknown) > 1:
            raise ValueError(f"pattern={pattern!r}: give all but one size of {axis}")
        if unknown:
            known[unknown[0]] = size // product
        elif isinstance(size, int) and isinstance(product, int) and product != size:
            raise ValueError(f"pattern={pattern!r}: axis {axis} is {product}, the tensor's {size}")
    return known


def _join(x: Tensor, right: list[Axis], known: dict[str, Any]) -> Tensor:
    shape = []
    for axis in right:
        product = 1
        for name in axis:
            product = product * known[name]
        shape.append(product)
    return x.reshape(shape)
