"""How much noise quantising one product adds to its own result, everything else being float."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from vssm.quantization.calibrate import open_file
from vssm.quantization.products import Product
from vssm.types import Array, Steps

_MEASURING = "measuring layers"
_SHADOW = ".quantised"


def layer_sqnr(
    proto: onnx.ModelProto,
    quantized: onnx.ModelProto,
    products: Sequence[Product],
    feeds: Sequence[Mapping[str, Array]],
    *,
    folder: Path,
    threads: int | None,
    progress: Steps,
) -> dict[str, float]:
    """Signal to quantisation noise of each product's result, in dB; infinite without noise.

    All are measured in one run: beside each float product stands its quantised twin, which reads
    the float activation and whose result nobody reads.

    Args:
        proto: the float model.
        quantized: the same with pairs in front of the products.
        products: those to measure.
        feeds: inputs by name, one run each.
        folder: where a file can be written.
        threads: of a run.
        progress: called with the runs done.
    """
    results = _results(proto, products)
    path = folder / "twins.onnx"
    twins = _with_twins(proto, quantized, results)
    # Protobuf writes no file above 2 GiB, and this one has all weights twice.
    onnx.save(twins, path, save_as_external_data=True, location="twins.data")
    # Literally, whatever the target: scales by channel too.
    session = open_file(str(path), threads=threads, config={"session.disable_quant_qdq": "1"})
    signal, noise = np.zeros(len(results)), np.zeros(len(results))
    for done, feed in enumerate(feeds):
        progress(_MEASURING, done, len(feeds))
        found = session.run(None, feed)
        for i in range(len(results)):
            exact, other = found[2 * i].astype(np.float64), found[2 * i + 1]
            signal[i] += np.square(exact).sum()
            noise[i] += np.square(exact - other).sum()
    progress(_MEASURING, len(feeds), len(feeds))
    return dict(zip(results, map(_decibels, signal, noise), strict=True))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:  # exact, as a layer of zeros is
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _results(proto: onnx.ModelProto, products: Sequence[Product]) -> dict[str, str]:
    """The name of each product's result, by the product's own."""
    names = {product.name for product in products}
    return {node.name: node.output[0] for node in proto.graph.node if node.name in names}


def _with_twins(
    proto: onnx.ModelProto, quantized: onnx.ModelProto, results: Mapping[str, str]
) -> onnx.ModelProto:
    """The graph with float products, and quantised ones that nobody reads, as its outputs."""
    twins = onnx.ModelProto()
    twins.CopyFrom(quantized)
    graph = twins.graph
    originals = {node.name: node for node in proto.graph.node if node.name in results}
    values = {value.name: value for value in (*graph.value_info, *graph.output)}
    nodes = []
    for node in quantized.graph.node:
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        nodes.append(twin)
        if node.name in originals:
            nodes.append(originals[node.name])
            twin.output[0] += _SHADOW
            twin.name += _SHADOW
    del graph.node[:], graph.output[:]
    graph.node.extend(nodes)
    kept = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(t for t in proto.graph.initializer if t.name not in kept)
    for name in results.values():
        for suffix in ("", _SHADOW):
            output = graph.output.add()
            output.CopyFrom(values[name])
            output.name += suffix
    return twins
