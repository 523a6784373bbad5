"""The work of one image, counted in a file: for exports whose model cannot be rebuilt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx

from vssm.errors import UnsupportedError
from vssm.ops.spec import DOMAIN, SCAN_OPERATORS

_SCANS = tuple(op.name for op in SCAN_OPERATORS)
_PRODUCTS = ("MatMul", "Gemm", "Conv")


def count_graph(path: Path) -> tuple[int, int]:
    """(exponentials of the scans, multiply-adds of matrix products and convolutions), batch 1."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    graph = model.graph
    shapes = {v.name: _sizes(v) for v in (*graph.input, *graph.value_info, *graph.output)}
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    exps = gemm = 0
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type in _SCANS:
            order, states = shapes[node.input[7]], shapes[node.input[2]]
            exps += order[1] * order[2] * states[1] * states[2]
        elif node.domain == "" and node.op_type in _PRODUCTS:
            gemm += _product(node, shapes)
    return exps, gemm


def _product(node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> int:
    """Multiply-adds of one node: its result's size times the terms of each element."""
    result, weight = shapes[node.output[0]], shapes[node.input[1]]
    if node.op_type == "Conv":
        return math.prod(result) * math.prod(weight[1:])
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return math.prod(result) * weight[-1 if transposed else -2 if len(weight) > 1 else 0]


def _sizes(value: onnx.ValueInfoProto) -> list[int]:
    """Sizes of a value; the batch, which has none, counts as 1, also where it is folded in."""
    return [d.dim_value or _at_batch_one(d.dim_param) for d in value.type.tensor_type.shape.dim]


def _at_batch_one(symbol: str) -> int:
    """A symbolic size, the batch or a multiple of it such as "9*batch", for a batch of 1."""
    factors = symbol.split("*")
    if not all(f.isdecimal() or f.isidentifier() for f in factors if symbol):
        raise UnsupportedError(
            f"size={symbol!r} in the graph is no multiple of the batch, so its work cannot be "
            "counted; export with dynamic_batch=False to measure it"
        )
    return math.prod(int(f) for f in factors if f.isdecimal())
