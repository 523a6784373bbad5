"""Graph pass: upstream's channel-first projection becomes a linear layer over tokens.

Mamba's modules compute weight @ x with the batch folded into the sequence: permute, reshape,
matmul, reshape, permute. The same numbers come from a linear layer, transposed.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from vssm.compat.passes.graph import ATEN, Rewriter, axis, is_call, is_tensor, rank, shape


def unfold_projections(r: Rewriter) -> None:
    """permute(reshape(weight @ reshape(permute(x)))) over (batch, seqlen, width) as linear(x)."""
    for node in list(r.graph.nodes):
        if not is_call(node, ATEN.permute.default) or _plan(node) != (1, 0, 2):
            continue
        found = _source(node.args[0])
        if found is None:
            continue
        weight, x = found
        y = r.emit(node, ATEN.linear.default, x, weight)
        r.replace(node, r.emit(node, ATEN.permute.default, y, [0, 2, 1]))


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
