"""What a model runs on when nobody chooses, and that it can be asked for."""

from __future__ import annotations

import copy
import pickle
import threading
import types
import warnings

import pytest
import torch
from cases import gather_case, scan_case
from exports import micro, micro_plain
from hierarchical_cases import small
from tolerances import relative_error

import vssm
from vssm.errors import RuntimeUnavailableError
from vssm.ops import kernels as ops_kernels
from vssm.ops import operators as ops
from vssm.ops import reference

MODELS = {
    "vim": micro,
    "plain_mamba": micro_plain,
    "vmamba": lambda: small("vmamba_tiny_s1l8"),
    "groupmamba": lambda: small("groupmamba_tiny"),
}


@pytest.fixture
def no_library(monkeypatch):
    """As on a machine that has not built it."""

    def absent(_):
        raise RuntimeUnavailableError("library=libvssm.so is in none of x; build it with `make`")

    monkeypatch.setattr(ops_kernels, "find_library", absent)
    ops_kernels.kernels.cache_clear()
    ops_kernels._warn_slow.cache_clear()
    yield
    ops_kernels._warn_slow.cache_clear()


def _images(model, batch=2):
    return torch.randn(batch, 3, *model.image_size)


def _backends(ran):
    return {backend for _, backend in ran}


@pytest.mark.parametrize("family", MODELS)
def test_a_model_runs_on_the_kernels_by_default(family):
    model = MODELS[family]()
    images = _images(model)
    with torch.inference_mode(), vssm.record_backends() as ran:
        got = model(images)
    scans = sum(n for (operator, _), n in ran.items() if "SelectiveScan" in operator)
    assert scans > 0
    assert _backends(ran) == {"kernel"}
    with torch.inference_mode(), vssm.record_backends() as ran:
        want = model.use_backend("reference")(images)
    assert _backends(ran) == {"reference"}
    assert not torch.equal(got, want), "one of the two is not what it says"
    assert relative_error(got, want) <= 2e-5


@pytest.mark.parametrize("family", MODELS)
def test_float64_is_the_reference(family):
    model = MODELS[family]().double()
    with torch.inference_mode(), vssm.record_backends() as ran:
        model(_images(model).double())
    assert _backends(ran) == {"reference"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_type_of_the_kernels_runs_on_them(dtype):
    case = scan_case(seqlen=9, dtype=dtype)
    with vssm.record_backends() as ran:
        y = ops.selective_scan(**case)
    assert ran == {("SelectiveScan", "kernel"): 1}
    assert torch.equal(y, ops.selective_scan(**case, backend="kernel"))


@pytest.mark.parametrize("family", MODELS)
def test_training_runs_on_the_kernels(family):
    model = MODELS[family]().train()
    with vssm.record_backends() as ran:
        model(_images(model)).square().sum().backward()
    scans = {key: n for key, n in ran.items() if "SelectiveScan" in key[0]}
    forward = {operator for operator, _ in scans if not operator.endswith(" backward")}
    assert set(scans) == {(name + part, "kernel") for name in forward for part in ("", " backward")}
    for name in forward:  # the last stage's scores have no gradient
        assert 0 < scans[f"{name} backward", "kernel"] <= scans[name, "kernel"]


def test_the_gradient_of_a_gather_is_the_references():
    case = gather_case(seqlen=9)
    x = case["x0"].requires_grad_()
    with vssm.record_backends() as ran:
        _, rows = ops.token_gather(case["score"], case["position"], [x], num_keep=4)
        rows[0].sum().backward()
    assert ran == {("TokenGather1", "kernel"): 1, ("TokenGather1 backward", "reference"): 1}


def test_nothing_is_counted_that_did_not_run():
    case = scan_case(seqlen=9)
    with vssm.record_backends() as outer:
        ops.selective_scan(**{k: v.to("meta") for k, v in case.items()})
        with pytest.raises(ValueError, match="is there twice"):
            ops.selective_scan(**{**case, "order": torch.zeros_like(case["order"])})
        assert not outer
        with vssm.record_backends() as inner:
            other = threading.Thread(target=ops.selective_scan, kwargs=case)
            other.start()
            other.join()
        ops.selective_scan(**case, backend="reference")
    ops.selective_scan(**case)
    assert inner == {("SelectiveScan", "kernel"): 1}
    assert outer == {("SelectiveScan", "kernel"): 1, ("SelectiveScan", "reference"): 1}


def test_a_model_stays_on_the_kernels_compiled_copied_pickled_and_under_autocast():
    model = micro("1:0.7", depth=2)
    images = _images(model)
    with torch.inference_mode():
        want = model(images)
        torch._dynamo.reset()
        runs = {
            "compiled": torch.compile(model, fullgraph=True, backend="aot_eager"),
            "copied": copy.deepcopy(model),
            "pickled": pickle.loads(pickle.dumps(model)),
        }
        for name, run in runs.items():
            with vssm.record_backends() as ran:
                got = run(images)
            assert _backends(ran) == {"kernel"}, name
            assert torch.allclose(got, want, rtol=0, atol=1e-5 * float(want.abs().max())), name
        # Vim is made for float32 or half weights as a whole: the scan alone is under autocast.
        case = scan_case(seqlen=9)
        with torch.autocast("cpu", torch.bfloat16), vssm.record_backends() as ran:
            y = ops.selective_scan(**case)
        assert ran == {("SelectiveScan", "kernel"): 1}
        assert torch.equal(y, ops.selective_scan(**case))


@pytest.mark.usefixtures("no_library")
def test_without_the_library_a_warning_says_once_what_is_slow():
    model = micro().train()
    images = _images(model)
    with (
        vssm.record_backends() as ran,
        pytest.warns(
            RuntimeWarning, match=r"in PyTorch on cpu, several times slower .*`make`"
        ) as w,
    ):
        model(images).square().sum().backward()
    assert len(w) == 1
    assert _backends(ran) == {"reference"}
    assert any(operator.endswith(" backward") for operator, _ in ran)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images)
        model.use_backend("reference")(images)
    with pytest.raises(RuntimeUnavailableError, match=r"libvssm\.so"):
        model.use_backend("kernel")(images)


@pytest.mark.usefixtures("no_library")
def test_without_the_library_the_numbers_are_the_references():
    case = scan_case(seqlen=20, d_inner=5)
    leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in case.items()}
    with pytest.warns(RuntimeWarning, match="backend='reference' asks for this"):
        y = ops.selective_scan(**leaves)
    assert torch.equal(y, reference.selective_scan(**case))
    y.square().sum().backward()
    found = leaves["u"].grad.clone()
    leaves["u"].grad = None
    ops.selective_scan(**leaves, backend="reference").square().sum().backward()
    assert torch.allclose(found, leaves["u"].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("no_library")
def test_an_export_needs_no_library_and_runs_nothing(tmp_path):
    with vssm.record_backends() as ran:
        vssm.export(micro("1:0.7", depth=1), tmp_path / "out")
    assert not ran


def test_a_gpu_without_kernels_for_it_is_slow_with_a_warning(monkeypatch):
    ops_kernels._warn_slow.cache_clear()
    monkeypatch.setattr(ops_kernels.kernels(), "has_cuda", False)
    tensor = types.SimpleNamespace(dtype=torch.float32, device=torch.device("cuda", 0))
    with pytest.warns(RuntimeWarning, match=r"on cuda, .* built without CUDA kernels; put nvcc"):
        assert not ops_kernels.runs_on_kernels(tensor)
    monkeypatch.setattr(ops_kernels.kernels(), "has_cuda", True)
    assert ops_kernels.runs_on_kernels(tensor)
    tensor.dtype = torch.float64
    assert not ops_kernels.runs_on_kernels(tensor)
    other = types.SimpleNamespace(dtype=torch.float32, device=torch.device("xpu", 0))
    assert not ops_kernels.runs_on_kernels(other)
