"""The torch.library operators: registration, gradients, fake kernels, tracing."""

from __future__ import annotations

import pytest
import torch
from cases import (
    EXTRA,
    conv_case,
    gather_case,
    grid_case,
    scan_case,
    scan_reference_arguments,
    scatter_case,
    small_case,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from vssm.ops import operators as ops
from vssm.ops import reference
from vssm.ops.spec import GATHER_OPERATORS, OPERATORS

# test_aot_dispatch_dynamic asks torch.autograd for gradients of every output, the gather's integer
# kept_position among them, and fails in torch itself; the gradients have a test of their own.
SCAN_UTILS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
GATHER_UTILS = SCAN_UTILS[:-1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _scan(name, dtype=torch.float32, **options):
    """The case of an operator, and its arguments in order."""
    sizes = {"seqlen": 5, "d_inner": 3, "d_state": 2, "batch": 2, **options}
    case = scan_case(extra=EXTRA[name], dtype=dtype, **sizes)
    if dtype == torch.float64:
        case = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
    return case


def _gather(name, dtypes=(torch.float32, torch.float32), **options):
    count = len(OPERATORS[name].outputs) - 1
    case = gather_case(seqlen=5, widths=(3, 2)[:count], dtypes=dtypes[:count], **options)
    if dtypes[0] == torch.float64:
        case["score"] = case["score"].double()
    return case


def _arguments(name, case):
    return tuple(case[o.name] for o in OPERATORS[name].inputs)


def _call(name, case, *attributes):
    return ops.torch_op(OPERATORS[name])(*_arguments(name, case), *attributes)


@pytest.mark.parametrize("op", OPERATORS.values(), ids=lambda op: op.name)
def test_schema_is_the_table(op):
    schema = ops.torch_op(op)._schema
    wanted = [(o.name, None) for o in op.inputs] + [(a.name, a.default) for a in op.attributes]
    assert [(a.name, a.default_value) for a in schema.arguments] == wanted
    assert len(schema.returns) == len(op.outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXTRA)
def test_scan_is_the_oracle(name, dtype):
    case = _scan(name, dtype, per_image=True)
    got = ops.selective_scan(**case, params_by_step=True, scale=0.5, backend="reference")
    assert torch.equal(got, reference.selective_scan(**case, params_by_step=True, scale=0.5))
    call = ops.torch_op(OPERATORS[name], "reference")
    assert torch.equal(got, call(*_arguments(name, case), 1, 1, 0.5))
    assert got.dtype == dtype
    assert got.is_contiguous()


@pytest.mark.parametrize("op", GATHER_OPERATORS, ids=lambda op: op.name)
def test_gather_is_the_oracle_in_every_type(op):
    for types in (*op.types, ("float64", "float64")):
        case = _gather(op.name, tuple(getattr(torch, t) for t in types))
        xs = [case[o.name] for o in op.inputs if o.name.startswith("x")]
        place = int(case["position"][0, 2])
        kept, rows = ops.token_gather(
            case["score"], case["position"], xs, num_keep=3, protected_position=place
        )
        wanted, rows_wanted = reference.token_gather(
            case["score"], case["position"], xs, num_keep=3, protected_position=place
        )
        assert torch.equal(kept, wanted)
        assert kept.dtype == torch.int32
        for row, x, row_wanted in zip(rows, xs, rows_wanted, strict=True):
            assert torch.equal(row, row_wanted)
            assert row.dtype == x.dtype


@pytest.mark.parametrize("name", EXTRA)
def test_opcheck_scan(name):
    for dtype in (torch.float32, torch.float16):
        case = _scan(name, dtype)
        arguments = [
            t.requires_grad_() if t.is_floating_point() else t for t in _arguments(name, case)
        ]
        torch.library.opcheck(
            ops.torch_op(OPERATORS[name]), (*arguments, 1, 0, 0.5), test_utils=SCAN_UTILS
        )


@pytest.mark.parametrize("op", GATHER_OPERATORS, ids=lambda op: op.name)
def test_opcheck_gather(op):
    case = _gather(op.name)
    case["x0"].requires_grad_()
    torch.library.opcheck(
        ops.torch_op(op), (*_arguments(op.name, case), 3, -1), test_utils=GATHER_UTILS
    )


@pytest.mark.parametrize("flags", [(1, 0), (0, 1)])
@pytest.mark.parametrize("name", EXTRA)
def test_gradcheck_scan(name, flags):
    case = _scan(name, torch.float64, seqlen=4, d_inner=2, shared="dC", gap="ones", per_image=True)
    case["gap"][..., 2] = 3
    case["delta"] = 0.5 * case["delta"].abs()
    case["delta_bias"] = 0.1 * case["delta_bias"].abs()  # steps near 1: no gradient vanishes
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in _arguments(name, case)]
    op = ops.torch_op(OPERATORS[name])
    assert torch.autograd.gradcheck(lambda *x: op(*x, *flags, 0.5), inputs, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("op", GATHER_OPERATORS, ids=lambda op: op.name)
def test_gradcheck_gather(op):
    case = _gather(op.name, (torch.float64, torch.float64))
    xs = [v.requires_grad_() for k, v in case.items() if k.startswith("x")]

    def rows(*xs):
        return tuple(ops.token_gather(case["score"], case["position"], xs, num_keep=3)[1])

    assert torch.autograd.gradcheck(rows, xs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_is_the_oracle(dtype):
    case = conv_case(dtype=dtype)
    if dtype == torch.float64:
        case = scan_reference_arguments(case)
    for by_position in (False, True):
        got = ops.token_conv(**case, by_position=by_position, backend="reference")
        assert torch.equal(got, reference.token_conv(**case, by_position=by_position))
        assert got.dtype == dtype
        assert got.is_contiguous()


def test_opcheck_conv():
    case = conv_case(seqlen=5, d_inner=3)
    for name in ("x", "weight", "bias"):
        case[name].requires_grad_()
    arguments = _arguments("TokenConv", case)
    torch.library.opcheck(ops.torch_op(OPERATORS["TokenConv"]), arguments, test_utils=SCAN_UTILS)


def test_conv_over_a_grid():
    case, attributes = grid_case(grid=(2, 3), seqlen=4, d_inner=3)
    for name in ("x", "weight", "bias"):
        case[name].requires_grad_()
    arguments = (*_arguments("TokenConv2D", case), *attributes.values())
    torch.library.opcheck(ops.torch_op(OPERATORS["TokenConv2D"]), arguments, test_utils=SCAN_UTILS)
    exact = scan_reference_arguments(case)
    inputs = [
        t.detach().requires_grad_() if t.is_floating_point() else t
        for t in _arguments("TokenConv2D", exact)
    ]
    for backend in ("auto", "reference"):
        op = ops.torch_op(OPERATORS["TokenConv2D"], backend)
        found = torch.autograd.gradcheck(
            lambda *x, op=op: op(*x, *attributes.values()), inputs, atol=1e-7, rtol=1e-6
        )
        assert found


def test_opcheck_scatter():
    case = scatter_case(full_seqlen=7, seqlen=4, width=3, batch=2)
    for name in ("base", "x"):
        case[name].requires_grad_()
    arguments = _arguments("TokenScatter", case)
    torch.library.opcheck(ops.torch_op(OPERATORS["TokenScatter"]), arguments, test_utils=SCAN_UTILS)


@pytest.mark.parametrize("flags", [(0, 0), (0, 1), (1, 1)])
def test_gradcheck_conv(flags):
    case = scan_reference_arguments(conv_case(seqlen=4, d_inner=2, width=3, batch=2))
    inputs = [
        t.requires_grad_() if t.is_floating_point() else t for t in _arguments("TokenConv", case)
    ]
    op = ops.torch_op(OPERATORS["TokenConv"])
    assert torch.autograd.gradcheck(lambda *x: op(*x, *flags), inputs, atol=1e-7, rtol=1e-6)


def test_gradients_where_only_some_are_asked_for():
    case = _scan("SelectiveScan")
    case["B"].requires_grad_()
    ops.selective_scan(**case).sum().backward()
    assert case["B"].grad is not None
    assert case["u"].grad is None
    choice = _gather("TokenGather")
    choice["score"].requires_grad_()
    kept, _ = ops.token_gather(
        choice["score"], choice["position"], [choice["x0"], choice["x1"]], num_keep=2
    )
    assert not kept.requires_grad


def test_batch_of_none():
    case = _scan("GatedSelectiveScan", batch=0)
    assert ops.selective_scan(**case).shape == (0, 5, 3)


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_kernel_has_the_shapes_types_and_layout(name):
    case, attributes = small_case(name, dtype=torch.float16)
    real = _call(name, case, *attributes.values())
    with FakeTensorMode() as mode:
        fake = _call(name, {k: mode.from_tensor(v) for k, v in case.items()}, *attributes.values())
    several = len(OPERATORS[name].outputs) > 1
    pairs = list(zip(real, fake, strict=True)) if several else [(real, fake)]
    for one, other in pairs:
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


class _Layer(torch.nn.Module):
    """A scan and a gather with constant tables, as a model has them."""

    def forward(self, u, z):
        _, seqlen, width = u.shape
        rows = u[:, :, None]
        steps = torch.arange(seqlen, dtype=torch.int32)
        order = torch.stack([steps, steps.flip(0)])[None]
        y = ops.selective_scan(
            rows,
            rows,
            -torch.ones(1, width, 2),
            rows[..., :2],
            rows[..., :2],
            D=torch.ones(1, width),
            delta_bias=torch.zeros(1, width),
            order=order,
            gap=torch.ones_like(order),
            z=z,
        )
        kept, found = ops.token_gather(y.mean(-1), steps[None], [y, u], num_keep=2)
        return kept, *found


def test_compile_and_export_with_a_dynamic_batch():
    layer = _Layer()
    inputs = torch.randn(3, 4, 3), torch.randn(3, 4, 3)
    wanted = layer(*inputs)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        layer, tuple(x[:2] for x in inputs), dynamic_shapes=({0: batch}, {0: batch})
    )
    called = [str(n.target) for n in program.graph.nodes if str(n.target).startswith("vssm")]
    assert called == ["vssm.gated_selective_scan.default", "vssm.token_gather.default"]
    for got in (compiled(*inputs), program.module()(*inputs)):
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))
