"""Bad inputs and attributes of every operator are errors with our message, at load or at run."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from cases import EXTRA, gather_case, scan_case
from native import ONNX_TYPES, make_session, run_operator

from vssm.ops.spec import OPERATORS


def _types(name):
    spec = OPERATORS[name]
    of = {"int32": ONNX_TYPES[torch.int32]}
    return {
        o.name: of.get(o.dtype, ONNX_TYPES[torch.float32]) for o in (*spec.inputs, *spec.outputs)
    }


def test_shapes_are_inferred():
    shapes = {"u": ["n", 197, 2, 384], "score": ["n", 197], "x0": ["n", 197, 384]}
    scan = make_session("SelectiveScan", _types("SelectiveScan"), shapes=shapes)
    assert scan.get_outputs()[0].shape == ["n", 197, 384]
    outside = make_session(
        "SelectiveScan",
        _types("SelectiveScan"),
        (("direction_axis", 1),),
        shapes={"u": ["n", 2, 197, 384]},
    )
    assert outside.get_outputs()[0].shape == ["n", 197, 384]
    gather = make_session("TokenGather1", _types("TokenGather1"), (("num_keep", 9),), shapes=shapes)
    assert [o.shape for o in gather.get_outputs()] == [["n", 9], ["n", 9, 384]]


@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        ("TokenGather", (), "num_keep is missing"),
        ("TokenGather", (("num_keep", 0),), "num_keep=0 is outside"),
        ("TokenGather1", (("num_keep", 198),), "num_keep=198 is outside"),
        ("TokenGather1", (("num_keep", 2.0),), "num_keep is not an int"),
        ("TokenGather1", (("num_keep", 9), ("protected_position", -2)), "is below -1"),
        ("SelectiveScan", (("scale", 1),), "scale is not a float"),
        ("SelectiveScan", (("delta_softplus", 2),), r"delta_softplus=2 is outside \[0, 1\]"),
        ("TokenConv", (("by_position", -1),), r"by_position=-1 is outside \[0, 1\]"),
        ("SelectiveScan", (("delta_softplus", "yes"),), "delta_softplus is not an int"),
        ("GatedSelectiveScan", (("params_by_step", 1.0),), "params_by_step is not an int"),
    ],
)
def test_bad_attributes_fail_at_load(name, attributes, message):
    shapes = {"u": ["n", 197, 2, 384], "score": ["n", 197], "x0": ["n", 197, 384]}
    with pytest.raises(Exception, match=message):
        make_session(name, _types(name), attributes, shapes=shapes)


def _cut(axis):
    return lambda t: t.narrow(axis, 0, t.shape[axis] - 1)


def _put(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def _wider(axis):
    return lambda t: torch.cat([t, t.narrow(axis, 0, 1)], axis)


SCAN_FAULTS = [
    ("u", _cut(2), r"Ku\(u\)=2 is neither 1 \(shared\) nor 3"),
    ("u", lambda t: t[:, :, 0], r"rank\(u\)=3, but it must be 4"),
    ("u", lambda t: t[None], r"rank\(u\)=5, but it must be 4"),
    ("u", _cut(1), r"seqlen\(delta\)=7, but the other inputs have 6"),
    ("u", _cut(0), r"batch\(delta\)=2, but the other inputs have 1"),
    ("u", lambda t: t[..., :0], r"d_inner=0 is outside \[1,"),
    ("u", lambda t: t[:, :0], r"seqlen=0 is outside \[1,"),
    ("delta", _cut(2), r"Kd\(delta\)=2 is neither 1 \(shared\) nor 3"),
    ("delta", _cut(3), r"d_inner\(delta\)=19, but the other inputs have 20"),
    ("A", _cut(0), r"Ka\(A\)=2 is neither 1 \(shared\) nor 3"),
    ("A", _cut(1), r"d_inner\(A\)=19"),
    ("A", _cut(2), r"d_state\(A\)=15 is neither 1 \(shared\) nor 16"),
    ("A", lambda t: t[..., :0], r"d_state\(A\)=0 is neither"),
    ("B", lambda t: t.repeat(1, 1, 1, 17), r"d_state=272 is outside \[1, 256\]"),
    ("B", lambda t: t[..., :0], r"d_state=0 is outside \[1, 256\]"),
    ("B", _wider(2), r"Kb\(B\)=4 is neither 1 \(shared\) nor 3"),
    ("B", _cut(1), r"seqlen\(B\)=6"),
    ("C", _cut(2), r"Kc\(C\)=2 is neither 1 \(shared\) nor 3"),
    ("C", _cut(3), r"d_state\(C\)=15"),
    ("C", _cut(0), r"batch\(C\)=1"),
    ("D", _cut(0), r"Ks\(D\)=2 is neither 1 \(shared\) nor 3"),
    ("D", _cut(1), r"d_inner\(D\)=19"),
    ("delta_bias", _cut(0), r"Kd\(delta_bias\)=2, but the other inputs have 3"),
    ("delta_bias", _cut(1), r"d_inner\(delta_bias\)=19"),
    ("order", _wider(0), r"batch\(order\)=3 is neither 1 \(shared\) nor 2"),
    ("order", _cut(2), r"seqlen\(order\)=6"),
    ("order", _put((1, 2, 3), -1), r"order\[3\]=-1 is outside \[0, 6\]"),
    ("order", _put((1, 2, 3), 7), r"order\[3\]=7 is outside \[0, 6\]"),
    ("order", _put((0, 1, 4), 2**31 - 1), r"order\[4\]=2147483647 is outside \[0, 6\]"),
    ("order", lambda t: t * 0, r"order\[1\]=0 is there twice"),
    ("gap", _cut(1), r"directions\(gap\)=2, but the other inputs have 3"),
    ("gap", _cut(2), r"seqlen\(gap\)=6"),
    ("gap", _put((1, 0, 5), 0), r"gap\[5\]=0 is below 1"),
    ("gap", _put((0, 2, 1), -(2**31)), r"gap\[1\]=-2147483648 is below 1"),
    ("gap", _put((0, 2, 0), -1), r"gap\[0\]=-1 is below 0"),
    ("z", _cut(2), r"d_inner\(z\)=19"),
    ("z", _cut(1), r"seqlen\(z\)=6"),
    ("z", lambda t: t[0], r"rank\(z\)=2, but it must be 3"),
    ("delta0", _cut(0), r"Kd\(delta0\)=2, but the other inputs have 3"),
    ("delta0", _cut(1), r"d_inner\(delta0\)=19"),
]


@pytest.mark.parametrize(
    ("where", "change", "message"),
    SCAN_FAULTS,
    ids=lambda v: v[:30] if isinstance(v, str) else None,
)
def test_bad_scan_inputs_are_refused(where, change, message):
    name = {"z": "GatedSelectiveScan", "delta0": "SelectiveScanConstantGap"}.get(
        where, "SelectiveScan"
    )
    options = {"seqlen": 7, "d_inner": 20, "directions": 3, "batch": 2, "per_image": True}
    case = scan_case(**options, extra=EXTRA[name])
    case[where] = change(case[where]).contiguous()
    session = make_session(name, _types(name))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match=message):
        session.run(None, {n: t.numpy() for n, t in case.items()})


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("scale", float("nan"), "scale=nan is not finite"),
        ("scale", float("-inf"), "scale=-inf is not finite"),
        ("delta_softplus", 2, r"delta_softplus=2 is outside \[0, 1\]"),
        ("params_by_step", -1, r"params_by_step=-1 is outside \[0, 1\]"),
    ],
)
def test_bad_scan_attributes_are_refused(attribute, value, message):
    with pytest.raises(Exception, match=message):
        run_operator("SelectiveScan", scan_case(seqlen=3), **{attribute: value})


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("score", lambda t: t[0], "score has rank 1"),
        ("score", _cut(1), r"shape\(position\)=\(3, 9\) is neither \(1, 8\) nor \(3, 8\)"),
        ("score", lambda t: t[:, :2], r"num_keep=4 is outside \[1, 2\]"),
        ("position", _cut(0), r"shape\(position\)=\(2, 9\) is neither \(1, 9\) nor \(3, 9\)"),
        ("position", lambda t: t[0], "position has rank 1"),
        ("x0", _cut(1), r"shape\(x0\)=\(3, 8, ...\), but score has \(3, 9\)"),
        ("x1", _cut(0), r"shape\(x1\)=\(2, 9, ...\), but score has \(3, 9\)"),
        ("x1", lambda t: t[None], r"rank\(x1\)=4, but it must be 3"),
    ],
)
def test_bad_gather_inputs_are_refused(where, change, message):
    case = gather_case(seqlen=9, batch=3)
    case[where] = change(case[where]).contiguous()
    session = make_session("TokenGather", _types("TokenGather"), (("num_keep", 4),))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match=message):
        session.run(None, {n: t.numpy() for n, t in case.items()})


def test_protected_position_below_none_is_refused():
    with pytest.raises(Exception, match="protected_position=-2 is below -1"):
        run_operator("TokenGather", gather_case(), num_keep=3, protected_position=-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_types_without_a_kernel_are_refused_at_load(dtype):
    types = {
        n: t if t == ONNX_TYPES[torch.int32] else ONNX_TYPES[dtype]
        for n, t in _types("SelectiveScan").items()
    }
    with pytest.raises(Exception, match=r"SelectiveScan|type"):
        make_session("SelectiveScan", types)
