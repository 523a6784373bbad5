"""Graph pass: permutes and flips move behind the operators they pass through, until they cancel.

A value permuted and then multiplied is the product, permuted: the layout operator moves on. Two
that meet become one, or none. A scan whose operands are all flipped along the sequence is a scan
in the other order, its result flipped.
"""

from __future__ import annotations

import operator
from typing import Any, Final

from torch.fx import Node

from vssm.compat.passes.graph import (
    ATEN,
    SCANS,
    Rewriter,
    argument,
    axis,
    is_call,
    is_integer,
    is_tensor,
    rank,
    scan_arguments,
    scan_call,
    shape,
)

_FLIP, _PERMUTE = ATEN.flip.default, ATEN.permute.default
UNARY: Final = (
    ATEN.silu.default,
    ATEN.relu.default,
    ATEN.gelu.default,
    ATEN.sigmoid.default,
    ATEN.softplus.default,
    ATEN.exp.default,
    ATEN.neg.default,
    ATEN.square.default,
    ATEN.sqrt.default,
    ATEN.to.dtype,
)
BINARY: Final = (ATEN.add.Tensor, ATEN.sub.Tensor, ATEN.mul.Tensor, ATEN.div.Tensor)
_STREAMS: Final = ("u", "delta", "B", "C", "z")


def move_layouts(r: Rewriter) -> None:
    """Move every permute and flip as far down as its rules allow; run to a standstill."""
    before = -1
    # It ends, as each step takes a layout behind one more node and never back.
    while r.report.applied != before:
        before = r.report.applied
        for node in list(r.graph.nodes):
            if node.op == "call_function" and (new := _moved(r, node)) is not None:
                r.replace(node, new)


def _moved(r: Rewriter, node: Node) -> Node | None:
    """This node with the layout operator of its operands behind it, or None."""
    if node.target in SCANS:
        return _scan(r, node)
    if node.target in BINARY:
        return _binary(r, node)
    source: Any = node.args[0] if node.args else None
    # Of `weight @ x` the second operand has the layout, unlike all below.
    if is_call(node, ATEN.matmul.default) and is_call(node.args[1], _FLIP, _PERMUTE):
        return _matmul(r, node)
    if is_call(node, operator.getitem) and is_call(source, ATEN.split_with_sizes.default):
        return _split(r, node, source)
    if not is_call(source, _FLIP, _PERMUTE):
        return None
    if node.target in UNARY:
        inner = r.emit(node, node.target, source.args[0], *node.args[1:], **node.kwargs)
        return r.emit(node, source.target, inner, *source.args[1:])
    if is_call(source, _PERMUTE):
        return _behind_permute(r, node, source)
    return _behind_flip(r, node, source)


def _binary(r: Rewriter, node: Node) -> Node | None:
    """Both operands under the same layout, or one of them and a number."""
    operands: Any = node.args[:2]
    layouts = [x for x in operands if is_call(x, _FLIP, _PERMUTE)]
    if not layouts:
        return None
    first: Any = layouts[0]
    if rank(first) != rank(node):  # broadcast: its axes are others in the result
        return None
    inner = []
    for x in operands:
        alike = is_call(x, first.target) and rank(x) == rank(node)
        if alike and _plan(x) == _plan(first):
            inner.append(x.args[0])
        elif not isinstance(x, Node) or _untouched(x, first):
            inner.append(x)
        else:
            return None
    new = r.emit(node, node.target, *inner, **node.kwargs)
    return r.emit(node, first.target, new, *first.args[1:])


def _untouched(x: Node, layout: Node) -> bool:
    """Whether x broadcasts over every axis that the flip turns."""
    if not is_tensor(x) or is_call(layout, _PERMUTE):
        return is_tensor(x) and rank(x) == 0
    missing = rank(layout) - rank(x)
    return all(d < missing or shape(x)[d - missing] == 1 for d in _plan(layout))


def _plan(layout: Node) -> tuple[int, ...]:
    """What a permute or flip does, axes counted from the front."""
    source: Any = layout.args[0]
    return tuple(axis(source, d) for d in layout.args[1])  # type: ignore[union-attr, arg-type]


def _matmul(r: Rewriter, node: Node) -> Node | None:
    """A weight @ x with x (batch, width, seqlen) flipped along the sequence, or transposed."""
    weight, x = node.args
    if not is_tensor(weight) or rank(weight) != 2 or rank(x) != 3:  # type: ignore[arg-type]
        return None
    source: Any = x.args[0]  # type: ignore[union-attr]
    if is_call(x, _PERMUTE):
        if _plan(x) != (0, 2, 1):  # type: ignore[arg-type]
            return None
        inner = r.emit(node, ATEN.linear.default, source, weight)
        return r.emit(node, _PERMUTE, inner, [0, 2, 1])
    # A flip of the width would pair the weight's columns with other channels.
    if 1 in _plan(x):  # type: ignore[arg-type]
        return None
    inner = r.emit(node, ATEN.matmul.default, weight, source)
    return r.emit(node, _FLIP, inner, list(_plan(x)))  # type: ignore[arg-type]


def _split(r: Rewriter, node: Node, split: Node) -> Node | None:
    """A part of a split of a layout: the layout of a part of a split."""
    layout: Any = split.args[0]
    if not is_call(layout, _FLIP, _PERMUTE):
        return None
    plan, dim = _plan(layout), axis(layout, argument(split, 2, "dim", 0))
    # Parts of a flipped axis come in the other order too.
    if is_call(layout, _FLIP) and dim in plan:
        return None
    # The parts are of one axis of the source, wherever the permute puts it.
    inner_dim = plan[dim] if is_call(layout, _PERMUTE) else dim
    inner = split.meta.get("inside")  # all parts share the new split
    if inner is None:
        target = ATEN.split_with_sizes.default
        inner = r.emit(split, target, layout.args[0], split.args[1], inner_dim)
        split.meta["inside"] = inner
    part = r.emit(node, operator.getitem, inner, node.args[1])
    return r.emit(node, layout.target, part, list(plan))


def _behind_permute(r: Rewriter, node: Node, permute: Node) -> Node | None:
    source: Any = permute.args[0]
    plan = _plan(permute)
    if is_call(node, _PERMUTE):
        whole = [plan[d] for d in _plan(node)]
        return source if whole == sorted(whole) else r.emit(node, _PERMUTE, source, whole)
    if is_call(node, ATEN.slice.Tensor):
        dim = plan[axis(permute, argument(node, 1, "dim", 0))]
        inner = r.emit(node, ATEN.slice.Tensor, source, dim, *node.args[2:])
        return r.emit(node, _PERMUTE, inner, list(plan))
    # The last axis is the one multiplied, so it has to be last in the source as well.
    if is_call(node, ATEN.linear.default) and plan[-1] == len(plan) - 1:
        inner = r.emit(node, ATEN.linear.default, source, *node.args[1:])
        return r.emit(node, _PERMUTE, inner, list(plan))
    table = gather_table(node)
    # A table with more axes would give the result more, and the plan no longer fits.
    if table is not None and rank(table[1]) == 1:
        inner = r.emit(node, ATEN.index_select.default, source, plan[table[0]], table[1])
        return r.emit(node, _PERMUTE, inner, list(plan))
    return None


def gather_table(node: Node) -> tuple[int, Node] | None:
    """(axis, table) of a gather along one axis by one table; None for any other node."""
    if is_call(node, ATEN.index_select.default):
        return axis(node, node.args[1]), node.args[2]  # type: ignore[arg-type, return-value]
    if is_call(node, ATEN.index.Tensor):
        tables: Any = node.args[1]
        places = [place for place, table in enumerate(tables) if table is not None]
        if len(places) == 1 and is_integer(tables[places[0]]):
            return places[0], tables[places[0]]
    return None


def _behind_flip(r: Rewriter, node: Node, flip: Node) -> Node | None:
    source: Any = flip.args[0]
    dims = _plan(flip)
    if is_call(node, _FLIP):
        # An axis flipped twice is as it was.
        left = sorted(set(dims) ^ set(_plan(node)))
        return r.emit(node, _FLIP, source, left) if left else source
    if is_call(node, _PERMUTE):
        plan = _plan(node)
        inner = r.emit(node, _PERMUTE, source, list(plan))
        return r.emit(node, _FLIP, inner, sorted(plan.index(d) for d in dims))
    if is_call(node, ATEN.slice.Tensor, ATEN.select.int, ATEN.unsqueeze.default, ATEN.squeeze.dim):
        return _axis_operator(r, node, flip)
    if is_call(node, ATEN.pad.default, ATEN.constant_pad_nd.default):
        return _pad(r, node, flip)
    if is_call(node, ATEN.conv1d.default, ATEN.conv2d.default):
        return _convolution(r, node, flip)
    if is_call(node, ATEN.linear.default) and rank(flip) - 1 not in dims:
        inner = r.emit(node, ATEN.linear.default, source, *node.args[1:])
        return r.emit(node, _FLIP, inner, list(dims))
    return None


def _axis_operator(r: Rewriter, node: Node, flip: Node) -> Node | None:
    """An operator on one axis that is not flipped; the others may move by one."""
    source: Any = flip.args[0]
    added = is_call(node, ATEN.unsqueeze.default)
    given = int(argument(node, 1, "dim", 0))
    dim = given % (rank(flip) + added)
    dims = _plan(flip)
    if not added and dim in dims:
        return _cut(r, node, flip, dim) if is_call(node, ATEN.slice.Tensor) else None
    if is_call(node, ATEN.squeeze.dim) and rank(node) == rank(flip):
        return None  # of an axis that is not 1: nothing is squeezed
    inner = r.emit(node, node.target, source, dim, *node.args[2:])
    if added:
        dims = tuple(d + (d >= dim) for d in dims)
    elif not is_call(node, ATEN.slice.Tensor):
        dims = tuple(d - (d > dim) for d in dims)
    return r.emit(node, _FLIP, inner, list(dims))


def _cut(r: Rewriter, node: Node, flip: Node, dim: int) -> Node | None:
    """A slice of a flipped axis: the slice as far from the other end, flipped."""
    size, width = shape(flip)[dim], shape(node)[dim]
    start = argument(node, 2, "start") or 0
    # A negative start counts from the end, a step from the start.
    fixed = all(isinstance(n, int) for n in (size, width, start))
    if not fixed or start < 0 or argument(node, 4, "step", 1) != 1:
        return None
    end = size - start
    inner = r.emit(node, ATEN.slice.Tensor, flip.args[0], dim, end - width, end)
    return r.emit(node, _FLIP, inner, list(_plan(flip)))


def _pad(r: Rewriter, node: Node, flip: Node) -> Node | None:
    """Padding in front of a flipped axis is padding behind it."""
    source: Any = flip.args[0]
    if is_call(node, ATEN.pad.default) and argument(node, 2, "mode", "constant") != "constant":
        return None
    pads: Any = list(node.args[1])  # type: ignore[arg-type]
    for d in _plan(flip):
        # torch lists pads in pairs, from the last axis on.
        place = 2 * (rank(flip) - 1 - d)
        if place < len(pads):
            pads[place], pads[place + 1] = pads[place + 1], pads[place]
    inner = r.emit(node, node.target, source, pads, *node.args[2:], **node.kwargs)
    return r.emit(node, _FLIP, inner, list(_plan(flip)))


def _convolution(r: Rewriter, node: Node, flip: Node) -> Node | None:
    """A convolution over a flipped axis: with its weight flipped, over the axis as it was."""
    source: Any = flip.args[0]
    weight: Any = node.args[1]
    if rank(weight) != rank(flip):  # without a batch axis
        return None
    dims, strides = _plan(flip), argument(node, 3, "stride", [1])
    strides = list(strides) if isinstance(strides, list | tuple) else [strides]
    strides = strides * (rank(flip) - 2) if len(strides) == 1 else strides
    # A stride counts from one end: flipped, it would visit other places. The convolution's own
    # padding is alike on both sides (`padding="same"` is another operator).
    if any(d < 2 or strides[d - 2] != 1 for d in dims):
        return None
    turned = r.emit(node, _FLIP, weight, list(dims))
    inner = r.emit(node, node.target, source, turned, *node.args[2:], **node.kwargs)
    return r.emit(node, _FLIP, inner, list(dims))


def _scan(r: Rewriter, node: Node) -> Node | None:
    """All streams flipped along the sequence: steps go the other way, the result is flipped."""
    named = scan_arguments(node)
    streams = [name for name in _STREAMS if name in named]
    flipped = [n for n in streams if is_call(named[n], _FLIP) and _plan(named[n]) == (1,)]
    # With directions outside of tokens, axis 1 is the directions'.
    if not flipped or named["direction_axis"] == 1:
        return None
    # A stream that is not flipped would meet other tokens.
    if len(flipped) < len(streams) or named["params_by_step"]:
        others = ", ".join(n for n in streams if n not in flipped)
        r.report.refuse(f"a scan with flipped {', '.join(flipped)}, but not {others}")
        return None
    last: Any = named["u"].meta["val"].shape[1]
    if isinstance(last, int):
        last -= 1
    else:
        last = r.emit(node, operator.sub, r.emit(node, ATEN.sym_size.int, named["u"], 1), 1)
    for name in streams:
        named[name] = named[name].args[0]
    # Token t of the flipped streams is token seqlen - 1 - t of the streams.
    named["order"] = r.emit(node, ATEN.rsub.Scalar, named["order"], last)
    inner = scan_call(r, node, node.target, named)
    return r.emit(node, _FLIP, inner, [1])
