"""QuantizeLinear and DequantizeLinear in front of matrix products, by ONNX Runtime's quantiser.

Values are quantised where a product reads them and never where one is written: TensorRT moves a
quantised result through the reshapes behind it into the body of a scan, and then cannot build it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import QDQQuantizer, QuantType

from vssm.quantization.products import OPERATORS, Product, names_in
from vssm.quantization.request import TARGETS, QuantizeRequest

_FP8_MAX: Final = 448.0  # the largest E4M3
_SMALLEST: Final = 1e-12  # of a range: zeros alone would have the scale 0
_ZERO_POINT: Final = "_zero_point"
_DEQUANTIZED: Final = "_DequantizeLinear_Output"
# How ONNX Runtime's quantiser ends the names of what it adds, and what stands in their place.
_SHORT: Final = {
    "_QuantizeLinear_Output": ".q",
    _DEQUANTIZED: ".dq",
    "_QuantizeLinear": "/Q",
    "_DequantizeLinear": "/DQ",
    "_quantized": ".q",
    "_scale": ".scale",
}


class _WeightsOnly(QDQQuantizer):  # type: ignore[misc]
    """Leaves activations as they are."""

    def quantize_activation_tensor(self, *_: Any, **__: Any) -> None:
        """Nothing."""


def insert_pairs(
    proto: onnx.ModelProto,
    products: Sequence[Product],
    request: QuantizeRequest,
    found: Any,
) -> onnx.ModelProto:
    """A float model with QuantizeLinear and DequantizeLinear in front of these products.

    Args:
        proto: the model, which is changed.
        products: those to quantise.
        request: how.
        found: ranges of their activations; None for method "weights".
    """
    products = with_own_weights(proto.graph, products)
    target = TARGETS[request.target]
    activations = QuantType.QInt8 if target.signed else QuantType.QUInt8
    # Without VNNI the sum of two products of uint8 and int8 is cut to 16 bits: seven bits fit.
    narrow = request.method == "static" and not target.signed
    quantizer = QDQQuantizer if request.method == "static" else _WeightsOnly
    names = [product.name for product in products]
    known = names_in(proto.graph)
    options = {
        "ActivationSymmetric": target.signed,
        "WeightSymmetric": True,
        "OpTypesToExcludeOutputQuantization": list(OPERATORS),
        "QuantizeBias": False,
        "QDQDisableWeightAdjustForInt32Bias": True,  # which makes scales larger for their sake
        "TensorQuantOverrides": _overrides(proto, products, request, found),
    }
    with silent():
        made = quantizer(
            proto,
            False,  # scales by channel come with their axis, below
            narrow,
            QuantType.QInt8,
            activations,
            found,
            names,
            [],
            list(OPERATORS),
            options,
        )
        made.quantize_model()
        made.model.topological_sort()
    graph = made.model.model.graph
    _float_elsewhere(graph, names)
    before = {node.name: node for node in proto.graph.node}
    for node in graph.node:
        if node.op_type == "Gemm":  # whose bias it takes to be quantised, and so counts in full
            node.attribute.clear()
            node.attribute.extend(before[node.name].attribute)
    _tidy(graph, known)
    return made.model.model


def with_own_weights(graph: onnx.GraphProto, products: Sequence[Product]) -> list[Product]:
    """The products, each with a weight that no node reads which stays float or has other scales.

    ONNX Runtime's quantisers change a weight for every node that reads it.

    Args:
        graph: of the float model, which gets copies of such weights.
        products: those to quantise.
    """
    readers = Counter(name for node in graph.node for name in node.input)
    axes = Counter((product.weight, product.axis) for product in products)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    own = []
    for product in products:
        name = product.weight
        if axes[name, product.axis] < readers[name]:
            name = f"{name}.{product.axis}"
            if name not in weights:
                weights[name] = graph.initializer.add()
                weights[name].CopyFrom(weights[product.weight])
                weights[name].name = name
            inputs = nodes[product.name].input
            inputs[:] = [name if given == product.weight else given for given in inputs]
        own.append(replace(product, weight=name))
    return own


def _float_elsewhere(graph: onnx.GraphProto, products: Collection[str]) -> None:
    """Give all that reads a quantised value but these products the float one.

    Scans, gathers and norms do, and whoever reads an output of the model: of a value that is an
    output, ONNX Runtime gives the name to the quantised one.
    """
    outputs = {value.name for value in graph.output}
    quantized = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "QuantizeLinear"}
    pairs = {
        node.output[0]: quantized[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantized
    }
    for node in graph.node:
        if node.name not in products:
            for index, name in enumerate(node.input):
                node.input[index] = pairs.get(name, name)
    names = {pairs[name]: name for name in outputs & pairs.keys()}
    names |= {name: f"{name}{_DEQUANTIZED}" for name in names.values()}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _overrides(
    proto: onnx.ModelProto, products: Sequence[Product], request: QuantizeRequest, found: Any
) -> dict[str, list[dict[str, Any]]]:
    """What ONNX Runtime's quantiser would choose otherwise: axes of weights, scales of float8."""
    target = TARGETS[request.target]
    every = target.per_channel or request.method == "weights"
    weights = {t.name: t for t in proto.graph.initializer}
    overrides: dict[str, list[dict[str, Any]]] = {}
    for product in products:
        if request.type == "fp8":
            low, high = found[product.activation].range_value
            largest = np.abs(numpy_helper.to_array(weights[product.weight])).max()
            overrides[product.weight] = [_float8(largest)]
            overrides[product.activation] = [_float8(np.abs([low, high]).max())]
        elif every or (product.right and product.rank == 2):
            overrides[product.weight] = [{"axis": product.axis}]
    return overrides


def _float8(largest: Any) -> dict[str, Any]:
    zero = np.array(0, onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.FLOAT8E4M3FN))
    scale = np.array(max(float(largest), _SMALLEST) / _FP8_MAX, np.float32)
    return {"quant_type": QuantType.QFLOAT8E4M3FN, "scale": scale, "zero_point": zero}


def _tidy(graph: onnx.GraphProto, known: Collection[str]) -> None:
    """Short names for all that is not `known`, and one initialiser for equal zero points.

    ONNX Runtime's names are longer than what they name: 5 % of a small model's file.
    """
    names: dict[str, str] = {}
    kept: set[str] = set()
    for tensor in list(graph.initializer):
        if tensor.name in known or not tensor.name.endswith(_ZERO_POINT):
            continue
        values = numpy_helper.to_array(tensor)
        size = f"x{values.size}" if values.ndim else ""
        names[tensor.name] = f"constant.{values.dtype}.{values.flat[0]}{size}"
        if names[tensor.name] in kept:
            graph.initializer.remove(tensor)
        kept.add(names[tensor.name])

    def short(name: str) -> str:
        suffix = next((s for s in _SHORT if name not in known and name.endswith(s)), "")
        return names.get(name) or name.removesuffix(suffix) + _SHORT.get(suffix, "")

    for named in (*graph.initializer, *graph.value_info):
        named.name = short(named.name)
    for node in graph.node:
        node.name = short(node.name)
        node.input[:] = map(short, node.input)
        node.output[:] = map(short, node.output)


@contextmanager
def silent() -> Iterator[None]:
    """ONNX Runtime's quantiser advises to run steps that an export has behind it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
