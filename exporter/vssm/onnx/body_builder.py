"""A small builder of ONNX function bodies: nodes are written as expressions that return names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from vssm.ops.spec import DOMAIN, AttributeSpec, OperatorSpec

# TensorRT's parser keeps one table of tensors for the graph and the bodies, and lets the outer
# tensor win: a name of ours must never be one that a model uses.
_PREFIX = "vssm."


def _attribute_type(spec: AttributeSpec) -> int:
    return int(onnx.AttributeProto.INT if spec.kind is int else onnx.AttributeProto.FLOAT)


class NodeList:
    """Nodes of one graph in topological order; every method adds nodes and returns a name."""

    def __init__(self, scope: str = "") -> None:
        self.nodes: list[Any] = []
        self._scope = _PREFIX + scope

    def name(self, hint: str) -> str:
        """A tensor name of this graph; the same hint gives the same name."""
        return self._scope + hint

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        return self.ops(op_type, *inputs, outputs=1, **attributes)[0]

    def ops(self, op_type: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Add a node with several outputs and return their names."""
        stem = self.name(f"{op_type}{len(self.nodes)}")
        names = [stem] if outputs == 1 else [f"{stem}.{i}" for i in range(outputs)]
        node = helper.make_node(op_type, list(inputs), names, name=stem, **attributes)
        self.nodes.append(node)
        return names


class BodyBuilder(NodeList):
    """Builds the FunctionProto of one operator out of standard ONNX operators."""

    def __init__(self, spec: OperatorSpec) -> None:
        super().__init__()
        self.spec = spec
        self._constants: dict[object, str] = {}

    @property
    def inputs(self) -> dict[str, str]:
        """The operator's operands: name in the table -> name in the body."""
        return {operand.name: self.name(operand.name) for operand in self.spec.inputs}

    def number(self, value: float) -> str:
        """A float32 scalar."""
        return self._constant(value, value_float=float(value))

    def integers(self, *values: int) -> str:
        """A one-dimensional int64 tensor."""
        return self._constant(values, value_ints=list(values))

    def integer(self, value: int) -> str:
        """An int64 scalar."""
        return self._constant(("scalar", value), value_int=value)

    def attribute(self, name: str) -> str:
        """The node's attribute `name` as a scalar: int64 or float32."""
        spec = next(a for a in self.spec.attributes if a.name == name)
        key = ("attribute", name)
        if key not in self._constants:
            self._constants[key] = self.op("Constant")
            self.refer(name, "value_int" if spec.kind is int else "value_float")
        return self._constants[key]

    def refer(self, name: str, to: str = "") -> None:
        """Give the last node the operator's attribute `name` as its own `to`, or `name`."""
        spec = next(a for a in self.spec.attributes if a.name == name)
        value = onnx.AttributeProto()
        value.name, value.type, value.ref_attr_name = to or name, _attribute_type(spec), name
        self.nodes[-1].attribute.append(value)

    def size(self, tensor: str, axis: int) -> str:
        """Size of an axis as a one-element int64 tensor."""
        key = ("size", tensor, axis)
        if key not in self._constants:
            self._constants[key] = self.op("Shape", tensor, start=axis, end=axis + 1)
        return self._constants[key]

    def count_to(self, size: str) -> str:
        """(size,) int64: 0, 1, ... size - 1."""
        key = ("range", size)
        if key not in self._constants:
            limit = self.op("Squeeze", size, self.integers(0))
            self._constants[key] = self.op("Range", self.integer(0), limit, self.integer(1))
        return self._constants[key]

    def cast(self, tensor: str, to: str) -> str:
        """The tensor as ONNX type `to`: "FLOAT", "INT64", "INT32" or "BOOL"."""
        return self.op("Cast", tensor, to=TensorProto.DataType.Value(to))

    def function(self, outputs: Sequence[str], opset: int) -> onnx.FunctionProto:
        """Close the body: `outputs` in the order of the table; `opset` is the model's."""
        names = [self.name(operand.name) for operand in self.spec.outputs]
        for computed, name in zip(outputs, names, strict=True):
            self._rename(computed, name)
        return helper.make_function(
            DOMAIN,
            self.spec.name,
            list(self.inputs.values()),
            names,
            self.nodes,
            [helper.make_opsetid("", opset)],
            attributes=[a.name for a in self.spec.attributes if a.default is None],
            attribute_protos=[
                helper.make_attribute(a.name, a.default)
                for a in self.spec.attributes
                if a.default is not None
            ],
        )

    def _constant(self, key: object, **value: Any) -> str:
        if key not in self._constants:
            self._constants[key] = self.op("Constant", **value)
        return self._constants[key]

    def _rename(self, old: str, new: str) -> None:
        # The computed tensor becomes the output itself: an Identity would be one more copy.
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]
