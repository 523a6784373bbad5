"""Which nodes are products by weights, and what of them no quantiser may get, on graphs by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import vssm
from vssm.quantization.pairs import insert_pairs
from vssm.quantization.products import check_operands, find_products

Value = tuple[str, tuple[int, ...]]


def _graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    weights: Sequence[Value],
    **values: float,
) -> onnx.GraphProto:
    """A graph from these inputs to the last node's output; `values` are weights' first numbers."""
    generator = np.random.default_rng(0)
    tensors = []
    for name, shape in weights:
        array = generator.standard_normal(shape).astype(np.float32)
        array.flat[0] = values.get(name, array.flat[0])
        tensors.append(numpy_helper.from_array(array, name))
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in inputs]
    last = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    return helper.make_graph(nodes, "g", given, [last], tensors)


def test_products_are_matrices_and_convolutions_by_weights() -> None:
    conv = ("x", (1, 4, 8, 8))
    groups = {"full": 1, "grouped": 2, "depthwise": 4}
    weights = [(name, (4, 4 // group, 3, 3)) for name, group in groups.items()]
    graph = _graph(
        [helper.make_node("Conv", ["x", n], [f"y{n}"], n, group=g) for n, g in groups.items()],
        [conv],
        weights,
    )
    assert [product.name for product in find_products(graph)] == ["full", "grouped"]
    matrices = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "right"),
        helper.make_node("MatMul", ["w", "x"], ["b"], "left"),
        helper.make_node("MatMul", ["x", "v"], ["c"], "by a vector"),
        helper.make_node("MatMul", ["a", "b"], ["d"], "of activations"),
        helper.make_node("Gemm", ["x", "w"], ["e"], "gemm"),
        helper.make_node("Gemm", ["w", "x"], ["f"], "gemm on the left"),
    ]
    graph = _graph(matrices, [("x", (4, 4))], [("w", (4, 4)), ("v", (4,))])
    assert [(p.name, p.right) for p in find_products(graph)] == [
        ("right", True),
        ("left", False),
        ("gemm", True),
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "/mix")
    graph = _graph([node], [("x", (4, 4))], [("w", (4, 4))], w=value)
    with pytest.raises(ValueError, match=r"weight 'w' of '/mix' is not finite.*keep_float='/mix'"):
        check_operands(graph, find_products(graph), vssm.QuantizeRequest())


WEIGHTS = vssm.QuantizeRequest(method="weights")


@pytest.mark.parametrize("taken", ["w_scale", "x_zero_point"])
def test_names_that_a_quantiser_would_take_for_its_own_are_refused(taken: str) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "/mix"),
        helper.make_node("Mul", ["a", taken], ["y"], "/times"),
    ]
    graph = _graph(nodes, [("x", (4, 4))], [("w", (4, 4)), (taken, ())])
    with pytest.raises(ValueError, match=f"value '{taken}'.*adds to '/mix'.*keep_float='/mix'"):
        check_operands(graph, find_products(graph), vssm.QuantizeRequest())


def test_an_input_keeps_its_name() -> None:
    """Also one that ends as what ONNX Runtime's quantiser would add to an activation."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "/mix"),
        helper.make_node("Mul", ["a", "x_scale"], ["y"], "/times"),
    ]
    graph = _graph(nodes, [("x", (4, 4)), ("x_scale", (4,))], [("w", (4, 4))])
    products = find_products(graph)
    check_operands(graph, products, WEIGHTS)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    made = insert_pairs(proto, products, WEIGHTS, None)
    onnx.checker.check_model(made, full_check=True)
    assert list(made.graph.node[-1].input) == ["a", "x_scale"]
