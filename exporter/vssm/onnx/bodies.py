"""Fallback body of the three scan operators in standard ONNX operators.

The recurrence and its letters are those of `reference.selective_scan`. Every operand becomes rows
(seqlen, batch, K, width) in the order of the steps by one Gather on its flattened form, which also
spreads a shared direction axis; a Scan runs over the steps; a ScatterND brings the rows home.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from vssm.onnx.body_builder import BodyBuilder, NodeList
from vssm.onnx.options import SUPPORTED_OPSETS
from vssm.ops.spec import OPERATORS, SCAN_OPERATORS, OperatorSpec


@dataclass(frozen=True)
class _Frame:
    """Index tensors that all operands share, int64; L seqlen, b batch, K directions."""

    batch: str  # sizes: one element each
    seqlen: str
    directions: str
    direction: str  # (K,): 0 .. K - 1
    step: str  # (L, 1, 1): 0 .. L - 1
    token_row: str  # (L, b, K): b * seqlen + the token of the step
    param_row: str  # (L, b, 1 or K): the same for the token that delta, B and C belong to


def scan_function(spec: OperatorSpec, opset: int) -> onnx.FunctionProto:
    """Body of `SelectiveScan`, `GatedSelectiveScan` or `SelectiveScanConstantGap`.

    Args:
        spec: row of the operator table.
        opset: version of the standard operators that the model imports, 18 to 20.
    """
    body = BodyBuilder(spec)
    x = body.inputs
    frame = _frame(body, x["u"], x["order"])
    u = _rows(body, frame, x["u"], frame.token_row)
    raw = body.op("Add", _rows(body, frame, x["delta"], frame.param_row), x["delta_bias"])
    dt = body.op(
        "Where",
        body.cast(body.attribute("delta_softplus"), "BOOL"),
        _softplus(body, raw),
        raw,
    )
    y = _recurrence(
        body,
        span=_span(body, frame, x, dt),
        inject=body.op("Mul", dt, u),
        A=x["A"],
        B=_rows(body, frame, x["B"], frame.param_row),
        C=_rows(body, frame, x["C"], frame.param_row),
    )
    # The skip joins before the sum over directions: each direction adds its own.
    y = _sum_directions(body, frame, body.op("Add", y, body.op("Mul", x["D"], u)), x["u"])
    y = body.op("Mul", y, body.attribute("scale"))
    if "z" in x:
        y = body.op("Mul", y, _silu(body, body.cast(x["z"], "FLOAT")))
    return body.function([body.op("CastLike", y, x["u"])], opset)


def _frame(body: BodyBuilder, u: str, order: str) -> _Frame:
    batch, seqlen, directions = body.size(u, 0), body.size(u, 1), body.size(order, 1)
    image = body.op("Mul", body.count_to(batch), seqlen)
    image = body.op("Unsqueeze", image, body.integers(1))  # (b, 1): first row of each image
    step = body.op("Unsqueeze", body.count_to(seqlen), body.integers(1, 2))
    token = body.op("Transpose", body.cast(order, "INT64"), perm=[2, 0, 1])  # (L, 1 or b, K)
    token_row = body.op("Add", token, image)
    by_step = body.cast(body.attribute("params_by_step"), "BOOL")
    return _Frame(
        batch=batch,
        seqlen=seqlen,
        directions=directions,
        direction=body.count_to(directions),
        step=step,
        token_row=token_row,
        param_row=body.op("Where", by_step, body.op("Add", step, image), token_row),
    )


def _rows(body: BodyBuilder, frame: _Frame, operand: str, row: str) -> str:
    """(L, b, K, width) float32 of an operand (b, L, 1 or K, width): row `row`, direction k or 0."""
    shared = body.size(operand, 2)
    offset = body.op("Mod", frame.direction, shared)
    index = body.op("Add", body.op("Mul", row, shared), offset)
    table = body.op("Flatten", body.cast(operand, "FLOAT"), axis=3)
    return body.op("Gather", table, index, axis=0)


def _softplus(body: BodyBuilder, x: str) -> str:
    """log(1 + exp(x)) = relu(x) + log1p(e), e = exp(-|x|): relative error below 6e-7 everywhere.

    Not the Softplus operator: OpenVINO's is off by a third at -13. Below 0.1 log(1 + e) would lose
    digits of e, and six terms of the series e - e^2/2 + ... - e^6/6 are good to 2e-7.
    """
    e = body.op("Exp", body.op("Neg", body.op("Abs", x)))
    series = body.number(1 / 6)
    for n in range(5, 0, -1):
        series = body.op("Sub", body.number(1 / n), body.op("Mul", e, series))
    log1p = body.op(
        "Where",
        body.op("Less", e, body.number(0.1)),
        body.op("Mul", e, series),
        body.op("Log", body.op("Add", e, body.number(1.0))),
    )
    return body.op("Add", body.op("Relu", x), log1p)


def _span(body: BodyBuilder, frame: _Frame, x: dict[str, str], dt: str) -> str:
    """(L, b, K, d_inner): what multiplies A; the gap of a first step counts as 1."""
    gap = body.op("Transpose", body.cast(x["gap"], "FLOAT"), perm=[2, 0, 1])
    one = body.number(1.0)
    # The state before the first step is 0, and 0 * exp(gap dt A) is NaN where the exponent
    # overflows or gap * dt is 0 * inf: the value must not reach the arithmetic.
    first = body.op("Equal", frame.step, body.integer(0))
    gap = body.op("Unsqueeze", body.op("Where", first, one, gap), body.integers(3))
    if "delta0" not in x:
        return body.op("Mul", gap, dt)
    extra = body.op("Mul", body.op("Sub", gap, one), x["delta0"])
    return body.op("Add", dt, extra)


def _recurrence(body: BodyBuilder, *, span: str, inject: str, A: str, B: str, C: str) -> str:
    """(L, b, K, d_inner): C_t . h_t with h_t = exp(span_t A) h_{t-1} + inject_t B_t."""
    zero = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    shape = body.op("Shape", inject, start=1, end=4)  # (b, K, d_inner)
    shape = body.op("Concat", shape, body.size(B, 3), axis=0)  # A may have one decay for all
    state = body.op("ConstantOfShape", shape, value=zero)
    # Every Unsqueeze stands outside: TensorRT cannot build one on a scan input.
    columns = [body.op("Unsqueeze", t, body.integers(4)) for t in (span, inject, C)]
    row = body.op("Unsqueeze", B, body.integers(3))
    _, _, y = body.ops("Scan", state, A, *columns, row, outputs=3, body=_step(), num_scan_inputs=4)
    return body.op("Squeeze", y, body.integers(4))


def _step() -> onnx.GraphProto:
    """One step of the scan. A is a loop state because a body may not read outer names."""
    step = NodeList("step.")
    state, A, span, inject, C, B = (step.name(n) for n in ("h", "A", "span", "inject", "C", "B"))
    decay = step.op("Exp", step.op("Mul", span, A))
    kept = step.op("Mul", decay, state)
    h = step.op("Add", kept, step.op("Mul", inject, B))
    outputs = [h, step.op("Identity", A), step.op("MatMul", h, C)]

    def float_values(names: list[str]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names]

    return helper.make_graph(
        step.nodes,
        step.name("graph"),
        float_values([state, A, span, inject, C, B]),
        float_values(outputs),
    )


def _sum_directions(body: BodyBuilder, frame: _Frame, y: str, u: str) -> str:
    """(b, L, d_inner) of y (L, b, K, d_inner): rows back in token order, summed over K."""
    d_inner = body.size(u, 3)
    home = body.op("Mul", frame.token_row, frame.directions)
    home = body.op("Add", home, frame.direction)
    shape = body.op("Concat", frame.batch, frame.seqlen, frame.directions, d_inner, axis=0)
    zero = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    table = body.op("Flatten", body.op("ConstantOfShape", shape, value=zero), axis=3)
    # A permutation fills every row once, so no reduction (which few runtimes have) is needed.
    table = body.op("ScatterND", table, body.op("Unsqueeze", home, body.integers(3)), y)
    return body.op("ReduceSum", body.op("Reshape", table, shape), body.integers(2), keepdims=0)


def _silu(body: BodyBuilder, z: str) -> str:
    """The gate z sigmoid(z), with exp of negative numbers only.

    z / (1 + exp(-z)) is 0 from -88.7 on, where exp overflows, and silu still -3e-37; the Sigmoid of
    some runtimes ends sooner. -inf gives -inf * 0, NaN, as in PyTorch.
    """
    zero, one = body.number(0.0), body.number(1.0)
    shrunk = body.op("Exp", body.op("Neg", body.op("Abs", z)))
    above = body.op("Where", body.op("Less", z, zero), shrunk, one)
    return body.op("Mul", z, body.op("Div", above, body.op("Add", shrunk, one)))


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
    index = _ascending_slots(body, keep, seqlen, num_keep)
    image = body.op("Mul", body.count_to(batch), seqlen)
    row = body.op("Add", index, body.op("Unsqueeze", image, body.integers(1)))  # (b, num_keep)
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
    # the lower index first within a group.
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
    """(b, num_keep) int64: the kept indices; their keys seqlen - index are distinct and exact."""
    key = body.cast(body.op("Sub", seqlen, body.count_to(seqlen)), "FLOAT")
    key = body.op("Mul", body.cast(keep, "FLOAT"), key)
    return body.ops("TopK", key, num_keep, outputs=2, axis=1, largest=1, sorted=1)[1]


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
