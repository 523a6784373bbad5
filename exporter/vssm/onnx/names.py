"""Names that a reader of the graph knows: module paths for nodes, parameters for initialisers."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import onnx
import onnx_ir as ir

# What torch's exporter notes on a node: the modules around it, outermost first, then its own name.
_SCOPES: Final = "pkg.torch.onnx.name_scopes"
_NO_MODULE: Final = "_empty"  # begins the path of what torch.export made outside of all modules
_WRAPPER: Final = "model"  # the attribute of the traced wrapper that holds the module
_LIFTED: Final = ".lifted_tensor_"  # a constant that torch.export found in a forward pass
_SHAPES: Final = frozenset({"Shape", "Size"})  # they read no value of their operand
_FEW: Final = 8  # integers that a name can hold
_LISTED: Final = 3  # parameters that a name lists


@dataclass(frozen=True)
class Weights:
    """What `name_weights` named.

    Attributes:
        sources: the parameters behind each name.
        stored: the tensor of each parameter.
    """

    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stored: dict[str, Any] = field(default_factory=dict)


class _Names:
    """Hands out every name once, a number behind those that are asked for again."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._used = dict.fromkeys(taken, 0)

    def take(self, wanted: str) -> str:
        name = wanted
        while name in self._used:
            self._used[wanted] = self._used.get(wanted, 0) + 1
            name = f"{wanted}_{self._used[wanted]}"
        self._used[name] = 0
        return name


def name_weights(model: ir.Model, *, reserved: Sequence[str]) -> Weights:
    """Name every value that depends on weights alone, before those are folded to initialisers.

    A parameter or buffer is called by its state_dict key. What is computed from one has the
    operators behind it: `layers.3.mixer.A_log.Exp.Neg`; what is computed from several their common
    module, then each: `layers.3.mixer.conv1d.weight+conv1d_b.weight.Concat`.

    Args:
        model: translated, nothing folded; every other value gets a name that means nothing yet.
        reserved: names that inputs and outputs will have.
    """
    names, weights = _Names(reserved), Weights()
    sources = weights.sources
    constant = set(model.graph.initializers.values())
    inner = (v for node in model.graph for v in node.outputs)
    for index, value in enumerate((*model.graph.inputs, *inner)):
        value.name = f"/{index}"
    for value in list(model.graph.initializers.values()):
        key = value.name or ""
        if key.startswith(f"{_WRAPPER}.") and _LIFTED not in key:
            value.name = names.take(_printable(key.removeprefix(f"{_WRAPPER}.")))
            sources[value.name] = (value.name,)
            weights.stored[value.name] = value.const_value
    for node in model.graph:
        inputs = [v for v in node.inputs if v is not None]
        if node.op_type in _SHAPES or not constant.issuperset(inputs):
            continue
        constant.update(node.outputs)
        read = list(dict.fromkeys(v.name for v in inputs if v.name in sources))
        for value in node.outputs if read else ():
            value.name = names.take(_derived(node, read, sources))
            sources[value.name] = tuple(dict.fromkeys(s for name in read for s in sources[name]))
    return weights


def _derived(node: ir.Node, read: Sequence[str], sources: Mapping[str, tuple[str, ...]]) -> str:
    base = read[0]
    if len(read) > 1:
        parameters = list(dict.fromkeys(s for name in read for s in sources[name]))
        module = _common(p.rpartition(".")[0] for p in parameters)
        ends = [p.removeprefix(f"{module}.") for p in parameters]
        if len(ends) > _LISTED:
            ends[_LISTED - 1 :] = [f"{len(ends) - _LISTED + 1}_more"]
        base = ".".join(filter(None, (module, "+".join(ends))))
    turned = node.op_type == "Transpose" and list(node.attributes.get_ints("perm", ())) == [1, 0]
    return f"{base}.{'T' if turned else node.op_type}"


def name_graph(model: ir.Model, weights: Weights, *, reserved: Sequence[str]) -> None:
    """Name every node by its module and operator, its outputs by it, and what is left.

    `/layers.3/mixer/in_proj/MatMul`: the module whose forward pass ran the operator, or the one
    below it that owns all the weights it reads. A weight that another was folded into is no longer
    the parameter: `stem.0.weight.folded`. Constants that come from no weight are called by their
    few values, or by the operand that they are: `/layers.3/mixer/SelectiveScan.order`.

    Args:
        model: sorted topologically; changed in place.
        weights: those that `name_weights` named in it.
        reserved: names that inputs and outputs will have.
    """
    sources = weights.sources
    names = _Names([*reserved, *(v for v in model.graph.initializers if v in sources)])
    scopes: dict[ir.Node, str] = {}
    for node in model.graph.all_nodes():
        scopes[node] = _scope(node, scopes)
        read = [v.name for v in node.inputs if v is not None and v.is_initializer()]
        module = _owner(scopes[node], [s for name in read for s in sources.get(name or "", ())])
        node.name = names.take(f"{_path(module)}/{node.op_type}")
        for index, value in enumerate(node.outputs):
            value.name = names.take(f"{node.name}_output_{index}")
    for value in list(model.graph.initializers.values()):
        if value.name not in sources:
            value.name = names.take(_constant(value))
        elif value.name in weights.stored and value.const_value is not weights.stored[value.name]:
            value.name = names.take(f"{value.name}.folded")


def _scope(node: ir.Node, known: Mapping[ir.Node, str]) -> str:
    """The module whose forward pass ran a node; that of its operand where nothing says it."""
    noted = node.metadata_props.get(_SCOPES)
    if noted is None:
        makers = [v.producer() for v in node.inputs if v is not None]
        return next((known[maker] for maker in makers if maker is not None), "")
    modules = ast.literal_eval(noted)[:-1]
    path = str(modules[-1]) if modules else ""
    path = _printable(path.partition("@")[0])  # @1: the module's second call
    return "" if path.startswith(_NO_MODULE) else path.removeprefix(_WRAPPER).removeprefix(".")


def _owner(scope: str, parameters: Sequence[str]) -> str:
    """The module in `scope` that owns all these parameters, or the scope itself."""
    found = _common(p.rpartition(".")[0] for p in parameters)
    return found if not scope or found.startswith(f"{scope}.") else scope


def _common(paths: Iterable[str]) -> str:
    """The innermost module that holds all of these."""
    split = [path.split(".") for path in paths]
    shared = 0
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    return ".".join(split[0][:shared]) if split else ""


def _path(module: str) -> str:
    """`layers.3.mixer` as `/layers.3/mixer`: an index is no module of its own to a reader."""
    path = ""
    for part in filter(None, module.split(".")):
        path += f".{part}" if part.isdecimal() and path else f"/{part.replace('/', '_')}"
    return path


def _constant(value: ir.Value) -> str:
    tensor = value.const_value
    if tensor is not None and tensor.size <= (_FEW if tensor.dtype.is_integer() else 1):
        array = tensor.numpy()
        elements = array.ravel().tolist()
        text = "_".join(f"{x:g}" if isinstance(x, float) else str(x) for x in elements)
        return f"constant.{array.dtype}.{text or 'empty'}"
    node, index = next(iter(value.uses()))
    operands = onnx.defs.get_schema(node.op_type, node.domain).inputs
    return f"{node.name}.{operands[min(index, len(operands) - 1)].name}"


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() and not c.isspace() else "_" for c in name)
