"""Stacking values that parallel branches computed alike: one operator over both, where it can be.

stack(silu(a), silu(b)) is silu(stack(a, b)): the stack moves up until the branches differ. Always
on a new axis 1, behind the batch.
"""

from __future__ import annotations

import operator
from typing import Any, Final

from torch.fx import Node

from vssm.compat.passes.graph import ATEN, Rewriter, argument, axis, is_call, is_tensor, rank, shape
from vssm.compat.passes.layouts import UNARY

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
        stacked = self._emit(ATEN.permute.default, self._weights(weights), [0, 2, 1])
        y = self._emit(ATEN.matmul.default, self.stack(streams), stacked)
        if biases[0] is None:
            return y
        rows = self._emit(ATEN.unsqueeze.default, self._weights(biases), 1)
        return self._emit(ATEN.add.Tensor, y, rows)

    def _weights(self, nodes: tuple[Node, ...]) -> Node:
        return self._emit(ATEN.stack.default, list(nodes), 0)
