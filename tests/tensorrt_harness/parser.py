"""NVIDIA's own ONNX parser and builder over a file; run by tests/runtimes/tensorrt.

Usage: python parser.py build MODEL | probe LIBRARY MODEL, with TensorRT for RTX on the path. Prints
one JSON line last. The process ends without TensorRT's clean-up, which wants a GPU.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import onnx
import tensorrt_rtx_bindings as trt

from vssm.ops.spec import DOMAIN


class Logger(trt.ILogger):
    """Keeps errors; this product also asks for a GPU, which building does not need."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, text: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR and "cudaError" not in text:
            self.errors.append(text)


def parse(model: bytes, logger: Logger) -> tuple[Any, Any, Any, float]:
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    start = time.perf_counter()
    parser.parse(model)
    return builder, network, parser, time.perf_counter() - start


def build(path: str) -> dict[str, Any]:
    """An engine for batches of 1 to 4, on the fallback bodies."""
    logger = Logger()
    with open(path, "rb") as file:
        builder, network, parser, parsed = parse(file.read(), logger)
    errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
    if errors:
        return {"errors": errors}
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    images = network.get_input(0)
    shape = list(images.shape)[1:]
    profile.set_shape(images.name, [1, *shape], [2, *shape], [4, *shape])
    config.add_optimization_profile(profile)
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    return {
        "errors": logger.errors if plan is None else [],
        "bytes": 0 if plan is None else plan.nbytes,
        "layers": network.num_layers,
        "parse_s": round(parsed, 3),
        "build_s": round(time.perf_counter() - start, 3),
        "outputs": [network.get_output(i).name for i in range(network.num_outputs)],
    }


def only(model: onnx.ModelProto, kept: int) -> bytes:
    """The model with one node that asks for a plugin; the others are left their bodies."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for number, node in enumerate(n for n in changed.graph.node if n.domain == DOMAIN):
        if number != kept:
            others = [a for a in node.attribute if not a.name.startswith("plugin_")]
            del node.attribute[:]
            node.attribute.extend(others)
    return changed.SerializeToString()


def probe(library: str, path: str) -> dict[str, Any]:
    """Lets the parser ask for every node in turn; the probe refuses, which ends each parse."""
    trt.get_plugin_registry().load_library(library)
    model = onnx.load(path)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    refused = []
    for number in range(len(nodes)):
        _, _, parser, _ = parse(only(model, number), Logger())
        refused += [str(parser.get_error(i)) for i in range(parser.num_errors)]
    return {"nodes": len(nodes), "refused": refused}


if __name__ == "__main__":
    done = {"build": build, "probe": probe}[sys.argv[1]](*sys.argv[2:])
    sys.stdout.write(json.dumps(done) + "\n")
    sys.stdout.flush()
    os._exit(0)
