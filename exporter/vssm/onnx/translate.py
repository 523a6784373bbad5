"""A traced program to nodes of ONNX: the parts of torch's exporter, called one by one.

`torch.onnx.export` reads the sources of its 500 translations anew at each call, and runs every node
of the program once more to see where types have to be promoted. That was half the time of a small
export. The parts have no public names; torch 2.11 and 2.13 have them alike.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import onnx_ir as ir
import torch
from onnxscript import version_converter
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental import _config
from torch.onnx._internal.exporter import _core, _decomp, _dispatching, _registration
from torch.onnx._internal.fx.passes import type_promotion

from vssm.errors import UnsupportedError
from vssm.onnx.decompose import decomposed
from vssm.onnx.trace import quiet

_ATEN: Final = torch.ops.aten
# What the tracer notes of values: it checks the trace, and no number depends on it.
_NOTES: Final = frozenset(
    {
        _ATEN.sym_constrain_range_for_size.default,
        _ATEN._assert_async.default,
        _ATEN._assert_async.msg,
        _ATEN._assert_scalar.default,
        _ATEN._assert_tensor_metadata.default,
    }
)


def translated(
    program: ExportedProgram, opset: int, translations: Mapping[Any, Callable[..., Any]]
) -> ir.Model:
    """A program as a model of one version of the standard operators, nothing folded.

    Args:
        program: what torch.export made; it is changed.
        opset: 18 to 20.
        translations: how operators are written that torch's exporter does not know, or otherwise.
    """
    registry = copy.copy(_torchlib(opset))
    registry.functions = {target: list(found) for target, found in registry.functions.items()}
    for op, function in translations.items():
        registry.register_op(op, function)
    table = {op: way for op, way in _decompositions(opset).items() if op not in translations}
    # Sizes 0 and 1 stay what they are called, as in torch.onnx.export.
    oblivious = _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), quiet(), oblivious:
        program = decomposed(program, table)
        for module in program.graph_module.modules():
            _promote(module)
            for node in module.graph.nodes:
                if node.target in _NOTES:
                    module.graph.erase_node(node)
        _refuse_unknown(program, registry)
        exported = _core._exported_program_to_onnx_program(program, registry=registry)
    model: ir.Model = exported.model
    version_converter.convert_version(model, opset, fallback=True)
    return model


def _refuse_unknown(program: ExportedProgram, registry: Any) -> None:
    """Refuse operators that have no form in ONNX, all of them at once."""
    unknown: dict[str, str] = {}
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if _dispatching.dispatch(node, registry)[0] is None:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            place = f" in {stack[-1][0].rpartition('.')[2] or 'the model'}" if stack else ""
            unknown.setdefault(f"{node.target}", place)
    if unknown:
        raise UnsupportedError(
            f"{', '.join(name + place for name, place in unknown.items())}: torch's exporter "
            "writes no such operator in ONNX; compute it from others in the forward pass"
        )


@functools.cache
def _torchlib(opset: int) -> Any:
    """The translations that torch and onnxscript have."""
    with quiet():
        return _registration.ONNXRegistry.from_torchlib(opset_version=opset)


@functools.cache
def _decompositions(opset: int) -> dict[Any, Callable[..., Any]]:
    """What operators without a translation are, by operator."""
    known = set(_decomp.get_onnx_implemented_overloads(_torchlib(opset)))
    return _decomp.create_onnx_friendly_decomposition_table(known)


@functools.cache
def _rules() -> Any:
    return type_promotion.TypePromotionTable()


class _Promotion(type_promotion._TypePromotionInterpreter):
    """Torch's pass, which runs nothing whose value is known from the trace."""

    def run_node(self, n: Node) -> Any:
        """The value of a node, cast where it mixes types."""
        if n.op != "call_function" or "val" not in n.meta:
            return super().run_node(n)
        if rule := type_promotion.get_type_promotion_rule(n, self.type_promotion_table):
            with self._set_current_node(n):
                self._maybe_promote_node(n, rule)
        return n.meta["val"]


def _promote(module: Any) -> None:
    """Write the casts that torch's operators make of themselves where they mix types."""
    assert isinstance(module, GraphModule)
    step = type_promotion.InsertTypePromotion(module, _rules())
    step.interpreter = _Promotion(module, _rules())
    step.run()
