"""Graph passes on scan nodes: index tables become `order`, sums of scans one node, factors `scale`.

Each changes a graph only where the new node is provably the same function; its docstring says why.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Node

from vssm.compat.passes.graph import (
    ATEN,
    SCANS,
    Rewriter,
    argument,
    axis,
    is_call,
    is_tensor,
    number,
    rank,
    scan_arguments,
    scan_call,
    shape,
)
from vssm.compat.passes.layouts import UNARY, gather_table

_CONVOLUTIONS: Final = (ATEN.conv1d.default, ATEN.conv2d.default)
_SPLIT: Final = ATEN.split_with_sizes.default


class Stacker:
    """Builds stacks in front of one node, each but once."""

    def __init__(self, rewriter: Rewriter, before: Node) -> None:
        self._r, self._before = rewriter, before
        self._known: dict[tuple[Node, ...], Node] = {}

    def stack(self, nodes: tuple[Node, ...]) -> Node:
        """Values (batch, ...) as one (batch, K, ...)."""
        if nodes not in self._known:
            # Cheapest first: a view of what lies together already, one operator over stacked
            # operands, and a copy of each branch.
            self._known[nodes] = self._together(nodes) or self._alike(nodes) or self._plain(nodes)
        return self._known[nodes]

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self._r.emit(self._before, target, *args, **kwargs)

    def _plain(self, nodes: tuple[Node, ...]) -> Node:
        """By concatenation; channels behind the batch are concatenated and split again."""
        if all(is_call(n, *_CONVOLUTIONS) and shape(n) == shape(nodes[0]) for n in nodes):
            joined = self._emit(ATEN.cat.default, list(nodes), 1)
            return self._emit(ATEN.unflatten.int, joined, 1, [len(nodes), shape(nodes[0])[1]])
        apart = [self._emit(ATEN.unsqueeze.default, n, 1) for n in nodes]
        return self._emit(ATEN.cat.default, apart, 1)

    def _together(self, nodes: tuple[Node, ...]) -> Node | None:
        """Parts that are all of one tensor, in order: that tensor, viewed."""
        first, count = nodes[0], len(nodes)
        source: Any = first.args[0] if first.args else None
        if first.target not in {ATEN.select.int, ATEN.slice.Tensor, ATEN.narrow.default}:
            return None
        if any(n.target is not first.target or n.args[:2] != (source, 1) for n in nodes):
            return None
        # Every second channel is no block of channels, though count and starts may fit.
        if any(shape(n) != shape(first) or argument(n, 4, "step", 1) != 1 for n in nodes):
            return None
        starts: Any = [argument(n, 2, "start") or 0 for n in nodes]
        if not all(isinstance(start, int) for start in starts):
            return None
        total = shape(source)[1]
        if first.target is ATEN.select.int:
            return source if starts == list(range(total)) and count == total else None
        width = shape(first)[1]
        if total != count * width or starts != list(range(0, total, width)):
            return None
        return self._emit(ATEN.unflatten.int, source, 1, [count, width])

    def _alike(self, nodes: tuple[Node, ...]) -> Node | None:
        first = nodes[0]
        if any(n.op != "call_function" or n.target != first.target for n in nodes):
            return None
        if not all(is_tensor(n) and shape(n) == shape(first) for n in nodes):
            return None
        sources: Any = tuple(n.args[0] for n in nodes)
        rest = [n.args[1:] for n in nodes]
        same = all(r == rest[0] for r in rest) and all(n.kwargs == first.kwargs for n in nodes)
        if first.target is ATEN.matmul.default:
            return self._matmul(nodes)
        if first.target is ATEN.linear.default:
            return self._linear(nodes)
        if not same:
            return None
        if first.target in UNARY:
            return self._emit(first.target, self.stack(sources), *rest[0], **first.kwargs)
        if first.target is operator.getitem:
            return self._part(sources, int(rest[0][0]))  # type: ignore[arg-type]
        return self._axes(first, sources)

    def _part(self, splits: tuple[Node, ...], place: int) -> Node | None:
        if not all(is_call(s, _SPLIT) and s.args[1:] == splits[0].args[1:] for s in splits):
            return None
        dim = axis(splits[0].args[0], argument(splits[0], 2, "dim", 0))  # type: ignore[arg-type]
        # The batch stays in front: the stack goes behind it.
        if dim == 0:
            return None
        if splits not in self._known:
            whole = self.stack(tuple(s.args[0] for s in splits))  # type: ignore[misc]
            self._known[splits] = self._emit(_SPLIT, whole, splits[0].args[1], dim + 1)
        return self._emit(operator.getitem, self._known[splits], place)

    def _axes(self, first: Node, sources: tuple[Node, ...]) -> Node | None:
        """Operators on axes behind the batch: every axis is one further back."""
        source = sources[0]
        if first.target is ATEN.permute.default:
            plan = [axis(source, d) for d in first.args[1]]  # type: ignore[union-attr, arg-type]
            if plan[0] != 0:
                return None
            return self._emit(first.target, self.stack(sources), [0, 1, *(d + 1 for d in plan[1:])])
        if first.target in {ATEN.unsqueeze.default, ATEN.squeeze.dim}:
            added = first.target is ATEN.unsqueeze.default
            dim = int(first.args[1]) % (rank(source) + added)  # type: ignore[arg-type]
            if dim == 0:
                return None
            return self._emit(first.target, self.stack(sources), dim + 1)
        return None

    def _matmul(self, nodes: tuple[Node, ...]) -> Node | None:
        """The weight @ x of every branch: (K, out, in) @ (batch, K, in, seqlen)."""
        weights: Any = tuple(n.args[0] for n in nodes)
        streams: Any = tuple(n.args[1] for n in nodes)
        if any(rank(w) != 2 for w in weights) or any(rank(x) != 3 for x in streams):
            return None
        if any(shape(w) != shape(weights[0]) for w in weights):
            return None
        return self._emit(ATEN.matmul.default, self._weights(weights), self.stack(streams))

    def _linear(self, nodes: tuple[Node, ...]) -> Node | None:
        """The x weight^T + bias of every branch."""
        streams: Any = tuple(n.args[0] for n in nodes)
        weights: Any = tuple(n.args[1] for n in nodes)
        biases: Any = tuple(argument(n, 2, "bias") for n in nodes)
        if any(rank(x) != 3 for x in streams) or len({b is None for b in biases}) > 1:
            return None
        if any(shape(w) != shape(weights[0]) for w in weights):
            return None
        # A linear layer has one weight; those of K branches are a batched product.
        stacked = self._emit(ATEN.permute.default, self._weights(weights), [0, 2, 1])
        y = self._emit(ATEN.matmul.default, self.stack(streams), stacked)
        if biases[0] is None:
            return y
        rows = self._emit(ATEN.unsqueeze.default, self._weights(biases), 1)
        return self._emit(ATEN.add.Tensor, y, rows)

    def _weights(self, nodes: tuple[Node, ...]) -> Node:
        return self._emit(ATEN.stack.default, list(nodes), 0)


_STREAMS: Final = ("u", "delta", "B", "C")
_TABLES: Final = ("order", "gap")


def absorb_orders(r: Rewriter) -> None:
    """Gathers around a scan become its order.

    A scan of u[o] in sequence, read back at the inverse of o, is a scan of u in order o whose
    result is in token order. Step t has delta, B and C of row t: with those gathered alike, that is
    token o[t] (params_by_step 0); with none of them gathered, the row t itself (1).
    """
    for node in list(r.graph.nodes):
        if node.target not in SCANS:
            continue
        named = scan_arguments(node)
        tables = {name: _gathered(r, named[name]) for name in _STREAMS}
        table = tables["u"]
        if table is None:
            continue
        why = _why_not_absorbed(r, node, named, tables)
        if why:
            r.report.refuse(why)
            continue
        by_step = tables["delta"] is None
        # Rows of delta, B and C either follow their tokens back, or stay one a step.
        named["u"] = table[0]
        for name in () if by_step else ("delta", "B", "C"):
            named[name] = tables[name][0]  # type: ignore[index]
        order = r.emit(node, ATEN.to.dtype, table[1], torch.int32)
        order = r.emit(node, ATEN.unsqueeze.default, order, 0)
        named["order"] = r.emit(node, ATEN.unsqueeze.default, order, 0)
        named["params_by_step"] = int(by_step)
        new = scan_call(r, node, node.target, named)
        # Every reader gathers back, as was checked, and the order has done that already.
        for user in list(node.users):
            r.replace(user, new)
        r.graph.erase_node(node)


def _why_not_absorbed(
    r: Rewriter, node: Node, named: dict[str, Any], tables: dict[str, Any]
) -> str | None:
    order, gap = r.constants(named["order"]), r.constants(named["gap"])
    # The operator's gate belongs to tokens, this one to steps.
    if "z" in named:
        return "a gathered scan has a gate in the order of its steps"
    for place, probe in enumerate(r.probes):
        table = tables["u"][2][place]
        steps = torch.arange(len(table))
        # First: the tables below are compared as permutations of all tokens.
        lengths = [t[0].meta["val"].shape[1] for t in tables.values() if t is not None]
        if any(number(length, probe) != len(table) for length in lengths):
            return "a gathered scan leaves tokens out"
        own = None if order is None else order[place]
        if own is None or own.shape[:2] != (1, 1) or not torch.equal(own[0, 0].long(), steps):
            return "a gathered scan has an order of its own"
        if gap is None or not bool((gap[place] == 1).all()):
            return "a gathered scan has gaps"
        others = [tables[name] for name in ("delta", "B", "C")]
        alike = [t is not None and torch.equal(t[2][place], table) for t in others]
        if any(t is not None for t in others) and not all(alike):
            return "u, delta, B and C of a scan are gathered by different tables"
        inverse = torch.argsort(table)
        # argsort has an answer for any table; only of a permutation it is the inverse.
        if not torch.equal(table[inverse], steps) or not node.users:
            return "the table of a gathered scan is no permutation"
        for user in node.users:
            back = _index_table(r, user)
            if back is None or not torch.equal(back[2][place], inverse):
                return "a gathered scan is not read back at the inverse of its table"
    return None


def _gathered(r: Rewriter, node: Node) -> tuple[Node, Node, list[torch.Tensor]] | None:
    """(ungathered stream, table node, table at each probe) of unsqueeze(x[:, table], 2)."""
    if not is_call(node, ATEN.unsqueeze.default) or node.args[1] != 2:
        return None
    inner: Any = node.args[0]
    turned = is_call(inner, ATEN.permute.default) and list(inner.args[1]) == [0, 2, 1]
    found = _index_table(r, inner.args[0] if turned else inner, 2 if turned else 1)
    if found is None:
        return None
    source, table_node, table = found
    if turned:
        source = r.emit(node, ATEN.permute.default, source, [0, 2, 1])
    return r.emit(node, ATEN.unsqueeze.default, source, 2), table_node, table


def _index_table(
    r: Rewriter, node: Any, dim: int = 1
) -> tuple[Node, Node, list[torch.Tensor]] | None:
    """(x, table node, table at each probe) of a gather of x (batch, ., .) along `dim`."""
    found = gather_table(node)
    if found is None or found[0] != dim or rank(node) != 3:
        return None
    tables = r.constants(found[1])
    if tables is None or any(table.dim() != 1 for table in tables):
        return None
    return node.args[0], found[1], [table.long() for table in tables]


def merge_scans(r: Rewriter) -> None:
    """A sum of scans over the same tokens becomes one node with all their directions.

    The operator is a sum over directions, each with its own order and operands, and the gate is
    the same for all: silu(z) (a + b) = silu(z) a + silu(z) b.
    """
    for node in list(r.graph.nodes):
        if not is_call(node, ATEN.add.Tensor) or _single_sum(node):
            continue
        leaves = _leaves(node)
        scans = [leaf for leaf in leaves if leaf.target in SCANS]
        if len(scans) < 2:
            continue
        why = _why_not_merged(leaves, scans)
        if why:
            r.report.refuse(why)
            continue
        r.replace(node, _merged(r, node, scans))


def _single_sum(node: Node) -> bool:
    """Whether this sum is a part of a larger one, which is looked at by itself."""
    users = list(node.users)
    return len(users) == 1 and is_call(users[0], ATEN.add.Tensor) and _adds_tensors(users[0])


def _adds_tensors(node: Node) -> bool:
    return all(is_tensor(a) for a in node.args[:2]) and not node.kwargs


def _leaves(node: Any) -> list[Node]:
    """What a tree of additions sums, each used here alone."""
    if not is_call(node, ATEN.add.Tensor) or not _adds_tensors(node):
        return [node]
    return [
        leaf
        for part in node.args[:2]
        for leaf in (_leaves(part) if len(part.users) == 1 else [part])
    ]


def _why_not_merged(leaves: list[Node], scans: list[Node]) -> str | None:
    if len(scans) < len(leaves):
        return "a sum of scans has other terms"
    named = [scan_arguments(scan) for scan in scans]
    first = named[0]
    # Its own value would have to be computed a second time.
    if any(len(scan.users) > 1 for scan in scans):
        return "a scan of a sum is used elsewhere too"
    kinds = {(scan.target, n.get("z")) for scan, n in zip(scans, named, strict=True)}
    if len(kinds) > 1:
        return "the scans of a sum have different gates"
    # An attribute holds for the whole node, for all of its directions.
    if any(n[a] != first[a] for n in named for a in ("delta_softplus", "params_by_step", "scale")):
        return "the scans of a sum have different attributes"
    if any(shape(n["A"])[1:] != shape(first["A"])[1:] for n in named):
        return "the scans of a sum have different states"
    if any(shape(n[t])[0] != 1 for n in named for t in _TABLES):
        return "a scan of a sum has an order for each image"
    if any(shape(n["order"])[1] != 1 for n in named):
        return "a scan of a sum has several directions already"
    streams = any(shape(n[s])[:2] != shape(first[s])[:2] for n in named for s in _STREAMS)
    if streams or any(shape(n[t]) != shape(first[t]) for n in named for t in _TABLES):
        return "the scans of a sum have different batches or lengths"
    return None


def _merged(r: Rewriter, before: Node, scans: list[Node]) -> Node:
    named = [scan_arguments(scan) for scan in scans]
    stacker = Stacker(r, before)
    whole = dict(named[0])

    def all_of(name: str) -> tuple[Node, ...]:
        return tuple(n[name] for n in named)

    # What all scans share stays one: the kernels read a size of 1 for every direction. Delta and
    # its bias share an axis.
    apart = any(len(set(all_of(name))) > 1 for name in ("delta", "delta_bias"))
    found = {
        name: _stream(r, before, stacker, all_of(name), force=apart and name == "delta")
        for name in _STREAMS
    }
    # Directions come out of a batched product, or a convolution of all of them, outside of tokens.
    outside = all(stream.outside for stream in found.values())
    outside = outside and any(stream.lies_outside for stream in found.values())
    whole["direction_axis"] = 1 if outside else 2
    for name, stream in found.items():
        whole[name] = stream.emit(r, before, outside=outside)
    for name in ("A", "D"):
        whole[name] = _rows(r, before, all_of(name))
    if apart:
        whole["delta_bias"] = _rows(r, before, all_of("delta_bias"), force=True)
    for name in _TABLES:
        whole[name] = r.emit(before, ATEN.cat.default, list(all_of(name)), 1)
    return scan_call(r, before, scans[0].target, whole)


def _rows(r: Rewriter, before: Node, nodes: tuple[Node, ...], *, force: bool = False) -> Node:
    """Weights (1, ...) of every scan as (K, ...); one for all where they are the same."""
    if len(set(nodes)) == 1 and not force:
        return nodes[0]
    return r.emit(before, ATEN.cat.default, list(nodes), 0)


@dataclass(frozen=True)
class _Stream:
    """An operand of all scans, which may have its directions inside or outside of its tokens.

    Attributes:
        nodes: the operand of each scan, (batch, seqlen, 1, width).
        stacked: all as (batch, K, seqlen, width); None where that was not made.
        shared: whether all scans have the same one.
    """

    nodes: tuple[Node, ...]
    stacked: Node | None
    shared: bool

    @property
    def outside(self) -> bool:
        """Whether it can be had with its directions outside without a copy."""
        return self.stacked is not None or (
            self.shared and is_call(self.nodes[0], ATEN.unsqueeze.default)
        )

    @property
    def lies_outside(self) -> bool:
        """Whether its directions are outside as it lies, so that else it would be copied."""
        copies = (ATEN.permute.default, ATEN.cat.default)
        return self.stacked is not None and not is_call(self.stacked, *copies)

    def emit(self, r: Rewriter, before: Node, *, outside: bool) -> Node:
        """(batch, K, seqlen, width) with directions outside, else (batch, seqlen, K, width)."""
        first = self.nodes[0]
        if self.shared:
            return r.emit(before, ATEN.unsqueeze.default, first.args[0], 1) if outside else first
        stacked = self.stacked
        if outside and stacked is not None:
            return stacked
        # What has to be copied is copied once, and straight into the operator's layout.
        if stacked is None or is_call(stacked, ATEN.cat.default):
            return r.emit(before, ATEN.cat.default, list(self.nodes), 2)
        source, plan = stacked, [0, 1, 2, 3]
        if is_call(stacked, ATEN.permute.default):
            source, plan = stacked.args  # type: ignore[assignment]
        return r.emit(before, ATEN.permute.default, source, [plan[0], plan[2], plan[1], plan[3]])


def _stream(
    r: Rewriter, before: Node, stacker: Stacker, nodes: tuple[Node, ...], *, force: bool = False
) -> _Stream:
    """The operand of every scan; one for all where they are the same, unless `force`."""
    if len(set(nodes)) == 1 and not force:
        return _Stream(nodes, None, shared=True)
    if not all(is_call(n, ATEN.unsqueeze.default) and n.args[1] == 2 for n in nodes):
        return _Stream(nodes, None, shared=False)
    inner: Any = tuple(n.args[0] for n in nodes)
    return _Stream(nodes, stacker.stack(inner), shared=False)


def fold_scales(r: Rewriter) -> None:
    """A number that divides or multiplies a scan, and nothing else of it, becomes its `scale`.

    The operator's result is `scale` times the sum of its directions, gated or not.
    """
    for node in list(r.graph.nodes):
        if not is_call(node, ATEN.div.Tensor, ATEN.mul.Tensor):
            continue
        scan, number = node.args[:2]
        if not isinstance(scan, Node) or scan.target not in SCANS:
            continue
        # Zero stays an operator of its own: 1 / 0 is no scale.
        if not isinstance(number, int | float) or number == 0:
            if number != 0:
                r.report.refuse("a scan is multiplied by a tensor")
            continue
        # The other reader wants the scan without the factor.
        if len(scan.users) > 1:
            r.report.refuse("a scaled scan is used elsewhere too")
            continue
        named = scan_arguments(scan)
        named["scale"] *= number if is_call(node, ATEN.mul.Tensor) else 1 / number
        r.replace(node, scan_call(r, node, scan.target, named))
