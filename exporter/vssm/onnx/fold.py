"""Graph passes after translation: weights folded, and what changes nothing removed."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

# Weights are folded whatever their size: -exp(A_log), stacked and flipped weights are constants.
_NO_LIMIT: Final = 2**62
# Of onnxscript's rules, those that our traces meet, by the operator that each starts from: a rule
# is tried at every node, and all of them together took half of the time of these passes.
_RULES: Final = {
    "Add": [rules.add_0_rule],
    "Sub": [rules.sub_0_rule],
    "Mul": [rules.mul_by_1_rule],
    "Div": [rules.div_by_1_rule],
    "Dropout": [rules.dropout_zero_rule, rules.dropout_inference_rule],
    "Slice": [rules.collapse_slice_rule, rules.collapse_slice2_rule],
    "Cast": [rules.no_op_cast_rule, rules.cast_cast_rule],
    "Expand": [rules.no_op_expand_rule],
    "Transpose": [rules.no_op_transpose_rule, rules.transpose_transpose_rule],
    "Unsqueeze": [rules.unsqueeze_unsqueeze_rule],
    "Flatten": [rules.flatten_to_reshape_rule],
    "Reshape": [
        rules.materialize_reshape_shape_rule,
        rules.reshape_reshape_rule,
        rules.squeeze_reshape_1d_rule,
    ],
    "Pad": [rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule],
    "BatchNormalization": [
        rules.fuse_batchnorm_into_conv_rule,
        rules.fuse_batchnorm_into_conv_transpose_rule,
        rules.fuse_batchnorm_into_gemm_rule,
    ],
    "Conv": [rules.remove_optional_bias_from_conv_rule],
    "ConvTranspose": [rules.remove_optional_bias_from_conv_transpose_rule],
    "Gemm": [rules.remove_optional_bias_from_gemm_rule],
}


def fold_weights(model: ir.Model) -> None:
    """Compute everything that depends on weights alone, then drop what nothing reads."""
    common.InlinePass()(model)
    operators = {node.op_type for node in model.graph}
    known = [rule for op in _RULES if op in operators for rule in _RULES[op]]
    rewrite = RewritePass(known) if known else None  # which refuses to have none
    unused = common.RemoveUnusedNodesPass()
    for _ in range(2):  # a reshape whose shape was computed is simplified once that is folded
        optimizer.fold_constants(model, onnx_shape_inference=True)
        if rewrite is not None:
            rewrite(model)
        unused(model)
    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)
    optimizer.fold_constants(
        model, onnx_shape_inference=False, input_size_limit=_NO_LIMIT, output_size_limit=_NO_LIMIT
    )
    unused(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
