"""Operators that write to their operands, as operators that return what is then there.

torch's own way traces the whole program a second time, with every tensor wrapped: 46 of the 76 s of
a model that fills two empty maps. Here a write is followed to the values that show the same memory,
as torch's fake tensors know it, and those of them that are read later are made anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from vssm.compat.passes.graph import ATEN, PassReport, Rewriter, is_call, is_tensor, rank
from vssm.onnx.decompose import open_detached, rename_outputs

_SELECT, _SLICE, _PERMUTE = ATEN.select.int, ATEN.slice.Tensor, ATEN.permute.default
_TRANSPOSE: Final = ATEN.transpose.int
# Views with all elements in their order: what is written to one has the parent's shape again.
_IN_ORDER: Final = (
    *(ATEN.view.default, ATEN._unsafe_view.default, ATEN.reshape.default),
    *(ATEN.flatten.using_ints, ATEN.unflatten.int),
    *(ATEN.unsqueeze.default, ATEN.squeeze.dim, ATEN.squeeze.default),
)
_ITSELF: Final = (
    *(ATEN.contiguous.default, ATEN.alias.default, ATEN.detach.default, ATEN.dropout.default),
    *(ATEN.to.dtype, ATEN.expand.default),
)


def without_mutation(program: ExportedProgram) -> ExportedProgram:
    """The program with no operator that writes to its operands: the passes move values about.

    `x += y` would reach a copy that a pass takes out, or a twin that it shares.
    """
    open_detached(program.graph)
    writes = [node for node in program.graph.nodes if _writes(node)]
    if not writes:
        return program
    memory = _Memory(program)
    if not all(memory.knows(node) for node in writes):
        functional: ExportedProgram = program.run_decompositions({})
        return functional
    memory.rewrite()
    for node in reversed(writes):
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    rename_outputs(program)
    return program


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


@dataclass(eq=False)
class _State:
    """What is in some memory after a write: `value` where `view` is, else what was there before.

    Attributes:
        view: what was written to.
        value: what it is now.
        before: the state in which it was written to; None: as it was made.
        known: what others are that show this memory.
    """

    view: Node
    value: Node
    before: _State | None
    known: dict[Node, Node] = field(default_factory=dict)


class _Memory:
    """Which values of a program show the same memory, and what is in it."""

    def __init__(self, program: ExportedProgram) -> None:
        self._r = Rewriter(program, PassReport("writes"))
        self._place: dict[Node, int] = {}
        first: dict[int, Node] = {}
        self._parent: dict[Node, Node] = {}
        for node in program.graph.nodes:
            if not is_tensor(node):
                continue
            place = self._place[node] = node.meta["val"].untyped_storage()._cdata
            source = node.args[0] if node.op == "call_function" and node.args else None
            if place not in first:
                first[place] = node
            elif isinstance(source, Node) and self._place.get(source) == place:
                self._parent[node] = source
        self._first = first
        self._states: dict[int, _State] = {}

    def knows(self, node: Node) -> bool:
        """Whether a write is to the first operand, of memory of which all views are known."""
        into: Any = self._parent.get(node)
        if into is None or _returning(node) is None:
            return False
        place = self._place[into]
        first = self._first[place]
        shown = [n for n, other in self._place.items() if other == place and n is not first]
        if first.op != "call_function" or not all(n in self._parent for n in shown):
            return False  # memory of an input or a weight, or seen through what is no view
        while into is not first:
            if not self._has_way_back(into):
                return False
            into = self._parent[into]
        return True

    def _has_way_back(self, view: Node) -> bool:
        if _writes(view) or is_call(view, _SELECT, _SLICE, _PERMUTE, _TRANSPOSE):
            return True
        shapes = [_sizes(view), _sizes(self._parent[view])]
        if is_call(view, *_ITSELF):
            return shapes[0] == shapes[1]
        # One size that is no number can be left to infer.
        return is_call(view, *_IN_ORDER) and sum(isinstance(n, str) for n in shapes[1]) <= 1

    def rewrite(self) -> None:
        """Let every node read what is in its operands' memory when it runs, and no node write."""
        for node in list(self._r.graph.nodes):
            for source in node.all_input_nodes:
                now = self._now(source, node)
                if now is not source:
                    node.replace_input_with(source, now)
            if _writes(node):
                value = self._r.emit(node, _returning(node), *node.args, **node.kwargs)
                kind = node.meta["val"].dtype
                if value.meta["val"].dtype != kind:  # which a write keeps, whatever it is given
                    value = self._r.emit(node, ATEN.to.dtype, value, kind)
                place = self._place[node]
                self._states[place] = _State(self._parent[node], value, self._states.get(place))
            elif node in self._parent and (state := self._states.get(self._place[node])):
                state.known[node] = node  # made of what is there now

    def _now(self, node: Node, before: Node) -> Node:
        state = self._states.get(self._place.get(node, 0))
        return node if state is None else self._in(state, node, before)

    def _in(self, state: _State | None, node: Node, before: Node) -> Node:
        """What a value would be if it were read in a state."""
        if state is None:
            return node
        if node is state.view:
            return state.value
        if node not in state.known:
            child = self._towards(node, state.view)
            if child is not None:
                inner = self._in(state, child, before)
                found = self._put(child, inner, self._in(state.before, node, before), before)
            else:
                parent = self._in(state, self._parent[node], before)
                found = parent if _writes(node) else self._again(node, parent, before)
            state.known[node] = found
        return state.known[node]

    def _towards(self, node: Node, view: Node) -> Node | None:
        """The child of a value through which a view shows it; None if it does not."""
        while view in self._parent:
            if self._parent[view] is node:
                return view
            view = self._parent[view]
        return None

    def _again(self, node: Node, source: Node, before: Node) -> Node:
        target: Any = node.target
        return self._r.emit(before, target, source, *node.args[1:], **node.kwargs)

    def _put(self, view: Node, value: Node, into: Node, before: Node) -> Node:
        """What a view shows, with another value in the places of the view."""
        emit = self._r.emit
        if is_call(view, _SELECT):
            return emit(before, ATEN.select_scatter.default, into, value, *view.args[1:])
        if is_call(view, _SLICE):
            return emit(before, ATEN.slice_scatter.default, into, value, *view.args[1:])
        if is_call(view, _TRANSPOSE):
            return emit(before, _TRANSPOSE, value, *view.args[1:])
        if is_call(view, _PERMUTE):
            plan = [int(d) % rank(view) for d in view.args[1]]  # type: ignore[union-attr, arg-type]
            back = sorted(range(len(plan)), key=plan.__getitem__)
            return emit(before, _PERMUTE, value, back)
        if is_call(view, *_IN_ORDER):
            sizes = [-1 if isinstance(n, str) else n for n in _sizes(into)]
            return emit(before, ATEN.reshape.default, value, sizes)
        return value


def _returning(node: Node) -> Any:
    """The operator that returns what another writes to its first operand; None if there is none."""
    target: Any = node.target
    schema = target._schema
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    space, _, name = schema.name.partition("::")
    turns = torch.Tag.inplace_view in target.tags
    if written != [True, *[False] * (len(written) - 1)] or len(schema.returns) != 1 or turns:
        return None
    packet = getattr(ATEN, name[:-1], None) if space == "aten" and name.endswith("_") else None
    return getattr(packet, schema.overload_name or "default", None)


def _sizes(node: Node) -> list[int | str]:
    value: Tensor = node.meta["val"]
    return [n if isinstance(n, int) else str(n) for n in value.shape]
