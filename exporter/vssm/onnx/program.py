"""A program of torch.export to a ModelProto: translation, graph passes, fallback bodies last."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import values
from torch.export import ExportedProgram

from vssm._version import __version__
from vssm.onnx.bodies import build_functions
from vssm.onnx.describe import used_operators
from vssm.onnx.fold import fold_weights
from vssm.onnx.names import name_graph, name_weights
from vssm.onnx.regions import region_translations
from vssm.onnx.schemas import register_schemas
from vssm.onnx.translate import translated
from vssm.ops import operators as ops
from vssm.ops.spec import DOMAIN, OPERATOR_VERSION, OPERATORS, PLUGIN_ATTRIBUTES, OperatorSpec
from vssm.types import Steps


def name_outputs(model: ir.Model, names: Sequence[str], *, public: int) -> None:
    """Give the graph's outputs their names; those after the first `public` stay as inner values.

    Raises:
        ValueError: the number of names is not the number of outputs, or one value is two outputs.
    """
    outputs = list(model.graph.outputs)
    if len(outputs) != len(names):
        raise ValueError(f"names={len(names)} for {len(outputs)} graph outputs; name each once")
    taken: set[int] = set()
    for value, name in zip(outputs, names, strict=True):
        if id(value) in taken:
            raise ValueError(f"output {name!r} is the same value as another; give it its own node")
        taken.add(id(value))
        value.name = name
    while len(model.graph.outputs) > public:  # a slice would leave them marked as outputs
        model.graph.outputs.pop()


def rename_inputs(
    model: ir.Model, names: Sequence[str], free: Mapping[int, str], steps: Mapping[int, int]
) -> None:
    """Name the inputs, and in every shape the sizes of their axes that are symbolic, by `free`.

    Where `steps` has an axis, its size is that many times a symbol: 4*(height//8) of height.
    """
    symbols: dict[str, str] = {}
    whole: dict[str, str] = {}
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name
        for axis, size in free.items():
            # An input beside the others may have no batch, or no axis at all.
            if value.shape is None or axis >= len(value.shape):
                continue
            if isinstance(value.shape[axis], int):
                continue
            step, text = steps.get(axis, 1), str(value.shape[axis])
            whole[text] = size
            symbols[text.rpartition("*")[2]] = size if step == 1 else f"({size}//{step})"
    for value in itertools.chain(model.graph.inputs, *(node.outputs for node in model.graph)):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(d, symbols, whole) for d in value.shape])


def _renamed(size: Any, symbols: Mapping[str, str], whole: Mapping[str, str]) -> Any:
    """A size in which the symbols have their names, such as 37*batch."""
    if isinstance(size, int):
        return size
    # Sizes of one name are one size to ONNX Runtime, which shares memory by that; what is not known
    # has no name.
    if size.value is None:
        return None
    words = re.split(r"(\w+)", str(size))
    return whole.get(str(size)) or "".join(symbols.get(word, word) for word in words)


BATCH: Final = "batch"
TRACING: Final = "tracing blocks"
_TRANSLATING: Final = "writing ONNX"
# ONNX IR 10: the newest that ONNX Runtime 1.20 and TensorRT 10 both read.
_IR_VERSION: Final = 10


def program_to_proto(
    program: ExportedProgram,
    opset: int,
    *,
    inputs: Sequence[str],
    names: Sequence[str],
    public: int,
    free: Mapping[int, str] = MappingProxyType({0: BATCH}),
    steps: Mapping[int, int] = MappingProxyType({}),
    progress: Steps = lambda *_: None,
) -> onnx.ModelProto:
    """A traced module `model` of a wrapper as a ModelProto, custom nodes at top level.

    Args:
        program: what torch.export made; its wrapper holds the model as attribute `model`.
        opset: 18 to 20.
        inputs: names of the inputs.
        names: names of the outputs.
        public: how many of the outputs stay outputs; the others are named inner values.
        free: names of the axes of every input that are symbolic.
        steps: of those whose size is a multiple of a symbol, of how much.
        progress: called as our operators are translated, a block's together.
    """
    register_schemas()
    graph = _translate(program, opset, progress)
    reserved = [*inputs, *names]
    weights = name_weights(graph, reserved=reserved)
    fold_weights(graph)
    common.TopologicalSortPass()(graph)
    name_graph(graph, weights, reserved=reserved)
    rename_inputs(graph, inputs, free, steps)
    name_outputs(graph, names, public=public)
    common.ClearMetadataAndDocStringPass()(graph)
    graph.ir_version = _IR_VERSION
    graph.opset_imports.clear()
    graph.opset_imports.update({"": opset, DOMAIN: OPERATOR_VERSION})
    graph.producer_name, graph.producer_version = "vssm", __version__
    proto = ir.to_proto(graph)
    _drop_value_info_of_weights(proto)
    # Last: optimisers and version converters inline or drop functions.
    proto.functions.extend(build_functions(used_operators(proto), opset))
    return proto


def _drop_value_info_of_weights(proto: onnx.ModelProto) -> None:
    """Leave the values between nodes: an initialiser says its type and shape itself.

    ONNX Runtime's quantisers refuse a file that says them twice.
    """
    weights = {initializer.name for initializer in proto.graph.initializer}
    kept = [value for value in proto.graph.value_info if value.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)


def _translate(program: ExportedProgram, opset: int, progress: Steps) -> ir.Model:
    table = {ops.torch_op(spec): spec for spec in OPERATORS.values()}
    total = max(1, sum(node.target in table for node in program.graph.nodes))
    written = itertools.count(1)
    progress(_TRANSLATING, 0, total)

    def tell() -> None:
        progress(_TRANSLATING, min(next(written), total), total)

    translations: dict[Any, Callable[..., Any]] = {
        op: _translation(spec, tell) for op, spec in table.items()
    }
    translations[torch.ops.aten.sort.stable] = _stable_sort(opset)  # torch itself has none
    translations[torch.ops.aten.gelu.default] = _gelu(opset)
    translations.update(region_translations(opset))

    model = translated(program, opset, translations)
    progress(_TRANSLATING, total, total)
    return model


def _translation(op: OperatorSpec, tell: Callable[[], None]) -> Callable[..., Any]:
    """How torch's exporter writes one of our operators: a node of our domain."""
    build = getattr(values.Opset(DOMAIN, OPERATOR_VERSION), op.name)
    inputs = len(op.inputs)

    def translate(*args: Any) -> Any:
        tell()
        given = dict(zip((a.name for a in op.attributes), args[inputs:], strict=False))
        defaults = {a.name: a.default for a in op.attributes}
        return build(*args[:inputs], **{**defaults, **given}, **PLUGIN_ATTRIBUTES)

    return translate


def _stable_sort(opset: int) -> Callable[..., Any]:
    """TopK of everything: of equals it gives the lower index first, in either direction."""
    standard = values.Opset("", opset)

    def translate(x: Any, *, stable: bool, dim: int = -1, descending: bool = False) -> Any:
        if not stable:
            raise AssertionError("the models ask for a stable sort alone")
        size = standard.Constant(value_ints=[int(x.shape[dim])])
        return standard.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    return translate


def _gelu(opset: int) -> Callable[..., Any]:
    """The same nodes as torch's exporter, in the order that ONNX Runtime makes one operator.

    It looks for x * 0.5 and the product with that; torch multiplies by 0.5 first, and each of the
    five nodes then reads and writes the widest tensor of a layer. Halving is exact in either place.
    """
    standard = values.Opset("", opset)

    def translate(x: Any, *, approximate: str = "none") -> Any:
        def number(value: float) -> ir.TensorProtocol:
            return ir.tensor(value, dtype=x.dtype)

        half = standard.Mul(x, number(0.5))
        if approximate == "none":
            grown = standard.Erf(standard.Div(x, number(math.sqrt(2))))
        else:
            cubic = standard.Mul(standard.Pow(x, number(3)), number(0.044715))
            scaled = standard.Mul(standard.Add(x, cubic), number(math.sqrt(2 / math.pi)))
            grown = standard.Tanh(scaled)
        return standard.Mul(half, standard.Add(grown, number(1)))

    return translate
