"""Edits of a temporary copy of model.onnx, for the parity check and for old TensorRTs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vssm.artifact.manifest import MERGED_PAIRS
from vssm.errors import ArtifactError
from vssm.ops.spec import DOMAIN, GATHER_OPERATORS

FORCED_INPUT = "forced_positions_{}"
FORCED_PAIRS = "forced_pairs_{}"
_GATHERS = tuple(op.name for op in GATHER_OPERATORS)


def force_positions(model: onnx.ModelProto) -> list[str]:
    """Make every TokenGather keep given positions instead of choosing by score.

    Each gather becomes an input `forced_positions_i` (batch, num_keep) int32 of positions,
    in index order, and standard operators that gather these rows.

    Returns:
        The names of the new inputs, in graph order.
    """
    nodes: list[onnx.NodeProto] = []
    names: list[str] = []
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type not in _GATHERS:
            nodes.append(node)
            continue
        name = FORCED_INPUT.format(len(names))
        # The schedule settles how many are kept, so only which of them is an input.
        keep = next(a.i for a in node.attribute if a.name == "num_keep")
        names.append(name)
        model.graph.input.append(
            helper.make_tensor_value_info(name, TensorProto.INT32, ["batch", keep])
        )
        nodes += _forced_gather(model, node, name)
    # A repeated field of protobuf cannot be assigned.
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return names


def force_pairs(model: onnx.ModelProto) -> list[str]:
    """Make every merge join given tokens instead of the most similar ones.

    What reads the output `merged_pairs_i` of merge i reads an input `forced_pairs_i` of its shape.

    Returns:
        The names of the new inputs, in order.
    """
    pairs = [value for value in model.graph.output if value.name.startswith(MERGED_PAIRS)]
    for value in pairs:
        forced = FORCED_PAIRS.format(value.name.removeprefix(MERGED_PAIRS))
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                if name == value.name:
                    node.input[i] = forced
        new = model.graph.input.add()
        new.CopyFrom(value)
        new.name = forced
    return [FORCED_PAIRS.format(value.name.removeprefix(MERGED_PAIRS)) for value in pairs]


def _forced_gather(
    model: onnx.ModelProto, node: onnx.NodeProto, forced: str
) -> list[onnx.NodeProto]:
    """The index of each forced position is where it equals the node's own positions."""

    def inner(name: str) -> str:
        return f"{forced}_{name}"

    def constant(name: str, axis: int) -> str:
        array = numpy_helper.from_array(np.array([axis]), inner(name))
        model.graph.initializer.append(array)
        return inner(name)

    nodes = [
        helper.make_node("Unsqueeze", [node.input[1], constant("row", 1)], [inner("positions")]),
        helper.make_node("Unsqueeze", [forced, constant("column", 2)], [inner("wanted")]),
        helper.make_node("Equal", [inner("positions"), inner("wanted")], [inner("equal")]),
        # ArgMax takes no booleans.
        helper.make_node("Cast", [inner("equal")], [inner("match")], to=TensorProto.INT32),
        helper.make_node("ArgMax", [inner("match")], [inner("keep_index")], axis=2, keepdims=0),
        helper.make_node("Unsqueeze", [inner("keep_index"), constant("last", 2)], [inner("index")]),
        helper.make_node("Identity", [forced], [node.output[0]]),
    ]
    for source, target in zip(node.input[2:], node.output[1:], strict=True):
        nodes.append(helper.make_node("GatherND", [source, inner("index")], [target], batch_dims=1))
    return nodes


def expose(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Add inner values to the graph's outputs.

    Raises:
        ArtifactError: the graph has no typed value of such a name.
    """
    known = {value.name: value for value in model.graph.value_info}
    for name in names:
        if name not in known:
            raise ArtifactError(
                f"value {name!r} of model.json is not in model.onnx; export the model again"
            )
        model.graph.output.append(known[name])


def strip_functions(path: Path) -> bytes:
    """The file without its fallback bodies, serialized; the file stays as it is."""
    # Weights beside the file stay there: the parser is given its path as well, and finds them.
    model = onnx.load(path, load_external_data=False)
    del model.functions[:]
    return bytes(model.SerializeToString())


def count_nodes(path: Path) -> tuple[int, int]:
    """How many nodes the graph has, and how many of them are our operators."""
    model = onnx.load(path, load_external_data=False)
    return len(model.graph.node), sum(node.domain == DOMAIN for node in model.graph.node)
