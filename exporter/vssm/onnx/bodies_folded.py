"""Fallback bodies: every operator as an ONNX function, for runtimes without our library."""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from vssm.onnx.bodies import scan_function
from vssm.onnx.onnx_bodies_gather import gather_function
from vssm.ops.spec import OPERATORS, SCAN_OPERATORS

SUPPORTED_OPSETS = (18, 19, 20)


def build_functions(names: Iterable[str], opset: int) -> list[onnx.FunctionProto]:
    """Bodies of the operators that a model uses.

    Attach them last: optimisers inline or drop functions.

    Args:
        names: operator names of domain "vssm"; repeats are ignored.
        opset: version of the standard operators that the model imports; onnx.checker refuses a
            function that imports another one.

    Returns:
        One function an operator, in the order of the operator table.

    Raises:
        ValueError: a name is not in the table, or `opset` has no body.
    """
    wanted = set(names)
    unknown = sorted(wanted - OPERATORS.keys())
    if unknown:
        raise ValueError(
            f"names={unknown} are not operators of this package; known are {', '.join(OPERATORS)}"
        )
    if opset not in SUPPORTED_OPSETS:
        raise ValueError(
            f"opset={opset} has no fallback body; export with one of "
            f"{', '.join(map(str, SUPPORTED_OPSETS))}"
        )
    return [
        (scan_function if spec in SCAN_OPERATORS else gather_function)(spec, opset)
        for name, spec in OPERATORS.items()
        if name in wanted
    ]
