"""Graph passes between torch's exporter and the saved file, each on an onnx_ir model."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

# Weights are folded whatever their size: -exp(A_log), stacked and flipped weights are constants.
_NO_LIMIT = 2**62


def fold_weights(model: ir.Model) -> None:
    """Compute everything that depends on weights alone, then drop what nothing reads."""
    optimizer.fold_constants(
        model, onnx_shape_inference=False, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT
    )
    optimizer.remove_unused_nodes(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)


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


def rename_inputs(model: ir.Model, names: Sequence[str], batch: str | None) -> None:
    """Name the inputs, and the symbolic first axis of every value `batch`; None: it is fixed."""
    for value, name in zip(model.graph.inputs, names, strict=True):
        value.name = name
    if batch is None:
        return
    symbols = {str(dim) for value in model.graph.inputs for dim in (value.shape or ())[:1]}
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([batch if str(d) in symbols else d for d in value.shape])
    for value in model.graph.inputs:
        value.shape = ir.Shape([batch, *(value.shape or ())[1:]])


def strip_initializer_prefix(model: ir.Model, prefix: str) -> None:
    """Call weights by their state_dict keys, without the tracing wrapper's attribute name."""
    for value in list(model.graph.initializers.values()):
        if value.name and value.name.startswith(prefix):
            value.name = value.name.removeprefix(prefix)


def tidy(model: ir.Model) -> None:
    """Unique node names, topological order, no tracing notes."""
    common.ClearMetadataAndDocStringPass()(model)
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
    common.TopologicalSortPass()(model)
