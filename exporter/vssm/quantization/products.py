"""Which nodes of a graph multiply by weights, and which of them are to be quantised."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

import onnx

from vssm.errors import did_you_mean
from vssm.quantization.request import AUTO, QuantizeRequest

OPERATORS: Final = ("MatMul", "Gemm", "Conv")
_SHOWN: Final = 4  # names in an error


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
    """All of them in graph order; depthwise convolutions, which have few weights, do not count."""
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node if _side(node, ranks) is not None}
    first, last = _ends(graph, nodes)
    found = []
    for name, node in nodes.items():
        side = _side(node, ranks) or 0
        weight = node.input[side]
        found.append(
            Product(
                name=name,
                operator=node.op_type,
                activation=node.input[1 - side],
                weight=weight,
                axis=_output_axis(node, side, ranks[weight]),
                rank=ranks[weight],
                right=side == 1,
                end=name in first or name in last,
            )
        )
    return found


def _side(node: onnx.NodeProto, ranks: Collection[str]) -> int | None:
    """Which operand is the weight; None for a node that is no product by one."""
    if node.domain or node.op_type not in OPERATORS:
        return None
    if node.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in node.attribute):
        return None
    constant = [side for side in (0, 1) if node.input[side] in ranks]
    # Two weights were folded when the model was exported; two activations are scores.
    return constant[0] if len(constant) == 1 else None


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
        if not any(fnmatchcase(product.name, pattern) for product in products):
            hint = did_you_mean(pattern, [product.name for product in products])
            raise ValueError(
                f"keep_float={pattern!r} fits none of the {len(products)} matrix products"
                f"{hint or f', such as {products[0].name!r}'}; * stands for any text"
            )
    free = [p for p in products if not any(fnmatchcase(p.name, pattern) for pattern in patterns)]
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


def _runs(product: Product, request: QuantizeRequest) -> bool:
    """Whether the runtime has this product; some operators take weights on the right alone."""
    if request.type == "int4":  # MatMulNBits, and no stack of matrices
        return product.operator == "MatMul" and product.right and product.rank == 2
    return request.method != "dynamic" or (product.operator == "MatMul" and product.right)
