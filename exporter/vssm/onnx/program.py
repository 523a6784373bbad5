"""A program of torch.export to a ModelProto: translation, graph passes, fallback bodies last."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import onnx
import onnx_ir as ir
import torch
from onnxscript import values
from torch.export import ExportedProgram

from vssm._version import __version__
from vssm.onnx import onnx_passes
from vssm.onnx.bodies_folded import build_functions
from vssm.onnx.describe import used_operators
from vssm.onnx.schemas import register_schemas
from vssm.ops import operators as ops
from vssm.ops.spec import DOMAIN, OPERATOR_VERSION, OPERATORS, PLUGIN_ATTRIBUTES, OperatorSpec

BATCH: Final = "batch"
# ONNX IR 10: the newest that ONNX Runtime 1.20 and TensorRT 10 both read.
_IR_VERSION: Final = 10


def program_to_proto(
    program: ExportedProgram,
    opset: int,
    *,
    inputs: Sequence[str],
    names: Sequence[str],
    public: int,
    dynamic_batch: bool = True,
) -> onnx.ModelProto:
    """A traced module `model` of a wrapper as a ModelProto, custom nodes at top level.

    Args:
        program: what torch.export made; its wrapper holds the model as attribute `model`.
        opset: 18 to 20.
        inputs: names of the inputs.
        names: names of the outputs.
        public: how many of the outputs stay outputs; the others are named inner values.
        dynamic_batch: whether the first axis is symbolic.
    """
    register_schemas()
    graph = _translate(program, opset)
    onnx_passes.fold_weights(graph)
    onnx_passes.rename_inputs(graph, inputs, BATCH if dynamic_batch else None)
    onnx_passes.name_outputs(graph, names, public=public)
    onnx_passes.strip_initializer_prefix(graph, "model.")
    onnx_passes.tidy(graph)
    graph.ir_version = _IR_VERSION
    graph.opset_imports.clear()
    graph.opset_imports.update({"": opset, DOMAIN: OPERATOR_VERSION})
    graph.producer_name, graph.producer_version = "vssm", __version__
    proto = ir.to_proto(graph)
    # Last: optimisers and version converters inline or drop functions.
    proto.functions.extend(build_functions(used_operators(proto), opset))
    return proto


def _translate(program: ExportedProgram, opset: int) -> ir.Model:
    with torch.no_grad(), quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            custom_translation_table={ops.torch_op(o): _translation(o) for o in OPERATORS.values()},
            verbose=False,
        )
    if exported is None:
        raise AssertionError("torch.onnx.export returns a program when it is given no file")
    model: ir.Model = exported.model
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that it could translate too, such as torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _translation(op: OperatorSpec) -> Callable[..., Any]:
    """How torch's exporter writes one of our operators: a node of our domain."""
    build = getattr(values.Opset(DOMAIN, OPERATOR_VERSION), op.name)
    inputs = len(op.inputs)

    def translate(*args: Any) -> Any:
        given = dict(zip((a.name for a in op.attributes), args[inputs:], strict=False))
        defaults = {a.name: a.default for a in op.attributes}
        return build(*args[:inputs], **{**defaults, **given}, **PLUGIN_ATTRIBUTES)

    return translate
