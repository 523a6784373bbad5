"""Which nodes of a graph multiply by weights, and which of them are to be quantised."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

import numpy as np
import onnx
from onnx import numpy_helper

from vssm.errors import did_you_mean
from vssm.quantization.request import AUTO, QuantizeRequest

OPERATORS: Final = ("MatMul", "Gemm", "Conv")
_SHOWN: Final = 4  # names in an error
# How ONNX Runtime's quantisers end the names of what they add to a product's operands.
_ADDED: Final = ("_scale", "_zero_point", "_quantized", "_scales", "_zero_points", "_Q4")


@dataclass(frozen=True)
class Product:
    """A node that multiplies an activation by a weight.

    Attributes:
        name: the node's.
        operator: MatMul, Gemm or Conv.
        activation: name of the other operand.
        weight: name of the initialiser.
        axis: the weight's axis of output channels.
        rank: how many axes the weight has.
        right: whether the weight is the second operand.
        end: whether it is a first or a last layer.
    """

    name: str
    operator: str
    activation: str
    weight: str
    axis: int
    rank: int
    right: bool
    end: bool


def find_products(graph: onnx.GraphProto) -> list[Product]:
    """All of them in graph order; products by a vector and depthwise convolutions do not count."""
    shapes = {t.name: tuple(t.dims) for t in graph.initializer if len(t.dims) > 1}
    nodes = {node.name: node for node in graph.node if _side(node, shapes) is not None}
    first, last = _ends(graph, nodes)
    found = []
    for name, node in nodes.items():
        side = _side(node, shapes) or 0
        weight = node.input[side]
        rank = len(shapes[weight])
        found.append(
            Product(
                name=name,
                operator=node.op_type,
                activation=node.input[1 - side],
                weight=weight,
                axis=_output_axis(node, side, rank),
                rank=rank,
                right=side == 1,
                end=name in first or name in last,
            )
        )
    return found


def _side(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Which operand is the weight; None for a node that is no product by one."""
    if node.domain or node.op_type not in OPERATORS:
        return None
    # ONNX Runtime's quantiser takes the second operand of the others for the weight.
    sides = (0, 1) if node.op_type == "MatMul" else (1,)
    constant = [side for side in sides if node.input[side] in shapes]
    # Two weights were folded when the model was exported; two activations are scores.
    if len(constant) != 1:
        return None
    grouped = any(a.name == "group" and a.i > 1 for a in node.attribute)
    return None if grouped and shapes[node.input[1]][1] == 1 else constant[0]


def _output_axis(node: onnx.NodeProto, side: int, rank: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return rank - 1 if side == 1 else rank - 2


def _ends(graph: onnx.GraphProto, products: Collection[str]) -> tuple[set[str], set[str]]:
    """Products that read no other product's values, and those whose values no other one reads."""
    before: dict[str, frozenset[str]] = {}  # value -> the products nearest before it
    first: set[str] = set()
    read: set[str] = set()
    for node in graph.node:
        nearest = frozenset().union(*(before.get(name, frozenset()) for name in node.input))
        if node.name in products:
            if not nearest:
                first.add(node.name)
            read |= nearest
            nearest = frozenset([node.name])
        before.update(dict.fromkeys(node.output, nearest))
    return first, set(products) - read


def chosen(products: Sequence[Product], request: QuantizeRequest) -> list[Product]:
    """Those that the request quantises, but for what "auto" takes out later.

    Raises:
        ValueError: there are none, a pattern fits none, or nothing is left.
    """
    if not products:
        raise ValueError(
            f"{' and '.join(OPERATORS)} by constant weights are what is quantised, and the export "
            "has none of these; run it as it is"
        )
    patterns = [pattern for pattern in request.keep_float if pattern != AUTO]
    for pattern in patterns:
        if not any(_fits(product, pattern) for product in products):
            hint = did_you_mean(pattern, [product.name for product in products])
            raise ValueError(
                f"keep_float={pattern!r} fits none of the {len(products)} matrix products"
                f"{hint or f', such as {products[0].name!r}'}; * stands for any text"
            )
    free = [p for p in products if not any(_fits(p, pattern) for pattern in patterns)]
    if not free:
        raise ValueError(
            f"keep_float={patterns} leaves none of {len(products)} matrix products to quantise; "
            "keep fewer"
        )
    possible = [product for product in free if _runs(product, request)]
    if not possible:
        raise ValueError(
            f"type={request.type!r} with method={request.method!r} takes MatMul by weights on the "
            f"right alone, and none of {len(free)} products is one, such as {free[0].name!r}; "
            "calibrate on images, or use --weights-only with --type int8"
        )
    left = [product for product in possible if request.ends or not product.end]
    if not left:
        names = ", ".join(product.name for product in possible[:_SHOWN])
        raise ValueError(
            f"ends=False: what could be quantised is in the first and last layers alone ({names}), "
            "which stay float; pass ends=True (--ends)"
        )
    return left


def _fits(product: Product, pattern: str) -> bool:
    # By its own name too, in which a bracket is a bracket.
    return product.name == pattern or fnmatchcase(product.name, pattern)


def _runs(product: Product, request: QuantizeRequest) -> bool:
    """Whether the runtime has this product; some operators take weights on the right alone."""
    if request.type == "int4":  # MatMulNBits, and no stack of matrices
        return product.operator == "MatMul" and product.right and product.rank == 2
    return request.method != "dynamic" or (product.operator == "MatMul" and product.right)


def check_operands(
    graph: onnx.GraphProto, products: Sequence[Product], request: QuantizeRequest
) -> None:
    """Refuse weights that integers cannot hold, and names that would be taken for others.

    Args:
        graph: of the float model, with the values of its weights.
        products: those to quantise.
        request: how.

    Raises:
        ValueError: a weight is not finite, or the graph has a name that is to be added.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    known = names_in(graph)
    for product in products:
        if not np.isfinite(numpy_helper.to_array(weights[product.weight])).all():
            raise ValueError(
                f"the weight {product.weight!r} of {product.name!r} is not finite, so it has no "
                f"range to divide; mend it, or give keep_float={product.name!r}"
            )
        activations = () if request.method == "weights" else (product.activation,)
        operands = (product.weight, *activations)
        added = [operand + suffix for operand in operands for suffix in _ADDED]
        if taken := [name for name in added if name in known]:
            # It would be used as the scale, say, without a word.
            raise ValueError(
                f"the export has a value {taken[0]!r}, as ONNX Runtime's quantiser calls what it "
                f"adds to {product.name!r}; call it otherwise in the model, or give "
                f"keep_float={product.name!r}"
            )


def names_in(graph: onnx.GraphProto) -> set[str]:
    """Those of its nodes, and of the values that these read and write."""
    inner = {name for node in graph.node for name in (node.name, *node.output)}
    return inner.union(value.name for value in (*graph.initializer, *graph.input))
