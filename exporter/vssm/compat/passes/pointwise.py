"""Graph passes: what a scan's operator does itself moves into it, from in front and from behind.

Code that was written for a plain scan computes the bias and the softplus of its step sizes, and the
gate of its result, by operators of their own. In ONNX Runtime a softplus takes longer than a scan.
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
    is_tensor,
    rank,
    scan_arguments,
    scan_call,
    shape,
)
from vssm.ops import operators as ops
from vssm.ops.spec import GATED_SELECTIVE_SCAN, SELECTIVE_SCAN

# They move elements and compute none, so a function of each element may stand before or behind.
_MOVES: Final = (
    ATEN.permute.default,
    ATEN.reshape.default,
    ATEN.unflatten.int,
    ATEN.flatten.using_ints,
    ATEN.unsqueeze.default,
    ATEN.squeeze.dim,
    ATEN.expand.default,
    ATEN.flip.default,
    ATEN.select.int,
    ATEN.slice.Tensor,
    ATEN.split_with_sizes.default,
    ATEN.index.Tensor,
    ATEN.index_select.default,
    ATEN.gather.default,
    operator.getitem,
)
# From here on torch takes softplus(x) for x; the operator's own differs by less than 2.1e-9.
_THRESHOLD: Final = 20


def fold_softplus(r: Rewriter) -> None:
    """A softplus that only scans read, as their delta, is theirs."""
    for node in list(r.graph.nodes):
        if not is_call(node, ATEN.softplus.default):
            continue
        scans = _scans_behind(node)
        if scans and (why := _why_not(r, node, scans)):
            r.report.refuse(why)
        elif scans:
            node.replace_all_uses_with(node.args[0])
            for scan in scans:
                named = scan_arguments(scan) | {"delta_softplus": 1}
                r.replace(scan, scan_call(r, scan, scan.target, named))


def _scans_behind(node: Node) -> list[Node]:
    """The scans whose delta a value is and whatever moves it; none if something else reads it."""
    scans: dict[Node, None] = {}
    values = [node]
    while values:
        value = values.pop()
        for user in value.users:
            if is_call(user, *_MOVES):
                values.append(user)
            elif is_call(user, *SCANS) and _reads(user, value) == ["delta"]:
                scans[user] = None
            else:
                return []
    return list(scans)


def _reads(scan: Node, value: Node) -> list[str]:
    return [name for name, given in scan_arguments(scan).items() if given is value]


def _why_not(r: Rewriter, node: Node, scans: list[Node]) -> str | None:
    if argument(node, 1, "beta", 1) != 1 or argument(node, 2, "threshold", 20) < _THRESHOLD:
        return f"a softplus has another beta than 1, or a threshold below {_THRESHOLD}"
    for scan in scans:
        if scan_arguments(scan)["delta_softplus"] or not _has_no_bias(r, scan):
            return "a scan adds to the step sizes behind their softplus"
    return None


def _has_no_bias(r: Rewriter, scan: Node) -> bool:
    given = r.constants(scan_arguments(scan)["delta_bias"])
    return given is not None and not any(value.any() for value in given)


def fold_biases(r: Rewriter) -> None:
    """A bias that is added to what only a scan reads, as its delta, is the scan's."""
    for scan in list(r.graph.nodes):
        if not is_call(scan, *SCANS) or not _has_no_bias(r, scan):
            continue
        named = scan_arguments(scan)
        value = delta = named["delta"]
        if is_call(delta, ATEN.unsqueeze.default) and axis(delta, delta.args[1]) < 3:
            value = delta.args[0]  # an axis of one direction, in front of the channels
        bias = _bias(value)
        if bias is None or len(value.users) > 1 or len(delta.users) > 1:
            continue
        if bias.meta["val"].dtype != named["delta_bias"].meta["val"].dtype:
            continue
        value.replace_all_uses_with(_without_bias(r, value, bias))
        row = r.emit(scan, ATEN.unsqueeze.default, bias, 0)
        named = scan_arguments(scan) | {"delta_bias": row}
        r.replace(scan, scan_call(r, scan, scan.target, named))


def _bias(value: Any) -> Node | None:
    """What is added to each token of a value (batch, seqlen, d_inner), if one vector is."""
    if is_call(value, ATEN.linear.default) and rank(value) == 3:
        return argument(value, 2, "bias")  # type: ignore[no-any-return]
    if is_call(value, ATEN.add.Tensor) and argument(value, 2, "alpha", 1) == 1:
        x, y = value.args
        if is_tensor(x) and is_tensor(y) and (rank(x), rank(y)) == (3, 1):
            # Without a bias of a wider type the sum would be narrower.
            alike = shape(x)[2:] == shape(y) and x.meta["val"].dtype == value.meta["val"].dtype
            return y if alike else None
    return None


def _without_bias(r: Rewriter, value: Node, bias: Node) -> Node:
    if is_call(value, ATEN.add.Tensor):
        return value.args[0]  # type: ignore[return-value]
    return r.emit(value, ATEN.linear.default, *value.args[:2])


def fold_gates(r: Rewriter) -> None:
    """`y * silu(z)` of a scan's y that nothing else reads is one gated scan."""
    for node in list(r.graph.nodes):
        users = list(node.users)
        if not is_call(node, ops.torch_op(SELECTIVE_SCAN)) or len(users) != 1:
            continue
        product = users[0]
        if not is_call(product, ATEN.mul.Tensor):
            continue
        factors: Any = product.args
        z = _gated_by(factors[1] if factors[0] is node else factors[0])
        if z is None or shape(z) != shape(node) or z.meta["val"].dtype != node.meta["val"].dtype:
            continue
        named = scan_arguments(node) | {"z": z}
        r.replace(product, scan_call(r, product, ops.torch_op(GATED_SELECTIVE_SCAN), named))


def _gated_by(factor: Any) -> Node | None:
    """z, where a factor is silu(z)."""
    if is_call(factor, ATEN.silu.default):
        return factor.args[0]  # type: ignore[no-any-return]
    if is_call(factor, ATEN.mul.Tensor):
        for z, gate in (factor.args, factor.args[::-1]):
            if is_call(gate, ATEN.sigmoid.default) and gate.args[0] is z:
                return z  # type: ignore[no-any-return]
    return None
