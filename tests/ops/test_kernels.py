"""The operators on torch's tensors through the C ABI: CPU kernels, emulated CUDA kernels, a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

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
from emulated import EmulatedKernels
from exports import micro, micro_plain
from tolerances import SCAN_TOLERANCE, relative_error

import vssm
from vssm.errors import RuntimeUnavailableError, UnsupportedError
from vssm.native_library import find_library
from vssm.ops import kernels as ops_kernels
from vssm.ops import operators as ops
from vssm.ops import reference
from vssm.ops.spec import GATHER_OPERATORS, OPERATORS, SCAN_OPERATORS, SELECTIVE_SCAN

SHAPES = [*SCAN_SIZES[:6], *TOGETHER_SIZES[:3]]
GATHERS = [(op.name, types) for op in GATHER_OPERATORS for types in op.types]


@pytest.fixture(params=["host", "emulated"])
def backend(request, monkeypatch):
    """What `backend="kernel"` runs on CPU tensors: the CPU kernels, or CUDA's in emulation."""
    if request.param == "emulated":
        _use(monkeypatch, "vssm_emulated")
    return request.param


def _use(monkeypatch, library):
    found = EmulatedKernels(find_library(library))
    monkeypatch.setattr(ops, "kernels", lambda: found)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_scan_matches_the_oracle(backend, index, name, dtype):
    case = scan_case(**SHAPES[index], extra=EXTRA[name], dtype=dtype, seed=index)
    attributes = {"params_by_step": bool(index % 2), "scale": 0.5 if index % 3 == 0 else 1.0}
    got = ops.selective_scan(**case, **attributes, backend="kernel")
    want = reference.selective_scan(**scan_reference_arguments(case), **attributes)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert relative_error(got, want) <= SCAN_TOLERANCE[dtype]


@pytest.mark.parametrize(("name", "types"), GATHERS, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_gather_is_the_oracle(backend, shared, name, types):
    dtypes = tuple(getattr(torch, t) for t in types)
    case = gather_case(
        seqlen=65, batch=3, widths=(17, 5)[: len(types)], dtypes=dtypes, shared_position=shared
    )
    xs = [case[f"x{i}"] for i in range(len(types))]
    attributes = {"num_keep": 40, "protected_position": int(case["position"][0, 7])}
    kept, rows = ops.token_gather(
        case["score"], case["position"], xs, **attributes, backend="kernel"
    )
    want, rows_wanted = reference.token_gather(case["score"], case["position"], xs, **attributes)
    assert torch.equal(kept, want)
    for row, row_wanted in zip(rows, rows_wanted, strict=True):
        assert torch.equal(row, row_wanted)
        assert row.dtype == row_wanted.dtype


@pytest.mark.parametrize("name", EXTRA)
def test_views_are_taken_as_they_read(backend, name):
    case = scan_case(seqlen=9, extra=EXTRA[name], batch=3, per_image=True)
    want = ops.selective_scan(**case, backend="kernel")
    views = {}
    for key, tensor in case.items():
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), -1).to(tensor.dtype)
        wide[..., ::2] = tensor
        views[key] = wide[..., ::2]
    views["u"] = case["u"].transpose(1, 3).contiguous().transpose(1, 3)
    assert not any(view.is_contiguous() for view in views.values())
    assert torch.equal(ops.selective_scan(**views, backend="kernel"), want)


def test_expanded_tables_are_shared(backend):
    """One order for all images, and one row expanded to as many: both read the same."""
    case = scan_case(seqlen=9, batch=3)
    want = ops.selective_scan(**case, backend="kernel")
    case["order"] = case["order"].expand(3, -1, -1)
    case["gap"] = case["gap"].expand(3, -1, -1)
    assert torch.equal(ops.selective_scan(**case, backend="kernel"), want)


@pytest.mark.parametrize("op", SCAN_OPERATORS, ids=lambda op: op.name)
def test_an_empty_batch(backend, op):
    case = scan_case(seqlen=5, extra=EXTRA[op.name])
    batched = {o.name for o in op.inputs if o.shape[0] == "batch"}
    case = {n: t[:0] if n in batched else t for n, t in case.items()}
    assert ops.selective_scan(**case, backend="kernel").shape == (0, 5, 16)


def test_a_launch_gets_an_aligned_workspace(monkeypatch):
    """vssm_probe's launchers write stream, workspace and its size into the first output."""
    _use(monkeypatch, "vssm_probe")
    y = ops.selective_scan(**scan_case(seqlen=9), backend="kernel")
    stream, workspace, size = y.view(-1)[:6].view(torch.int64).tolist()
    assert (stream, workspace % 256, size) == (0, 0, 4000)
    assert workspace != 0
    case = gather_case(seqlen=9)
    xs = [case["x0"], case["x1"]]
    _, rows = ops.token_gather(case["score"], case["position"], xs, num_keep=4, backend="kernel")
    assert rows[0].view(-1)[:6].view(torch.int64).tolist() == [0, 0, 0]
    with pytest.raises(UnsupportedError, match="the launch failed, as the test asked"):
        ops.selective_scan(**scan_case(seqlen=9), scale=-1.0, backend="kernel")


def test_the_reference_needs_no_library(monkeypatch):
    monkeypatch.setattr(ops_kernels, "find_library", _missing)
    ops_kernels.kernels.cache_clear()
    case = scan_case(seqlen=9)
    want = reference.selective_scan(**case)
    assert torch.equal(ops.selective_scan(**case, backend="reference"), want)


def test_bad_values_are_errors_of_the_cpu_kernels():
    case = scan_case(seqlen=9)
    case["order"] = torch.zeros_like(case["order"])
    with pytest.raises(ValueError, match="is there twice in one direction"):
        ops.selective_scan(**case, backend="kernel")


def test_what_no_kernel_takes_is_an_error():
    case = {k: v.double() if v.is_floating_point() else v for k, v in scan_case(seqlen=9).items()}
    with pytest.raises(ValueError, match=r"dtype=float64: the kernels compute in float32"):
        ops.selective_scan(**case, backend="kernel")
    with pytest.raises(ValueError, match=r"backend='fast' is not one of auto, reference, kernel"):
        ops.selective_scan(**scan_case(seqlen=9), backend="fast")
    case = {k: v.to("meta") for k, v in scan_case(seqlen=9).items()}
    assert ops.selective_scan(**case, backend="kernel").is_meta, "meta tensors have shapes alone"


def test_operands_on_two_devices_are_refused():
    named = scan_case(seqlen=9)
    named["B"] = named["B"].to("meta")
    with pytest.raises(ValueError, match=r"B\.device=meta is not cpu, where u is; move it there"):
        ops_kernels.kernels().run(
            SELECTIVE_SCAN, tuple(named[o.name] for o in SELECTIVE_SCAN.inputs)
        )


@pytest.mark.parametrize("extra", ["", "z"])
def test_a_call_like_one_before_runs_little_python(extra):
    """A layer of a small model is done in a millisecond, and each function here costs it one."""
    case, called = scan_case(seqlen=4, extra=extra), []
    package = str(Path(vssm.__file__).parent)
    ops.selective_scan(**case)

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        ops.selective_scan(**case)
    finally:
        sys.setprofile(None)
    assert "selective_scan" in called
    assert len(called) <= 25, called


def test_a_call_unlike_one_before_is_checked():
    case = scan_case(seqlen=9)
    ops.selective_scan(**case, backend="kernel")
    for name, other in (("A", case["A"].double()), ("C", case["C"][..., :-1])):
        with pytest.raises(ValueError, match=rf"SelectiveScan .*{name}"):
            ops.selective_scan(**{**case, name: other}, backend="kernel")
    with pytest.raises(ValueError, match="scale=inf must be finite"):
        ops.selective_scan(**case, scale=float("inf"), backend="kernel")


def test_a_library_without_cuda_is_said(monkeypatch):
    library = ops_kernels.Kernels(find_library("vssm"))
    monkeypatch.setattr(library, "has_cuda", False)
    with pytest.raises(RuntimeUnavailableError, match=r"was built without CUDA kernels; put nvcc"):
        library.require(torch.device("cuda", 0))
    with pytest.raises(RuntimeUnavailableError, match=r"device=xpu:0 has no kernels of ours"):
        library.require(torch.device("xpu", 0))


def _missing(_):
    raise RuntimeUnavailableError("library=libvssm.so is in none of these")


def test_a_missing_library_is_said(monkeypatch):
    ops_kernels.kernels.cache_clear()
    monkeypatch.setattr(ops_kernels, "find_library", _missing)
    with pytest.raises(RuntimeUnavailableError, match=r"libvssm\.so"):
        ops.selective_scan(**scan_case(seqlen=9), backend="kernel")


@pytest.mark.parametrize("op", OPERATORS.values(), ids=lambda op: op.name)
@pytest.mark.parametrize("backend", ["reference", "kernel"])
def test_every_overload_has_the_tables_schema(op, backend):
    auto, other = ops.torch_op(op)._schema, ops.torch_op(op, backend)._schema
    assert other.overload_name == backend
    assert [(a.name, str(a.type), a.default_value) for a in other.arguments] == [
        (a.name, str(a.type), a.default_value) for a in auto.arguments
    ]


@pytest.mark.parametrize("op", SCAN_OPERATORS, ids=lambda op: op.name)
def test_opcheck_of_the_kernels(op):
    case = scan_case(seqlen=5, d_inner=3, d_state=2, batch=2, extra=EXTRA[op.name])
    arguments = [case[o.name] for o in op.inputs]
    arguments = [t.requires_grad_() if t.is_floating_point() else t for t in arguments]
    torch.library.opcheck(
        ops.torch_op(op, "kernel"),
        (*arguments, 1, 0, 0.5),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_gradients_are_the_oracles():
    case = scan_case(seqlen=9, extra="z")
    gradients = []
    for backend in ("reference", "kernel"):
        leaves = {k: v.clone() for k, v in case.items()}
        for name in ("u", "delta", "A", "z"):
            leaves[name].requires_grad_()
        ops.selective_scan(**leaves, backend=backend).square().sum().backward()
        gradients.append(torch.cat([leaves[n].grad.flatten() for n in ("u", "delta", "A", "z")]))
    assert relative_error(gradients[1], gradients[0].double()) <= 1e-5


MODELS = {
    "vim": micro,
    "plain_mamba": micro_plain,
    "vmamba": lambda: vssm.create_model("vmamba_tiny_s1l8", image_size=64, num_classes=7),
}


@pytest.mark.parametrize("family", MODELS)
def test_a_model_runs_on_the_kernels(backend, family):
    model = MODELS[family]()
    x = torch.randn(2, 3, *model.image_size)
    with torch.inference_mode():
        want = model.forward_details(x)
        got = model.use_backend("kernel").forward_details(x)
    assert {m.backend for m in model.modules() if hasattr(type(m), "backend")} == {"kernel"}
    assert relative_error(got.logits, want.logits.double()) <= 2e-5
    for kept, kept_wanted in zip(got.kept_positions, want.kept_positions, strict=True):
        assert torch.equal(kept, kept_wanted)


def test_a_model_compiles_in_one_graph(backend):
    model = micro("1:0.7", depth=2).use_backend("kernel")
    x = torch.randn(2, 3, *model.image_size)
    with torch.inference_mode():
        want = model(x)
        torch._dynamo.reset()
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert relative_error(got, want.double()) <= 1e-5


def test_create_model_takes_the_choice():
    options = {"depth": 1, "d_model": 8, "image_size": 32}
    model = vssm.create_model("vim_tiny", backend="kernel", **options)
    assert model.backend == "kernel"
    assert "backend" not in vars(model.config)
    with pytest.raises(ValueError, match=r"backend='fast' is not one of auto, reference, kernel"):
        vssm.create_model("vim_tiny", backend="fast", **options)


def test_export_and_parity_do_not_depend_on_the_choice(tmp_path):
    model = micro("1:0.7", depth=1).use_backend("kernel")
    artifact = vssm.export(model, tmp_path / "out")
    assert model.backend == "kernel"
    assert vssm.check_parity(model, artifact).passed


@pytest.mark.parametrize("family", MODELS)
def test_every_tensor_of_a_model_follows_its_device(family):
    """On device meta, which holds nothing and refuses to be mixed with the CPU."""
    model = MODELS[family]().to("meta")
    with torch.inference_mode():
        found = model.forward_details(torch.empty(2, 3, *model.image_size, device="meta"))
    assert found.logits.is_meta
    assert all(kept.is_meta for kept in found.kept_positions)
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device="meta") + torch.ones(2)
