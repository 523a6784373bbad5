"""Operators that no translation knows, written with others where they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

_Table = Mapping[Any, Callable[..., Any]]
_ATEN: Final = torch.ops.aten
_NUMBER: Final = _ATEN.sym_numel.default
_VIEWS: Final = (_ATEN.view.default, _ATEN._unsafe_view.default)
# Composites that exporters write as one Resize; with others they are gathers and sums.
_RESIZES: Final = (
    _ATEN.upsample_bilinear2d.vec,
    _ATEN.upsample_nearest2d.vec,
    _ATEN.upsample_bicubic2d.vec,
    _ATEN.upsample_trilinear3d.vec,
    _ATEN.upsample_nearest3d.vec,
)
_RESTRIDES: Final = (_ATEN.as_strided_.default, _ATEN.as_strided.default)
_COMPOSITE: Final = torch._C.DispatchKey.CompositeImplicitAutograd


def decomposed(program: ExportedProgram, table: _Table) -> ExportedProgram:
    """A program without the operators that an exporter has no translation of.

    torch's own way traces the whole program a second time, be it for one operator: that took 9 of
    the 25 s of vim_tiny. It is still gone where a call writes to its operands or holds a graph.

    Args:
        program: changed in place, where it is not traced again.
        table: what operators without a translation are, by operator.
    """
    graph = program.graph_module.graph
    open_detached(graph)
    graph.eliminate_dead_code()
    calls = [node for node in graph.nodes if node.op == "call_function"]
    others = _Others(program, table)
    found = [(node, others.of(node)) for node in calls if others.needs(node.target)]
    known = [(node, inner) for node, inner in found if inner is not None]
    if len(known) < len(found) or not all(_is_function(node) for node in calls):
        traced: ExportedProgram = program.run_decompositions(dict(table))
        return traced
    for node, inner in known:
        _put(node, inner)
    rename_outputs(program)
    return program


class _Others:
    """What calls are, written with other operators; calls that are alike share it."""

    def __init__(self, program: ExportedProgram, table: _Table) -> None:
        self._table = table
        self._known: dict[Any, GraphModule | None] = {}
        # An operand more, an input of the program: the values of a call without tensors, such as
        # eye, must be of the program's kind too.
        nodes = program.graph.nodes
        self._example = next(n.meta["val"] for n in nodes if n.op == "placeholder")

    def needs(self, target: Any) -> bool:
        """Whether an exporter has no translation of an operator and torch a decomposition."""
        if target in self._table:
            return True
        if target in _RESIZES:
            return False
        # Composites that torch.export never keeps, such as reshape and to, no exporter knows.
        return (
            isinstance(target, torch._ops.OpOverload)
            and target not in _composites_kept()
            and target.has_kernel_for_dispatch_key(_COMPOSITE)
        )

    def of(self, node: Node) -> GraphModule | None:
        """A graph of the operands that are nodes; None if it would hold what exporters refuse."""
        flat, layout = pytree.tree_flatten((node.args, node.kwargs))
        key = (node.target, layout, *(_kind(value) for value in flat))
        if key not in self._known:
            self._known[key] = self._traced(node.target, flat, layout)
        return self._known[key]

    def _traced(self, target: Any, flat: list[Any], layout: Any) -> GraphModule | None:
        places = [i for i, value in enumerate(flat) if isinstance(value, Node)]

        def call(_: Tensor, *operands: Any) -> Any:
            filled = dict(enumerate(flat)) | dict(zip(places, operands, strict=True))
            args, kwargs = pytree.tree_unflatten(list(filled.values()), layout)
            found = self._table.get(target, target)(*args, **kwargs)
            # Torch's own classes of named results would be calls in the graph.
            return tuple(found) if isinstance(found, tuple) else found

        operands = [flat[i].meta["val"] for i in places]
        traced = make_fx(call, decomposition_table=self._table, tracing_mode="symbolic")
        with torch.no_grad():
            inner: GraphModule = traced(self._example, *operands)
        _drop_restrides(inner.graph)
        _drop_checks(inner.graph)
        _leave_open(inner.graph)
        unknown = any(n.op == "get_attr" or n.target is _NUMBER for n in inner.graph.nodes)
        calls = [n for n in inner.graph.nodes if n.op == "call_function"]
        writes = not all(map(_is_function, calls))
        return None if unknown or writes else inner


@cache
def _composites_kept() -> frozenset[Any]:
    return frozenset(torch.export.default_decompositions())


def _drop_restrides(graph: Graph) -> None:
    """Read a value itself where it is only said to lie otherwise in memory.

    A pooling of channels-last maps to one place ends so; as a write to its operand it would have
    the whole program traced again.
    """
    for node in graph.nodes:
        if node.target not in _RESTRIDES:
            continue
        old, new = node.args[0].meta["val"], node.meta["val"]
        strides = zip(new.shape, old.stride(), new.stride(), strict=True)
        # The stride of an axis of one element is never used.
        if old.shape == new.shape and all(size == 1 or a == b for size, a, b in strides):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _drop_checks(graph: Graph) -> None:
    """Leave out what only looks at values, as one_hot does: it has no result."""
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and not node.users:
            graph.erase_node(node)


def _leave_open(graph: Graph) -> None:
    """Write the one size of a view that has to be computed as -1, which every runtime works out."""
    for node in graph.nodes:
        if node.target in _VIEWS:
            source, sizes = node.args
            found = [size for size in sizes if isinstance(size, Node)]
            if len(found) > 1:  # those that the call was given are there already
                found = [size for size in found if size.op != "placeholder"]
            # Beside one that is to be inferred already, a second one could not be.
            if len(found) == 1 and -1 not in sizes:
                node.args = (source, [-1 if size is found[0] else size for size in sizes])
    graph.eliminate_dead_code()


def _kind(value: Any) -> str:
    """What of an argument a decomposition depends on."""
    if not isinstance(value, Node):
        return repr(value)
    held = value.meta["val"]
    tensor = isinstance(held, Tensor)
    return str((held.dtype, held.shape, held.stride()) if tensor else held)


def rename_outputs(program: ExportedProgram) -> None:
    """Let the signature name the nodes that now are the outputs."""
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    values = [v for v in output.args[0] if isinstance(v, Node)]
    specs = [s for s in program.graph_signature.output_specs if hasattr(s.arg, "name")]
    for spec, value in zip(specs, values, strict=True):
        spec.arg.name = value.name


def open_detached(graph: Graph) -> None:
    """Read what a constant of the forward pass is made of: detached or not, it has no gradient."""
    for node in graph.find_nodes(op="call_function", target=_ATEN.detach_.default):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def _is_function(node: Node) -> bool:
    """Whether a call reads values and returns others, no more."""
    schema = getattr(node.target, "_schema", None)
    inner = isinstance(node.target, torch._ops.HigherOrderOperator)
    return not inner and not (schema is not None and schema.is_mutable)


def _put(node: Node, inner: GraphModule) -> None:
    """Replace a call by the nodes of a graph."""
    graph = node.graph
    flat = [v for v in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(v, Node)]
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    known: dict[Node, Any] = dict(zip(placeholders[1:], flat, strict=True))
    result: Any = None
    with graph.inserting_before(node):
        for each in inner.graph.nodes:
            if each.op == "call_function":
                known[each] = graph.node_copy(each, known.__getitem__)
                # The file names a node after the module that ran it.
                known[each].meta = {**node.meta, "val": each.meta["val"]}
            elif each.op == "output":
                result = torch.fx.map_arg(each.args[0], known.__getitem__)
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    else:
        for part in list(node.users):  # a call of several results is read by getitem alone
            part.replace_all_uses_with(result[part.args[1]])
            graph.erase_node(part)
    graph.erase_node(node)
