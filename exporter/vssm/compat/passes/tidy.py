"""Graph passes that bring nodes to one form: no copies, permute and split alone, nothing twice."""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch.fx import Node

from vssm.compat.passes.graph import ATEN, Rewriter, argument, axis, is_call, is_tensor, rank, shape
from vssm.compat.passes.layouts import UNARY

_COPIES: Final = (
    ATEN.contiguous.default,
    ATEN.clone.default,
    ATEN.alias.default,
    ATEN.detach.default,
    ATEN.lift_fresh_copy.default,
)
# What the tracer notes of types: it checks the trace, and no number depends on it.
_NOTES: Final = (ATEN._assert_tensor_metadata.default, torch.ops.aten.promote_types.default)
# Columns of a product from which on it is as fast as a part of a wider one.
_WIDE: Final = 64
_SHAPES: Final = (ATEN.reshape.default, ATEN.view.default, ATEN.expand.default)
_TRANSPOSES: Final = (
    *(ATEN.transpose.int, ATEN.t.default, ATEN.numpy_T.default, ATEN.mT.default),
    *(ATEN.swapaxes.default, ATEN.swapdims.default),
    *(ATEN.movedim.int, ATEN.movedim.intlist, ATEN.moveaxis.int, ATEN.moveaxis.intlist),
)
# Neither random nor written to: two equal calls of these are one value.
_PURE: Final = (
    ATEN.unsqueeze.default,
    ATEN.permute.default,
    ATEN.flip.default,
    ATEN.index.Tensor,
    ATEN.index_select.default,
    ATEN.select.int,
    ATEN.slice.Tensor,
    ATEN.exp.default,
    ATEN.neg.default,
    ATEN.to.dtype,
    ATEN.arange.default,
    ATEN.ones_like.default,
    ATEN.zeros.default,
    operator.getitem,
    ATEN.split_with_sizes.default,
)


def drop_copies(r: Rewriter) -> None:
    """Remove what changes nothing: copies, casts to the own type, full slices, inert dropout."""
    for node in list(r.graph.nodes):
        if is_call(node, *_NOTES) and not node.users:
            r.graph.erase_node(node)
        elif is_tensor(node) and (same := _unchanged(r, node)) is not None:
            r.replace(node, same)


def _unchanged(r: Rewriter, node: Node) -> Node | None:
    """The node that has this node's value, if that is plain to see."""
    first: Any = node.args[0] if node.args else None
    if not is_tensor(first):
        return None
    source: Node = first
    # `x + 0` and a cast look like nothing, but can still promote x.
    alike = node.meta["val"].dtype == source.meta["val"].dtype
    if is_call(node, *_COPIES):
        return source
    if is_call(node, ATEN.to.dtype, ATEN.to.dtype_layout, ATEN._to_copy.default) and alike:
        return source
    # Symbolic sizes are compared by name: a guess would make the batch a constant.
    if is_call(node, *_SHAPES) and shape(node) == shape(source):
        return source
    if is_call(node, ATEN.dropout.default) and not (node.args[1] and node.args[2]):
        return source
    if is_call(node, ATEN.slice.Tensor) and _is_full(node, source):
        return source
    if is_call(node, ATEN.add.Tensor) and node.args[1] == 0 and alike:
        return source
    if is_call(node, ATEN.select.int) and is_call(source, ATEN.unsqueeze.default):
        inner, inserted = source.args
        return inner if axis(source, node.args[1]) == axis(source, inserted) else None  # type: ignore[arg-type, return-value]
    return None


def _is_full(node: Node, source: Node) -> bool:
    start, end = argument(node, 2, "start"), argument(node, 3, "end")
    step = argument(node, 4, "step", 1)
    size = shape(source)[axis(source, argument(node, 1, "dim", 0))]
    # The tracer writes "to the end" as the largest integer.
    whole = end is None or (isinstance(end, int) and (end >= 1 << 62 or end == size))
    return start in {None, 0} and whole and step == 1


def one_form(r: Rewriter) -> None:
    """Write transpose and t as permute, chunk and split as split_with_sizes, view as reshape.

    And what reads pairs of numbers as they lie in memory, by the numbers: copies are gone.
    """
    for node in list(r.graph.nodes):
        if is_call(node, ATEN.rot90.default):
            r.replace(node, _turned(r, node))
        elif is_call(node, ATEN.view_as_complex.default):
            parts = [r.emit(node, ATEN.select.int, node.args[0], -1, i) for i in (0, 1)]
            r.replace(node, r.emit(node, ATEN.complex.default, *parts))
        elif is_call(node, *_TRANSPOSES):
            source: Any = node.args[0]
            target: Any = node.target
            # Each axis as long as its place: the result's shape is the order.
            order = target(torch.empty(*range(rank(source)), device="meta"), *node.args[1:])
            _say(r, node, ATEN.permute.default, source, list(order.shape))
        elif is_call(node, ATEN.view.default, ATEN._unsafe_view.default, ATEN.reshape.default):
            sizes = _inferred(node)
            # A view's operand may have lost its contiguous().
            if node.target is not ATEN.reshape.default or sizes != list(node.args[1]):
                _say(r, node, ATEN.reshape.default, node.args[0], sizes)
        elif is_call(node, ATEN.chunk.default, ATEN.split.Tensor, ATEN.split.sizes):
            source = node.args[0]
            dim = axis(source, argument(node, 2, "dim", 0))
            # From the result: `chunk` makes a smaller last part, or fewer parts than asked for.
            sizes = [part.shape[dim] for part in node.meta["val"]]
            if all(isinstance(size, int) for size in sizes):
                _say(r, node, ATEN.split_with_sizes.default, source, sizes, dim)


def _say(r: Rewriter, node: Node, target: Any, *args: Any) -> None:
    """Write a node as another call of the same value, whose shape need not be inferred again."""
    with r.graph.inserting_before(node):
        new = r.graph.call_function(target, args)
    new.meta = dict(node.meta)
    r.replace(node, new)


def _turned(r: Rewriter, node: Node) -> Node:
    """A quarter turn, or several, as a flip of an axis and an exchange of two."""
    source: Any = node.args[0]
    pair: Any = argument(node, 2, "dims", [0, 1])
    a, b = (axis(source, d) for d in pair)
    turns = argument(node, 1, "k", 1) % 4
    flips = ([], [b], [a, b], [a])[turns]
    found = r.emit(node, ATEN.flip.default, source, flips) if flips else source
    order = list(range(rank(source)))
    if turns % 2:
        order[a], order[b] = b, a
    return r.emit(node, ATEN.permute.default, found, order) if turns % 2 else found


def _inferred(node: Node) -> list[Any]:
    """The sizes of a reshape, the one that torch is to infer as its number.

    Beside a symbolic size, which exporters write as one to be inferred, it would be a second one.
    """
    sizes: Any = node.args[1]
    found = zip(sizes, node.meta["val"].shape, strict=True)
    return [
        n if isinstance(size, int) and size == -1 and isinstance(n, int) else size
        for size, n in found
    ]


def share(r: Rewriter) -> None:
    """Let equal nodes be one, so that equal operands are seen to be equal."""
    seen: dict[Any, Node] = {}
    for node in list(r.graph.nodes):
        key: Any = (node.target, _key(node.args), _key(tuple(sorted(node.kwargs.items()))))
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt):
            # One size, whichever tensor it was read of.
            key = str(node.meta["val"])
        elif not is_call(node, *_PURE):
            continue
        # The first in order stays, as it stands before every user of the others.
        known = seen.setdefault(key, node)
        if known is not node:
            r.replace(node, known)


def _key(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_key(v) for v in value)
    # 1, 1.0 and True are equal and hash alike, but are not the same argument.
    return value if isinstance(value, Node) else (type(value).__name__, str(value))


_VIEWS: Final = (
    ATEN.reshape.default,
    ATEN.flatten.using_ints,
    ATEN.unflatten.int,
    ATEN.unsqueeze.default,
    ATEN.squeeze.dim,
)


def unpack(r: Rewriter) -> None:
    """Slices and selections of packed parts become the parts, views of the own shape nothing."""
    for node in list(r.graph.nodes):
        if not is_tensor(node) or node.op != "call_function":
            continue
        part = _part(node)
        if part is not None and part is not node:
            r.replace(node, part)


def _part(node: Node) -> Node | None:
    if _is_view(node):
        whole = _origin(node)
        return whole if shape(whole) == shape(node) else None
    if is_call(node, ATEN.select.int, ATEN.slice.Tensor, ATEN.narrow.default):
        return _taken(node)
    return None


def _taken(node: Node) -> Node | None:
    """The part that node takes out of a pack along axis 1."""
    source: Any = node.args[0]
    # VMamba and GroupMamba pack walks behind the batch, along axis 1.
    if axis(source, argument(node, 1, "dim", 0)) != 1:
        return None
    start = argument(node, 2, "start", 0)
    whole = _origin(source)
    if is_call(node, ATEN.select.int):
        index, count = int(argument(node, 2, "index")), shape(source)[1]
    else:
        if is_call(node, ATEN.slice.Tensor) and argument(node, 4, "step", 1) != 1:
            return None
        width, total = shape(node)[1], shape(source)[1]
        # A slice across a border is of two parts.
        if not all(isinstance(n, int) for n in (width, total, start)) or start % width:
            return None
        index, count = start // width, total // width
    parts: Any = whole.args[0] if is_call(whole, ATEN.cat.default, ATEN.stack.default) else []
    packed = bool(parts) and argument(whole, 1, "dim", 0) == 1 and len(parts) == count
    return parts[index] if packed and all(shape(p) == shape(node) for p in parts) else None


def _origin(node: Node) -> Node:
    """Where the elements of a view are from."""
    while _is_view(node):
        source: Any = node.args[0]
        node = source
    return node


def _is_view(node: Node) -> bool:
    """Whether a node has its operand's elements in their order; the one of an axis of one, too."""
    if is_call(node, ATEN.select.int):
        source: Any = node.args[0]
        return bool(shape(source)[axis(source, int(argument(node, 1, "dim")))] == 1)
    return is_call(node, *_VIEWS)


# mamba_ssm's projections are written so, to come out channels first for its CUDA kernels; the
# batch, folded into the sequence, would keep the scans' layouts from meeting.
def unfold_projections(r: Rewriter) -> None:
    """Products over (batch * seqlen, width) become linear layers over (batch, seqlen, width).

    So does permute(reshape(weight @ reshape(permute(x)))). Each token is multiplied by itself:
    whether the axes in front of it are folded changes nothing.
    """
    for node in list(r.graph.nodes):
        if node.op == "call_function" and (new := _unfolded(r, node)) is not None:
            r.replace(node, new)
    for node in list(r.graph.nodes):
        if not is_call(node, ATEN.permute.default) or _plan(node) != (1, 0, 2):
            continue
        found = _source(node.args[0])
        if found is None:
            continue
        weight, x = found
        y = r.emit(node, ATEN.linear.default, x, weight)
        r.replace(node, r.emit(node, ATEN.permute.default, y, [0, 2, 1]))


def split_projections(r: Rewriter) -> None:
    """Wide parts of `linear(x)` along its last axis as a projection each, which nothing copies."""
    for node in list(r.graph.nodes):
        product: Any = node.args[0] if is_call(node, ATEN.split_with_sizes.default) else None
        if not is_call(product, ATEN.linear.default) or len(product.users) > 1:
            continue
        sizes: Any = node.args[1]
        last = axis(product, argument(node, 2, "dim", 0)) == rank(product) - 1
        if not last or not all(isinstance(size, int) and size >= _WIDE for size in sizes):
            continue
        x, weight, bias = (*product.args, None)[:3]
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        for part in list(node.users):
            start, size = starts[part.args[1]], sizes[part.args[1]]
            rows = [
                r.emit(product, ATEN.slice.Tensor, whole, 0, start, start + size)
                for whole in (weight, bias)
                if whole is not None
            ]
            r.replace(part, r.emit(product, ATEN.linear.default, x, *rows))


def _unfolded(r: Rewriter, node: Node) -> Node | None:
    """What a node that reads a folded value is, the fold behind it or gone; else None."""
    if is_call(node, operator.getitem):
        return _part_of_folded(r, node)
    if is_call(node, ATEN.matmul.default, ATEN.mm.default):
        weight, turned = node.args
        x = _inside(turned.args[0]) if _is_t(turned) else None  # type: ignore[union-attr]
        if x is None or not is_tensor(weight) or rank(weight) != 2:  # type: ignore[arg-type]
            return None
        y = r.emit(node, ATEN.linear.default, x, weight)
        return r.emit(node, ATEN.permute.default, _fold(r, node, y), [1, 0])
    source: Any = node.args[0] if node.args else None
    if is_call(node, ATEN.reshape.default) and _is_t(source):
        x = _inside(source.args[0])
        apart = x is not None and shape(node) == (shape(x)[2], *shape(x)[:2])
        return r.emit(node, ATEN.permute.default, x, [2, 0, 1]) if apart else None
    x = _inside(source)
    if x is None:
        return None
    if is_call(node, ATEN.linear.default, *UNARY):
        return _fold(r, node, r.emit(node, node.target, x, *node.args[1:], **node.kwargs))
    return x if is_call(node, ATEN.reshape.default) and shape(node) == shape(x) else None


def _part_of_folded(r: Rewriter, node: Node) -> Node | None:
    split: Any = node.args[0]
    if not is_call(split, ATEN.split_with_sizes.default):
        return None
    x = _inside(split.args[0])
    if x is None or axis(split.args[0], argument(split, 2, "dim", 0)) != 1:
        return None
    inner = split.meta.get("unfolded")  # all parts share the new split
    if inner is None:
        inner = r.emit(split, ATEN.split_with_sizes.default, x, split.args[1], 2)
        split.meta["unfolded"] = inner
    return _fold(r, node, r.emit(node, operator.getitem, inner, node.args[1]))


def _inside(node: Any) -> Node | None:
    """The value (batch, seqlen, width) that a node folds to (batch * seqlen, width)."""
    if not is_call(node, ATEN.reshape.default) or rank(node) != 2:
        return None
    source: Any = node.args[0]
    width = shape(node)[1]
    folds = isinstance(width, int) and rank(source) == 3 and shape(source)[2] == width
    return source if folds else None


def _fold(r: Rewriter, before: Node, x: Node) -> Node:
    return r.emit(before, ATEN.reshape.default, x, [-1, shape(x)[2]])


def _is_t(node: Any) -> bool:
    return is_call(node, ATEN.permute.default) and _plan(node) == (1, 0)


def _source(apart: Any) -> tuple[Node, Node] | None:
    """(weight, x) of reshape(weight @ reshape(permute(x, (2, 0, 1))))."""
    if not is_call(apart, ATEN.reshape.default, ATEN.view.default):
        return None
    product = apart.args[0]
    if not is_call(product, ATEN.matmul.default, ATEN.mm.default):
        return None
    weight, folded = product.args
    if not is_tensor(weight) or rank(weight) != 2:
        return None
    if not is_call(folded, ATEN.reshape.default, ATEN.view.default) or rank(folded) != 2:
        return None
    turned = folded.args[0]
    if not is_call(turned, ATEN.permute.default) or _plan(turned) != (2, 0, 1):
        return None
    x = turned.args[0]
    batch, seqlen, width = shape(x)
    fits = shape(folded)[0] == width and shape(apart) == (shape(weight)[0], batch, seqlen)
    return (weight, x) if fits else None


def _plan(node: Node) -> tuple[int, ...]:
    source: Any = node.args[0]
    return tuple(axis(source, d) for d in node.args[1])  # type: ignore[union-attr, arg-type]
