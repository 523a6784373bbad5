"""What every name in an exported graph must be, for our models' exports and for users' modules."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx
from onnx import numpy_helper
from torch import nn

_OPERATORS = {schema.name for schema in onnx.defs.get_all_schemas()} | {"T", "folded"}
_CONSTANT = re.compile(r"constant\.(bool|u?int\d+|b?float\d+)\.\S+")


def assert_readable(proto: onnx.ModelProto, model: nn.Module) -> None:
    """Nodes are in modules of `model`, weights are called by its parameters, nothing twice."""
    graph = proto.graph
    _assert_unique(graph)
    modules = {name for name, _ in model.named_modules()}
    for node in graph.node:
        *path, operator = node.name.split("/")[1:]
        assert node.name.startswith("/"), node.name
        assert ".".join(path) in modules, node.name
        assert re.fullmatch(rf"{node.op_type}(_\d+)?", operator), node.name
    keys = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    nodes = {node.name for node in graph.node}
    for initializer in graph.initializer:
        assert _is_readable(initializer.name, keys, nodes), initializer.name


def assert_true(proto: onnx.ModelProto, model: nn.Module) -> None:
    """A weight that is called as a parameter is that parameter; with .T it is its transpose."""
    values = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    parameters = {k: v.detach().numpy() for k, v in model.named_parameters()}
    same = [k for k in parameters if k in values]
    turned = [k for k in parameters if f"{k}.T" in values]
    assert same or turned
    for key in same:
        np.testing.assert_array_equal(values[key], parameters[key], err_msg=key)
    for key in turned:
        np.testing.assert_array_equal(values[f"{key}.T"], parameters[key].T, err_msg=key)


def _assert_unique(graph: onnx.GraphProto) -> None:
    weights = [i.name for i in graph.initializer]
    assert not set(weights) & {v.name for v in graph.value_info}
    values = [*weights, *(v.name for v in graph.input), *(o for n in graph.node for o in n.output)]
    nodes = [node.name for node in graph.node]
    assert not [name for names in (values, nodes) for name, n in Counter(names).items() if n > 1]
    assert all(name.isprintable() and " " not in name for name in [*values, *nodes])


def _is_readable(name: str, keys: list[str], nodes: set[str]) -> bool:
    if name.startswith("/"):  # the operand of a node
        return name.rpartition(".")[0] in nodes
    if name in keys or _CONSTANT.fullmatch(name):
        return True
    base, operators = name, 0
    while (found := re.fullmatch(r"(.+)\.([A-Za-z]+)(_\d+)?", base)) and found[2] in _OPERATORS:
        base, operators = found[1], operators + 1
    first, *others = base.split("+")  # of several parameters, the first has the module before it
    return (
        operators > 0
        and first in keys
        and all(o.endswith("_more") or any(key.endswith(f".{o}") for key in keys) for o in others)
    )
