"""What the operators refuse, in a run and while tracing: value, rule and remedy in the message."""

from __future__ import annotations

import re

import pytest
import torch
from cases import EXTRA, gather_case, scan_case, scatter_case
from torch._subclasses.fake_tensor import FakeTensorMode

from vssm.ops import operators as ops
from vssm.ops.spec import OPERATORS

FIRST = (torch.arange(5) == 0).int()
# What is wrong: an operand, how it goes wrong, what the message says.
BAD_SCANS = {
    "rank": ("u", lambda x: x[0], r"u\.shape=\(5, 2, 3\).*rank"),
    "seqlen": ("delta", lambda x: x[:, :4], r"delta\.shape=.*seqlen=5"),
    "batch": ("B", lambda x: x[:1], r"B\.shape=.*batch=2"),
    "d_state": ("C", lambda x: x[..., :1], r"C\.shape=.*d_state=2"),
    "states of A": ("A", lambda x: x.repeat(1, 1, 2), r"A\.shape=.*1\|d_state 1 or d_state=2"),
    "bias rows": ("delta_bias", lambda x: x[:1], r"delta_bias\.shape=.*Kd=2"),
    "order's batch": ("order", lambda x: x.repeat(3, 1, 1), r"order\.shape=.*1 or batch=2"),
    "gap's directions": ("gap", lambda x: x[:, :1], r"gap\.shape=.*K=2"),
    "K axis": ("A", lambda x: x.repeat(2, 1, 1)[:3], r"Ka=3.*neither 1 nor K=2"),
    "u's K axis": ("u", lambda x: x.repeat(1, 1, 2, 1), r"Ku=4.*neither 1 nor K=2"),
    "mixed types": ("delta", torch.Tensor.half, r"delta\.dtype=float16.*must be float32"),
    "integer u": ("u", torch.Tensor.int, r"=\(int32\).*must be one of float32 \| float16"),
    "half A": ("A", torch.Tensor.half, r"A\.dtype=float16.*must be float32"),
    "float64 D": ("D", torch.Tensor.double, r"D\.dtype=float64.*must be float32"),
    "long order": ("order", torch.Tensor.long, r"order\.dtype=int64.*must be int32"),
}
# The same where only a run can see it.
BAD_VALUES = {
    "repeated order": ("order", torch.zeros_like, r"order with values 0 to 0.*permutation"),
    "high order": ("order", lambda x: x + 1, r"order with values 1 to 5.*permutation"),
    "negative order": ("order", lambda x: x - 1, r"order with values -1 to 3.*permutation"),
    "gap 0": ("gap", lambda x: x * (1 - FIRST.roll(2)), r"gap with values 0 to .*at least 1"),
    "first gap": ("gap", lambda x: x - 9 * FIRST, r"gap with values -9 to .*not negative there"),
}
BAD_GATHERS = {
    "rank": ("score", lambda x: x[0], r"score\.shape=\(5,\).*rank"),
    "position's batch": ("position", lambda x: x.repeat(2, 1)[:3], r"position\.shape=.*batch=2"),
    "position's seqlen": ("position", lambda x: x[:, :4], r"position\.shape=.*seqlen=5"),
    "x's seqlen": ("x0", lambda x: x[:, :4], r"x0\.shape=.*seqlen=5"),
    "long position": ("position", torch.Tensor.long, r"position\.dtype=int64.*must be int32"),
    "half score": ("score", torch.Tensor.half, r"score\.dtype=float16.*must be float32"),
    "float64 score": ("score", torch.Tensor.double, r"score\.dtype=float64.*must be float32"),
    "x without width": ("x0", lambda x: x[..., :0], r"d0=0.*at least 1"),
}
BAD_SCATTERS = {
    "rank": ("base", lambda x: x[0], r"base\.shape=\(12, 3\).*rank"),
    "too many": ("base", lambda x: x[:, :4], r"seqlen=5 is outside \[1, 4\]"),
    "x's width": ("x", lambda x: x[..., :2], r"x\.shape=.*d=3"),
    "x's batch": ("x", lambda x: x[:1], r"x\.shape=.*batch=2"),
    "x's type": ("x", torch.Tensor.half, r"x\.dtype=float16.*must be float32"),
    "position's batch": ("position", lambda x: x.repeat(2, 1)[:3], r"position\.shape=.*batch=2"),
    "long position": ("position", torch.Tensor.long, r"position\.dtype=int64.*must be int32"),
}
BAD_PLACES = {
    "outside": ("position", lambda x: x + 12, r"position with values .* is outside \[0, 11\]"),
    "negative": ("position", lambda x: -1 - x, r"position with values -.* is outside \[0, 11\]"),
    "twice": ("position", torch.zeros_like, r"position with values 0 to 0 must be distinct"),
}
BAD_ATTRIBUTES = {
    "softplus": ("SelectiveScan", (2, 0, 1.0), r"delta_softplus=2.*0 or 1"),
    "by step": ("SelectiveScan", (1, -1, 1.0), r"params_by_step=-1.*0 or 1"),
    "scale": ("GatedSelectiveScan", (1, 0, float("inf")), r"scale=inf.*finite"),
    "nan scale": ("SelectiveScanConstantGap", (1, 0, float("nan")), r"scale=nan.*finite"),
    "none kept": ("TokenGather", (0, -1), r"num_keep=0 is outside \[1, 5\]"),
    "too many kept": ("TokenGather1", (6, -1), r"num_keep=6 is outside \[1, 5\]"),
    "protected": ("TokenGather", (3, -2), r"protected_position=-2.*-1 for none"),
}


def _case(name):
    if name in EXTRA:
        return scan_case(seqlen=5, d_inner=3, d_state=2, batch=2, extra=EXTRA[name])
    return gather_case(seqlen=5, widths=(3, 2)[: 2 - name.endswith("1")])


def _assert_refused(name, case, message, *attributes, tracing):
    arguments = [case[o.name] for o in OPERATORS[name].inputs]
    call = ops.torch_op(OPERATORS[name], "reference")  # the kernels have words of their own
    attributes = attributes or ((3, -1) if "Gather" in name else ())
    with pytest.raises(ValueError, match=message) as caught:
        call(*arguments, *attributes)
    text = str(caught.value)
    assert re.fullmatch(r"[^;]*(=|with values )\S+ [^;]+; [^;]+", text), text
    if tracing:
        with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
            call(*(mode.from_tensor(t) for t in arguments), *attributes)


@pytest.mark.parametrize("bad", [*BAD_SCANS, *BAD_VALUES])
@pytest.mark.parametrize("name", EXTRA)
def test_bad_scan_input(name, bad):
    operand, spoil, message = (BAD_SCANS | BAD_VALUES)[bad]
    case = _case(name)
    case[operand] = spoil(case[operand])
    _assert_refused(name, case, message, tracing=bad in BAD_SCANS)


@pytest.mark.parametrize(
    ("name", "operand", "message"),
    [
        ("GatedSelectiveScan", "z", r"z\.shape=.*d_inner=3"),
        ("SelectiveScanConstantGap", "delta0", r"delta0\.shape=.*d_inner=3"),
    ],
)
def test_bad_last_scan_input(name, operand, message):
    case = _case(name)
    case[operand] = case[operand][..., :2]
    _assert_refused(name, case, message, tracing=True)


@pytest.mark.parametrize("bad", BAD_GATHERS)
@pytest.mark.parametrize("name", ["TokenGather", "TokenGather1"])
def test_bad_gather_input(name, bad):
    operand, spoil, message = BAD_GATHERS[bad]
    case = _case(name)
    if bad == "position's batch":
        case[operand] = case[operand][:1].repeat(2, 1)
    case[operand] = spoil(case[operand])
    _assert_refused(name, case, message, tracing=True)


@pytest.mark.parametrize("bad", [*BAD_SCATTERS, *BAD_PLACES])
def test_bad_scatter_input(bad):
    operand, spoil, message = (BAD_SCATTERS | BAD_PLACES)[bad]
    case = scatter_case(full_seqlen=12, seqlen=5, width=3, batch=2)
    case[operand] = spoil(case[operand])
    _assert_refused("TokenScatter", case, message, tracing=bad in BAD_SCATTERS)


@pytest.mark.parametrize("bad", BAD_ATTRIBUTES)
def test_bad_attribute(bad):
    name, attributes, message = BAD_ATTRIBUTES[bad]
    _assert_refused(name, _case(name), message, *attributes, tracing=True)


def test_pair_of_gather_types():
    case = _case("TokenGather")
    case["x0"] = case["x0"].bfloat16()
    message = r"\(T0, T1\)=\(bfloat16, float16\).*float16, float32"
    _assert_refused("TokenGather", {**case, "x1": case["x1"].half()}, message, tracing=True)


def test_sizes_out_of_range():
    wide = scan_case(seqlen=2, d_inner=1, d_state=257)
    _assert_refused("SelectiveScan", wide, r"d_state=257 is outside \[1, 256\]", tracing=True)
    assert ops.selective_scan(**scan_case(seqlen=2, d_inner=1, d_state=256)).shape == (1, 2, 1)
    case = _case("SelectiveScan")
    case |= {k: case[k][:, :0] for k in ("u", "delta", "B", "C")}
    case |= {k: case[k][..., :0] for k in ("order", "gap")}
    _assert_refused("SelectiveScan", case, r"seqlen=0.*at least 1", tracing=True)


def test_wrappers_refuse_what_no_operator_takes():
    case = _case("GatedSelectiveScan")
    with pytest.raises(ValueError, match=r"z and delta0 are both given.*multiply"):
        ops.selective_scan(**case, delta0=torch.ones(2, 3))
    for count in (0, 3):
        with pytest.raises(ValueError, match=rf"len\(xs\)={count}.*1 or 2"):
            ops.token_gather(
                torch.ones(1, 2), torch.ones(1, 2).int(), [case["u"]] * count, num_keep=1
            )
