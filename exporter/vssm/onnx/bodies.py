"""Fallback body of the three scan operators in standard ONNX operators.

The recurrence and its letters are those of `reference.selective_scan`. Every operand becomes rows
(seqlen, batch, K, width) in the order of the steps by one Gather on its flattened form, which also
spreads a shared direction axis; a Scan runs over the steps; a ScatterND brings the rows home.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from vssm.onnx.body_builder import BodyBuilder, NodeList
from vssm.ops.spec import OperatorSpec


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
    shape = body.op("Concat", shape, body.size(A, 2), axis=0)
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
    """The gate z / (1 + exp(-z)): exact for large negative z, unlike runtimes' Sigmoid."""
    e = body.op("Exp", body.op("Neg", z))
    return body.op("Div", z, body.op("Add", e, body.number(1.0)))
