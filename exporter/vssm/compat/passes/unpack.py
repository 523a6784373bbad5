"""Graph pass: what was packed into one tensor and taken out again is taken from where it was.

VMamba's and GroupMamba's functions want all walks in one tensor; the walks are stacked, viewed
otherwise and sliced apart. Views keep the order of the elements, so equal shapes mean equal values.
"""

from __future__ import annotations

from typing import Any, Final

from torch.fx import Node

from vssm.compat.passes.graph import ATEN, Rewriter, argument, axis, is_call, is_tensor, shape

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
