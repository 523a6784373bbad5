"""Fallback body of `TokenGather` and `TokenGather1` in standard ONNX operators.

The order among tokens is that of `reference.token_gather`. TopK's indices are never used on
scores: runtimes break ties differently and put NaN in front. Its values give the threshold,
counting settles the tokens that equal it.
"""

from __future__ import annotations

import math

import onnx

from vssm.onnx.body_builder import BodyBuilder
from vssm.ops.spec import OperatorSpec


def gather_function(spec: OperatorSpec, opset: int) -> onnx.FunctionProto:
    """Body of `TokenGather` or `TokenGather1`.

    Args:
        spec: row of the operator table.
        opset: version of the standard operators that the model imports, 18 to 20.
    """
    body = BodyBuilder(spec)
    score, position, *xs = body.inputs.values()
    batch, seqlen = body.size(score, 0), body.size(score, 1)
    num_keep = body.op("Unsqueeze", body.attribute("num_keep"), body.integers(0))
    position = body.op("Expand", position, body.op("Shape", score))
    keep = _keep(body, score, _protected(body, position), num_keep)
    slot = _ascending_slots(body, keep, seqlen, num_keep)
    image = body.op("Mul", body.count_to(batch), seqlen)
    row = body.op("Add", slot, body.op("Unsqueeze", image, body.integers(1)))  # (b, num_keep)
    tables = [body.op("Reshape", position, body.integers(-1))]
    tables += [body.op("Flatten", x, axis=2) for x in xs]
    # Rows are copied, never computed with: each y has its x's type and bits.
    return body.function([body.op("Gather", table, row, axis=0) for table in tables], opset)


def _protected(body: BodyBuilder, position: str) -> str:
    """(b, seqlen) bool: the token that is always kept; none where the attribute is -1."""
    wanted = body.attribute("protected_position")
    here = body.op("Equal", body.cast(position, "INT64"), wanted)
    return body.op("And", here, body.op("GreaterOrEqual", wanted, body.integer(0)))


def _keep(body: BodyBuilder, score: str, protected: str, num_keep: str) -> str:
    """(b, seqlen) int32, 1 for exactly `num_keep` tokens of each image."""
    nan = body.op("IsNaN", score)
    number = body.op("Where", nan, body.number(-math.inf), score)
    number = body.op("Where", protected, body.number(math.inf), number)
    best, _ = body.ops("TopK", number, num_keep, outputs=2, axis=1, largest=1, sorted=1)
    # Gather refuses an index outside [0, num_keep); Slice would read past an empty tensor.
    last = body.op("Sub", num_keep, body.integers(1))
    threshold = body.op("Gather", best, last, axis=1)
    tied = body.op("Equal", number, threshold)
    # Four groups side by side, best first; one running count over all of them ranks the tokens,
    # the lower slot first within a group.
    free = body.op("Not", protected)
    tied_free = body.op("And", tied, free)
    groups = [
        body.op("Greater", number, threshold),
        body.op("And", tied, protected),  # beside numbers that are +inf
        body.op("And", tied_free, body.op("Not", nan)),
        body.op("And", tied_free, nan),  # beside numbers that are -inf
    ]
    member = body.op("Concat", *(body.cast(g, "INT32") for g in groups), axis=1)
    rank = body.op("CumSum", member, body.integer(1))
    within = body.op("LessOrEqual", rank, body.cast(num_keep, "INT32"))
    chosen = body.op("Mul", member, body.cast(within, "INT32"))
    grouped = body.op("Concat", body.size(score, 0), body.integers(4, -1), axis=0)
    chosen = body.op("Reshape", chosen, grouped)  # (b, 4, seqlen)
    return body.op("ReduceSum", chosen, body.integers(1), keepdims=0)


def _ascending_slots(body: BodyBuilder, keep: str, seqlen: str, num_keep: str) -> str:
    """(b, num_keep) int64: the kept slots; their keys seqlen - slot are distinct and exact."""
    key = body.cast(body.op("Sub", seqlen, body.count_to(seqlen)), "FLOAT")
    key = body.op("Mul", body.cast(keep, "FLOAT"), key)
    return body.ops("TopK", key, num_keep, outputs=2, axis=1, largest=1, sorted=1)[1]
