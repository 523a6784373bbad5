"""TokenScatter against the oracle, bit by bit: ONNX Runtime, C ABI, emulated CUDA, PyTorch."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import onnxruntime
import pytest
import torch
from cases import DTYPES, SCATTER_SIZES, gather_case, scatter_case
from cuda_device import (
    DEVICES,
    EMULATED,
    HOST,
    SMALL_CARD,
    CLaunch,
    CTensor,
    OperatorError,
    prepare,
)
from cuda_device import run_operator as run_through_c
from native import ONNX_TYPES, found_library, make_session, output_types
from native import run_operator as run_in_onnxruntime
from onnx import TensorProto, helper

import vssm
from vssm.onnx.bodies import build_functions
from vssm.ops import operators as ops
from vssm.ops import reference
from vssm.ops.spec import DOMAIN

HALF = torch.float16


def _special(case):
    """NaN of every payload and infinities go through as they are."""
    for name in ("base", "x"):
        bits = case[name].view(-1).view(torch.int16)
        bits[::3] = torch.arange(len(bits[::3]), dtype=torch.int16) | 0x7F80
    return case


def _assert_same(got, case):
    # As integers: torch's own scatter makes half NaN quiet.
    kind = torch.int32 if case["x"].dtype == torch.float32 else torch.int16
    bits = [case[name].contiguous().view(kind) for name in ("base", "x")]
    assert got.dtype == case["x"].dtype
    assert torch.equal(got.view(kind), reference.token_scatter(*bits, case["position"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(SCATTER_SIZES)))
def test_is_the_oracle_in_onnxruntime(index, dtype):
    case = _special(scatter_case(**SCATTER_SIZES[index], dtype=dtype, seed=index))
    for threads in (1, 2):
        _assert_same(run_in_onnxruntime("TokenScatter", case, threads=threads)["y"], case)


@pytest.mark.parametrize("backend", [HOST, *DEVICES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(len(SCATTER_SIZES)))
def test_is_the_oracle_through_the_c_abi(index, dtype, backend):
    case = _special(scatter_case(**SCATTER_SIZES[index], dtype=dtype, seed=index))
    for shift in (0, 1):  # rows that are moved 16 bytes at a time where their width lets them
        _assert_same(run_through_c(backend, "TokenScatter", case, shift=shift)["y"], case)


@pytest.mark.parametrize("backend", DEVICES, ids=str)
@pytest.mark.parametrize("shift", [0, 1, 2, 4])
@pytest.mark.parametrize("width", [8, 4, 6, 87])
def test_unaligned_rows_on_cuda(backend, width, shift):
    case = scatter_case(full_seqlen=37, seqlen=20, width=width, batch=3, dtype=HALF)
    _assert_same(run_through_c(backend, "TokenScatter", case, shift=shift)["y"], case)


@pytest.mark.parametrize("backend", DEVICES, ids=str)
@pytest.mark.parametrize("sm_count", [1, 8, 5000])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_card_and_order_of_threads(backend, seed, sm_count):
    case = scatter_case(full_seqlen=61, seqlen=40, width=1500, batch=2, seed=seed)
    with backend.card(sm_count, SMALL_CARD["shared_bytes"]), backend.seed(seed):
        _assert_same(run_through_c(backend, "TokenScatter", case)["y"], case)


@pytest.mark.parametrize("backend", [HOST, *DEVICES], ids=str)
@pytest.mark.parametrize("index", [2, 3, 5])
def test_y_may_be_the_memory_of_base(backend, index):
    case = scatter_case(**SCATTER_SIZES[index])
    call = prepare(backend, "TokenScatter", case)
    call.outputs = {"y": call.inputs["base"]}
    del call.copies["base"]
    call.enqueue()
    _assert_same(call.results()["y"], case)


def _chain(read_twice):
    """-base scattered onto and negated, and where it is `read_twice` -base itself as well."""
    shapes = {"base": ["n", 40, 16], "x": ["n", 25, 16], "position": ["n", 25]}
    types = dict.fromkeys(shapes, TensorProto.FLOAT) | {"position": TensorProto.INT32}
    nodes = [
        helper.make_node("Neg", ["base"], ["minus"]),
        helper.make_node("TokenScatter", ["minus", "x", "position"], ["put"], domain=DOMAIN),
        helper.make_node("Neg", ["put"], ["y"]),
        *([helper.make_node("Neg", ["minus"], ["again"])] if read_twice else []),
    ]
    outputs = ["y", "again"] if read_twice else ["y"]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info(n, types[n], s) for n, s in shapes.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes["base"]) for n in outputs],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("read_twice", [False, True])
def test_onnxruntime_may_let_y_take_the_memory_of_base(read_twice):
    """Not where another node still reads base."""
    case = scatter_case(batch=3)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(found_library()))
    session = onnxruntime.InferenceSession(
        _chain(read_twice).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    for _ in range(2):
        y, *again = session.run(None, {n: t.numpy() for n, t in case.items()})
        want = reference.token_scatter(case["base"], -case["x"], case["position"])
        np.testing.assert_array_equal(y, want.numpy())
        assert len(again) == int(read_twice)
        for other in again:
            np.testing.assert_array_equal(other, case["base"].numpy())


def test_is_the_inverse_of_a_gather():
    """Rows that were kept go home; none left out, the whole comes back bit by bit."""
    case = gather_case(seqlen=30, batch=2, widths=(9,))
    place = torch.arange(30, dtype=torch.int32)[None]
    for num_keep in (11, 30):
        kept, (rows,) = ops.token_gather(case["score"], place, [case["x0"]], num_keep=num_keep)
        assert torch.equal(ops.token_scatter(case["x0"], rows, kept), case["x0"])
        alone = ops.token_scatter(torch.zeros_like(case["x0"]), rows, kept)
        assert torch.equal(alone, case["x0"]) == (num_keep == 30)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_torch_operator_runs_it(dtype):
    case = scatter_case(batch=3, dtype=dtype, per_image=False)
    views = case | {"x": case["x"].transpose(0, 2).contiguous().transpose(0, 2)}
    for backend in ("auto", "reference"):
        with vssm.record_backends() as ran:
            y = ops.token_scatter(**views, backend=backend)
        own = backend == "auto" and dtype != torch.float64
        assert ran == {("TokenScatter", "kernel" if own else "reference"): 1}
        assert y.is_contiguous()
        assert torch.equal(y, reference.token_scatter(**case))


@pytest.mark.parametrize("backend", ["reference", "kernel"])
def test_gradients(backend):
    """Those of autograd through the oracle, and the second ones too; dbase by the kernel again."""
    case = scatter_case(batch=2, width=5)
    weight = torch.randn(2, 40, 5)

    def gradients(run, **options):
        leaves = [case[n].clone().requires_grad_() for n in ("base", "x")]
        y = run(*leaves, case["position"], **options)
        first = torch.autograd.grad((y**3 * weight).sum(), leaves, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    with vssm.record_backends() as ran:
        got = gradients(ops.token_scatter, backend=backend)
    want = gradients(reference.token_scatter)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert {name for _, name in ran} == {backend}
    only_x = case["x"].clone().requires_grad_()
    ops.token_scatter(case["base"], only_x, case["position"]).sum().backward()
    assert torch.equal(only_x.grad, torch.ones_like(only_x))


OUTSIDE = [-1, -40, 40, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("place", [*OUTSIDE, "twice"], ids=str)
def test_positions_that_break_the_rule(place):
    """Refused on the CPU before anything is written; a GPU cannot look, but leaves them out."""
    case = scatter_case(batch=2)
    good = case["position"].clone()
    case["position"][1, 7] = good[1, 20] if place == "twice" else place
    message = "token 7 too" if place == "twice" else rf"position\[7\]={place} is outside \[0, 39\]"
    with pytest.raises(Exception, match=message):
        run_in_onnxruntime("TokenScatter", case)
    call = prepare(HOST, "TokenScatter", case)
    with pytest.raises(OperatorError, match=message):
        call.enqueue()
    assert (call.outputs["y"].buffer == 0xFF).all()
    with pytest.raises(ValueError, match="must be distinct" if place == "twice" else "is outside"):
        ops.token_scatter(**case, backend="reference")
    y = run_through_c(EMULATED, "TokenScatter", case)["y"]
    left = torch.ones(25, dtype=torch.bool)
    left[[7, 20] if place == "twice" else [7]] = False
    assert torch.equal(y[1, good[1, left].long()], case["x"][1, left])
    if place != "twice":
        kept = {n: case[n][1:, left] for n in ("x", "position")}
        assert torch.equal(y[1:], reference.token_scatter(case["base"][1:], **kept))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(3, 41, 16), "position": torch.ones(1, 41).int()}, r"outside \[1, 40\]"),
        ({"x": torch.ones(2, 25, 16)}, "batch"),
        ({"x": torch.ones(3, 25, 15)}, r"\bd\b"),
        ({"x": torch.ones(3, 25, 16).half()}, "float16"),
        ({"base": torch.ones(3, 40)}, "rank"),
        ({"base": torch.ones(3, 40, 0), "x": torch.ones(3, 25, 0)}, r"\bd=0"),
        ({"position": torch.zeros(2, 25).int()}, "batch"),
        ({"position": torch.zeros(1, 24).int()}, "seqlen"),
    ],
)
def test_refuses_what_breaks_the_contract(change, message):
    case = scatter_case(batch=3) | change
    with pytest.raises(OperatorError, match=message):
        run_through_c(HOST, "TokenScatter", case)
    with pytest.raises(ValueError, match=message):
        ops.token_scatter(**case, backend="reference")


@pytest.mark.parametrize(
    ("batch", "width", "message"),
    [
        (1, 2**29, r"a row of 2147483648 bytes is more than 1073741824; scatter narrower tensors"),
        (2**30, 2**28, r"batch=1073741824 is more than 1073741823, .*; split the batch"),
    ],
)
def test_what_one_launch_cannot_take_is_refused(batch, width, message):
    def describe(dtype, *dims):  # nothing is read before it is refused
        return CTensor(4096, dtype, len(dims), (ctypes.c_int64 * 4)(*dims))

    inputs = (CTensor * 3)(
        describe(0, batch, 2, width), describe(0, batch, 1, width), describe(3, 1, 1)
    )
    error, launch = ctypes.create_string_buffer(512), CLaunch()
    failed = EMULATED.load().vssm_token_scatter(
        b"TokenScatter",
        inputs,
        3,
        ctypes.byref(describe(0, batch, 2, width)),
        ctypes.byref(launch),
        error,
        ctypes.c_size_t(512),
    )
    assert failed == 1
    assert re.search(message, error.value.decode())


def test_the_session_knows_the_shape():
    case = scatter_case()
    types = {n: ONNX_TYPES[t.dtype] for n, t in case.items()}
    types |= {n: ONNX_TYPES[t] for n, t in output_types("TokenScatter", case).items()}
    shapes = {"base": ["n", 197, 384], "x": ["n", 100, 384]}
    assert make_session("TokenScatter", types, shapes=shapes).get_outputs()[0].shape == [
        *("n", 197, 384)
    ]


def test_its_body_is_one_scatter():
    [function] = build_functions(["TokenScatter"], 18)
    kinds = [node.op_type for node in function.node]
    assert kinds.count("ScatterND") == 1
    assert not {"Loop", "If", "NonZero", "ScatterElements"} & set(kinds)
