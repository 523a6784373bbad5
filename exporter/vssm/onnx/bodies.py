"""Fallback bodies of the operators in standard ONNX operators.

A scan's recurrence and its letters are those of `reference.selective_scan`. Every operand becomes
rows (seqlen, batch, K, width) in the order of the steps by one Gather on its flattened form, which
also spreads a shared direction axis; a Scan runs over the steps; a ScatterND brings the rows home.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from vssm.onnx.body_builder import BodyBuilder, NodeList
from vssm.onnx.options import SUPPORTED_OPSETS
from vssm.ops.spec import (
    GATHER_OPERATORS,
    OPERATORS,
    SCAN_OPERATORS,
    TOKEN_CONV,
    TOKEN_CONV2D,
    TOKEN_SCATTER,
    OperatorSpec,
)


@dataclass(frozen=True)
class _Frame:
    """Index tensors that all operands share, int64; L seqlen, b batch, K directions."""

    batch: str  # sizes: one element each
    seqlen: str
    directions: str
    direction: str  # (K,): 0 .. K - 1
    axis: str  # direction_axis, one element
    outside: str  # bool: direction_axis is 1
    by_direction: str  # one element: rows of an operand from a direction to the next
    image: str  # (b, 1): 0, seqlen, .. (b - 1) seqlen
    step: str  # (L, 1, 1): 0 .. L - 1
    token: str  # (L, 1 or b, K): the token of each step
    owner: str  # (L, 1 or b, 1 or K): the token that delta, B and C belong to


def scan_function(spec: OperatorSpec, opset: int) -> onnx.FunctionProto:
    """Body of `SelectiveScan`, `GatedSelectiveScan` or `SelectiveScanConstantGap`.

    Args:
        spec: row of the operator table.
        opset: version of the standard operators that the model imports, 18 to 20.
    """
    body = BodyBuilder(spec)
    x = body.inputs
    frame = _frame(body, x["u"], x["order"])
    u = _rows(body, frame, x["u"], frame.token)
    raw = body.op("Add", _rows(body, frame, x["delta"], frame.owner), x["delta_bias"])
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
        B=_rows(body, frame, x["B"], frame.owner),
        C=_rows(body, frame, x["C"], frame.owner),
    )
    # The skip joins before the sum over directions: each direction adds its own.
    y = _sum_directions(body, frame, body.op("Add", y, body.op("Mul", x["D"], u)), x["u"])
    y = body.op("Mul", y, body.attribute("scale"))
    if "z" in x:
        y = body.op("Mul", y, _silu(body, body.cast(x["z"], "FLOAT")))
    return body.function([body.op("CastLike", y, x["u"])], opset)


def _frame(body: BodyBuilder, u: str, order: str) -> _Frame:
    batch, seqlen, directions = body.size(u, 0), body.size(order, 2), body.size(order, 1)
    step = body.op("Unsqueeze", body.count_to(seqlen), body.integers(1, 2))
    token = body.op("Transpose", body.cast(order, "INT64"), perm=[2, 0, 1])  # (L, 1 or b, K)
    by_step = body.cast(body.attribute("params_by_step"), "BOOL")
    axis = body.op("Unsqueeze", body.attribute("direction_axis"), body.integers(0))
    outside = body.op("Equal", axis, body.integers(1))
    image = body.op("Mul", body.count_to(batch), seqlen)
    return _Frame(
        batch=batch,
        seqlen=seqlen,
        directions=directions,
        direction=body.count_to(directions),
        axis=axis,
        outside=outside,
        by_direction=body.op("Where", outside, seqlen, body.integers(1)),
        image=body.op("Unsqueeze", image, body.integers(1)),
        step=step,
        token=token,
        owner=body.op("Where", by_step, step, token),
    )


def _rows(body: BodyBuilder, frame: _Frame, operand: str, token: str) -> str:
    """(L, b, K, width) float32 of an operand (b, L, 1 or K, width) or (b, 1 or K, L, width)."""
    shared = body.op("Gather", body.op("Shape", operand), frame.axis, axis=0)
    by_token = body.op("Where", frame.outside, body.integers(1), shared)
    direction = body.op("Mod", frame.direction, shared)
    image = body.op("Mul", frame.image, shared)
    index = body.op("Add", body.op("Mul", token, by_token), image)
    index = body.op("Add", index, body.op("Mul", direction, frame.by_direction))
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
    home = body.op("Add", frame.token, frame.image)
    home = body.op("Mul", home, frame.directions)
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


def conv_function(spec: OperatorSpec, opset: int) -> onnx.FunctionProto:
    """Body of `TokenConv`: every tap's rows by one Gather, of zeros where there is no token.

    Not the Conv operator: its number of groups is an attribute, and a body does not know d_inner.

    Args:
        spec: row of the operator table.
        opset: version of the standard operators that the model imports, 18 to 20.
    """
    body = BodyBuilder(spec)
    x, weight = body.inputs["x"], body.inputs["weight"]
    batch, seqlen, width = body.size(x, 0), body.size(x, 1), body.size(weight, 2)
    slot = _tap_slots(body, seqlen, width)  # (1 or b, K, L, width)
    image = body.op("Mul", body.count_to(batch), seqlen)
    row = body.op("Add", slot, body.op("Unsqueeze", image, body.integers(1, 2, 3)))
    nothing = body.op("Mul", batch, seqlen)  # the row of zeros behind all tokens
    row = body.op("Where", body.op("Less", slot, body.integer(0)), nothing, row)
    zero = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    zeros = body.op("Concat", body.integers(1), body.size(x, 2), axis=0)
    table = body.op(
        "Concat",
        body.op("Flatten", body.cast(x, "FLOAT"), axis=2),
        body.op("ConstantOfShape", zeros, value=zero),
        axis=0,
    )
    taps = body.op("Transpose", weight, perm=[0, 2, 1])
    products = body.op(
        "Mul",
        body.op("Gather", table, row, axis=0),  # (b, K, L, width, d_inner)
        body.op("Unsqueeze", taps, body.integers(1)),
    )
    y = body.op("ReduceSum", products, body.integers(3), keepdims=0)
    y = body.op("Add", y, body.op("Unsqueeze", body.inputs["bias"], body.integers(1)))
    active = body.cast(body.attribute("activation"), "BOOL")
    return body.function(
        [body.op("CastLike", body.op("Where", active, _silu(body, y), y), x)], opset
    )


def _tap_slots(body: BodyBuilder, seqlen: str, width: str) -> str:
    """(1 or b, K, L, width) int64: the slot that each tap of each token reads; -1 for none."""
    position = body.cast(body.inputs["position"], "INT64")
    images = body.size(position, 0)
    # Places along a line: the slots, or the positions with distances beyond the taps' reach cut.
    front = body.op("Slice", position, body.integers(0), body.integers(-1), body.integers(1))
    back = body.op("Slice", position, body.integers(1), seqlen, body.integers(1))
    by_position = body.cast(body.attribute("by_position"), "BOOL")
    apart = body.op("Min", body.op("Sub", back, front), width)
    apart = body.op("Where", by_position, apart, body.integer(1))
    # The first place is `width`, so that no tap leaves the line.
    first = body.op("Expand", width, body.op("Concat", images, body.integers(1), axis=0))
    place = body.op("CumSum", body.op("Concat", first, apart, axis=1), body.integer(1))
    line = body.op("Mul", body.op("Add", seqlen, body.integers(2)), width)
    image = body.op("Mul", body.count_to(images), line)
    place = body.op("Add", place, body.op("Unsqueeze", image, body.integers(1)))
    minus_one = helper.make_tensor("value", TensorProto.INT64, [1], [-1])
    table = body.op("ConstantOfShape", body.op("Mul", images, line), value=minus_one)
    slots = body.op("Expand", body.count_to(seqlen), body.op("Shape", place))
    table = body.op("ScatterND", table, body.op("Unsqueeze", place, body.integers(2)), slots)
    # Taps -(width - 1) .. 0 of the look back; the look ahead has them with the other sign.
    offset = body.op("Sub", body.count_to(width), body.op("Sub", width, body.integers(1)))
    sides = body.op("Unsqueeze", body.integers(1, -1), body.integers(1))
    sides = body.op("Gather", sides, body.count_to(body.size(body.inputs["weight"], 0)), axis=0)
    offset = body.op("Unsqueeze", body.op("Mul", sides, offset), body.integers(1))  # (K, 1, width)
    tap = body.op("Add", body.op("Unsqueeze", place, body.integers(1, 3)), offset)
    return body.op("Gather", table, tap, axis=0)


def conv2d_function(spec: OperatorSpec, opset: int) -> onnx.FunctionProto:
    """Body of `TokenConv2D`: tokens scattered over zeros, the Conv operator, and gathered back.

    Args:
        spec: row of the operator table.
        opset: version of the standard operators that the model imports, 18 to 20.
    """
    body = BodyBuilder(spec)
    x, weight, bias, position = body.inputs.values()
    batch, seqlen, d_inner = (body.size(x, axis) for axis in range(3))
    height, width = (
        body.op("Unsqueeze", body.attribute(name), body.integers(0))
        for name in ("grid_height", "grid_width")
    )
    places = body.op("Mul", height, width)
    by_position = body.cast(body.attribute("by_position"), "BOOL")
    place = body.cast(position, "INT64")
    # ScatterND counts from the end what is negative; outside, it is an error.
    place = body.op("Where", body.op("Less", place, body.integer(0)), places, place)
    place = body.op("Where", by_position, place, body.count_to(seqlen))
    index = _in_images(body, place, batch, seqlen)
    zero = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
    shape = body.op("Concat", batch, places, d_inner, axis=0)
    table = body.op("ConstantOfShape", shape, value=zero)
    table = body.op("ScatterND", table, index, body.cast(x, "FLOAT"))
    # Channels first, as Conv has them.
    table = body.op("Transpose", table, perm=[0, 2, 1])
    maps = body.op("Reshape", table, body.op("Concat", batch, d_inner, height, width, axis=0))
    taps = body.op("Unsqueeze", weight, body.integers(1))
    sums = body.op("Conv", maps, taps, bias, auto_pad="SAME_UPPER")
    body.refer("group")
    sums = body.op("Reshape", sums, body.op("Concat", batch, d_inner, places, axis=0))
    y = body.op("GatherND", body.op("Transpose", sums, perm=[0, 2, 1]), index)
    # silu as models outside of ours write it: the maps are large, and every pass over them counts.
    # Where there is none the gate is what Sigmoid makes of 20: 1.
    active = body.cast(body.attribute("activation"), "BOOL")
    gate = body.op("Sigmoid", body.op("Where", active, y, body.number(20.0)))
    return body.function([body.op("CastLike", body.op("Mul", y, gate), x)], opset)


def _in_images(body: BodyBuilder, place: str, batch: str, seqlen: str) -> str:
    """(b, L, 2): image and place, of places (1 or b, L).

    Not a row of a table of all images: the next image's rows are no places of this one.
    """
    shape = body.op("Concat", batch, seqlen, axis=0)
    image = body.op("Unsqueeze", body.count_to(batch), body.integers(1))
    pair = [body.op("Expand", part, shape) for part in (image, place)]
    return body.op("Concat", *(body.op("Unsqueeze", p, body.integers(2)) for p in pair), axis=2)


def scatter_function(spec: OperatorSpec, opset: int) -> onnx.FunctionProto:
    """Body of `TokenScatter`: one ScatterND of whole rows.

    Args:
        spec: row of the operator table.
        opset: version of the standard operators that the model imports, 18 to 20.
    """
    body = BodyBuilder(spec)
    base, x, position = body.inputs.values()
    batch = body.size(base, 0)
    place = body.cast(position, "INT64")
    # ScatterND counts from the end what is negative; outside, it is an error.
    outside = body.op("Less", place, body.integer(0))
    place = body.op("Where", outside, body.size(base, 1), place)
    index = _in_images(body, place, batch, body.size(x, 1))
    return body.function([body.op("ScatterND", base, index, x)], opset)


_FUNCTIONS = {
    **dict.fromkeys((spec.name for spec in SCAN_OPERATORS), scan_function),
    **dict.fromkeys((spec.name for spec in GATHER_OPERATORS), gather_function),
    TOKEN_CONV.name: conv_function,
    TOKEN_CONV2D.name: conv2d_function,
    TOKEN_SCATTER.name: scatter_function,
}


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
    return [_FUNCTIONS[name](spec, opset) for name, spec in OPERATORS.items() if name in wanted]
