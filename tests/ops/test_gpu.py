"""The operators on CUDA tensors. Needs a GPU: skipped with its reason elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    DTYPES,
    EXTRA,
    SCAN_SIZES,
    TOGETHER_SIZES,
    gather_case,
    scan_case,
    scan_reference_arguments,
)
from exports import images, micro, micro_plain
from tolerances import GPU_SCAN_TOLERANCE, HALF_FACTOR, relative_error

from vssm.ops import operators as ops
from vssm.ops import reference
from vssm.ops.spec import GATHER_OPERATORS

pytestmark = pytest.mark.gpu

SHAPES = SCAN_SIZES + TOGETHER_SIZES
GATHERS = [(op.name, types) for op in GATHER_OPERATORS for types in op.types]
# float32 products by cuBLAS against float64: the sums are as long as on the CPU.
LOGITS = 2e-5


@pytest.fixture(autouse=True)
def _float32_convolutions():
    """cuDNN's own default is TF32, with ten bits of mantissa."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def _to(case, device="cuda"):
    return {name: tensor.to(device) for name, tensor in case.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_scan_matches_the_oracle(index, name, dtype):
    case = scan_case(**SHAPES[index], extra=EXTRA[name], dtype=dtype, seed=index)
    attributes = {"params_by_step": bool(index % 2), "scale": 0.5 if index % 3 == 0 else 1.0}
    got = ops.selective_scan(**_to(case), **attributes)
    want = reference.selective_scan(**scan_reference_arguments(case), **attributes)
    error = relative_error(got, want)
    assert error <= GPU_SCAN_TOLERANCE[dtype]
    if dtype != torch.float32:
        by_torch = reference.selective_scan(**_to(case), **attributes)
        assert error <= HALF_FACTOR * relative_error(by_torch, want)


@pytest.mark.parametrize(("name", "types"), GATHERS, ids=str)
def test_gather_is_the_oracle(name, types):
    dtypes = tuple(getattr(torch, t) for t in types)
    case = gather_case(
        seqlen=197, batch=5, widths=(17, 384)[: len(types)], dtypes=dtypes, special=True
    )
    xs = [f"x{i}" for i in range(len(types))]
    attributes = {"num_keep": 157, "protected_position": int(case["position"][0, 98])}
    on_gpu = _to(case)
    kept, rows = ops.token_gather(
        on_gpu["score"], on_gpu["position"], [on_gpu[x] for x in xs], **attributes
    )
    want, rows_wanted = reference.token_gather(
        case["score"], case["position"], [case[x] for x in xs], **attributes
    )
    assert torch.equal(kept.cpu(), want)
    for row, row_wanted in zip(rows, rows_wanted, strict=True):
        assert torch.equal(row.cpu(), row_wanted)


def test_float64_is_the_oracles_formula():
    case = scan_reference_arguments(scan_case(seqlen=30))
    got = ops.selective_scan(**_to(case))
    assert relative_error(got, reference.selective_scan(**case)) <= 1e-13


def test_gradients_are_the_oracles():
    case = scan_case(seqlen=30, extra="z")
    gradients = []
    for backend in ("reference", "auto"):
        leaves = {k: v.cuda().detach() for k, v in case.items()}
        leaves["u"].requires_grad_()
        ops.selective_scan(**leaves, backend=backend).square().sum().backward()
        gradients.append(leaves["u"].grad)
    assert relative_error(gradients[1], gradients[0].double().cpu()) <= 1e-5


def test_a_cuda_graph_replays_on_new_values():
    case, other = scan_case(seqlen=197, extra="z"), scan_case(seqlen=197, extra="z", seed=1)
    static = _to(case)
    ops.selective_scan(**static)  # warm up: the library loads its modules
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.selective_scan(**static)
    for values in (case, other):
        for name, tensor in static.items():
            tensor.copy_(values[name])
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, ops.selective_scan(**_to(values)))


@pytest.mark.parametrize("family", ["vim", "plain_mamba"])
def test_a_pruned_model_replays_in_a_cuda_graph(family):
    model = {"vim": micro, "plain_mamba": micro_plain}[family]()
    x = torch.from_numpy(images(model, 3))
    with torch.inference_mode():
        want = copy.deepcopy(model).double()(x.double())
        model.cuda()
        static = x.cuda()
        assert relative_error(model(static), want) <= LOGITS
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(static)
        logits.zero_()
        graph.replay()
    assert relative_error(logits, want) <= LOGITS


def test_a_model_compiles_in_one_graph():
    model = micro()
    x = torch.from_numpy(images(model, 2))
    with torch.inference_mode():
        want = copy.deepcopy(model).double()(x.double())
        torch._dynamo.reset()
        compiled = torch.compile(model.cuda(), fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            got = compiled(x.cuda()).clone()
    assert relative_error(got, want) <= LOGITS


def test_two_streams_at_once():
    cases = [_to(scan_case(seqlen=197, d_inner=384, batch=4, seed=s)) for s in (0, 1)]
    want = [ops.selective_scan(**case) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(10):
        got = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(ops.selective_scan(**case))
        torch.cuda.synchronize()
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_the_current_stream_is_used():
    case = _to(scan_case(seqlen=197, batch=2))
    want = ops.selective_scan(**case)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        later = {**case, "u": case["u"] + 0}  # written on this stream, behind the sleep
        got = ops.selective_scan(**later)
    torch.cuda.synchronize()
    assert torch.equal(got, want)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here: a second one is needed for a device that is not the current")
    case = _to(scan_case(seqlen=197), "cuda:1")
    assert torch.cuda.current_device() == 0
    got = ops.selective_scan(**case)
    assert got.device == torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    assert torch.equal(got.cpu(), ops.selective_scan(**_to(case, "cuda:0")).cpu())


def test_operands_on_two_devices_are_refused():
    case = _to(scan_case(seqlen=9))
    case["order"] = case["order"].cpu()
    with pytest.raises(ValueError, match=r"order\.device=cpu is not cuda:0, where u is"):
        ops.selective_scan(**case)
