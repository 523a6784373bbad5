"""Session `ort-cuda`: messages and logic without a GPU, the real thing with one.

Without a GPU a stand-in takes the place of ONNX Runtime's CUDA provider: its sessions run on the
CPU, and say that they do not.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from exports import exported, images, micro, micro_plain, shared_traces

import vssm
from vssm.errors import RuntimeUnavailableError, UnsupportedError
from vssm.parity.check import check_parity
from vssm.runtimes import cuda_driver, ort_cuda
from vssm.runtimes.library import kernel_calls, library_info
from vssm.runtimes.ort_cuda import PROVIDER, OrtCudaSession, nodes_elsewhere

H100 = cuda_driver.Gpu(0, "NVIDIA H100", (9, 0))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("session"), micro())


def test_a_missing_provider_names_the_package_and_the_command(artifact):
    if PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    message = (
        rf"runtime='ort-cuda' needs {PROVIDER}, which onnxruntime [0-9.]+ lacks \(it has "
        r".*CPUExecutionProvider\): pip uninstall --yes onnxruntime && pip install "
        r"'onnxruntime-gpu\[cuda,cudnn\]'"
    )
    with pytest.raises(RuntimeUnavailableError, match=message):
        vssm.open_session(artifact, "ort-cuda")
    with pytest.raises(RuntimeUnavailableError, match=message):
        vssm.check_parity(micro(), artifact, "ort-cuda")


def test_bad_arguments(artifact):
    for batch in (0, -1, True, "8"):
        with pytest.raises(ValueError, match=r"cuda_graph_batch=.* is not a batch size"):
            vssm.open_session(artifact, "ort-cuda", cuda_graph_batch=batch)
    with pytest.raises(ValueError, match=r"device=1 with runtime='ort-cpu': only ort-cuda"):
        vssm.open_session(artifact, "ort-cpu", device=1)
    with pytest.raises(ValueError, match=r"cuda_graph_batch=8 with runtime='torch': only ort"):
        vssm.open_session(artifact, "torch", cuda_graph_batch=8)


class _Provider:
    """The stand-in: a session on the CPU that claims to run on CUDA, save for `left`."""

    def __init__(self, file, options, *, providers, enable_fallback):
        ((name, self.provider_options),) = providers
        assert (name, enable_fallback) == (PROVIDER, 0)
        self.options = options
        self.inner = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.loads = True
        self.left: list[tuple[str, str]] = []
        for name in ("get_inputs", "get_outputs", "run", "io_binding", "run_with_iobinding"):
            setattr(self, name, getattr(self.inner, name))

    def get_providers(self):
        return [PROVIDER, "CPUExecutionProvider"] if self.loads else ["CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self):
        def part(ep_name, nodes):
            kept = [SimpleNamespace(domain=d, op_type=n) for d, n in nodes]
            return SimpleNamespace(ep_name=ep_name, get_nodes=lambda: kept)

        return [part(PROVIDER, [("", "MatMul")]), part("CPUExecutionProvider", self.left)]


class _Options(onnxruntime.SessionOptions):
    """Remembers the entries, and keeps from the CPU the one that forbids it."""

    def __init__(self):
        super().__init__()
        self.entries = {}

    def add_session_config_entry(self, key, value):
        self.entries[key] = value
        if key != "session.disable_cpu_ep_fallback":
            super().add_session_config_entry(key, value)


class _Value(onnxruntime.OrtValue):
    """Values "on the device" are on the CPU."""

    @classmethod
    def ortvalue_from_numpy(cls, array, device, ordinal):
        assert (device, ordinal) == ("cuda", 0)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array.copy())

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape, kind, device, ordinal):
        assert (device, ordinal) == ("cuda", 0)
        return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, kind)


@pytest.fixture
def stand_in(monkeypatch):
    """What opens a session, with the provider's attributes changed as asked for."""
    changes: dict[str, object] = {}

    def open_provider(*args, providers, **kwargs):
        if providers[0][0] != PROVIDER:
            return onnxruntime.InferenceSession(*args, providers=providers, **kwargs)
        provider = _Provider(*args, providers=providers, **kwargs)
        vars(provider).update(changes)
        return provider

    replaced = SimpleNamespace(**{n: getattr(onnxruntime, n) for n in dir(onnxruntime)})
    replaced.InferenceSession = open_provider
    replaced.OrtValue = _Value
    replaced.SessionOptions = _Options
    replaced.get_available_providers = lambda: [PROVIDER, "CPUExecutionProvider"]
    monkeypatch.setattr("vssm.runtimes.ort.onnxruntime", replaced)
    monkeypatch.setattr(ort_cuda, "onnxruntime", replaced)
    monkeypatch.setattr(ort_cuda, "find_gpu", lambda _: H100)
    monkeypatch.setattr(ort_cuda, "cuda_kernel_calls", kernel_calls)
    built = dataclasses.replace(library_info(), cuda_architectures=("90-real",))
    for module in ("ort", "ort_cuda"):
        monkeypatch.setattr(f"vssm.runtimes.{module}.library_info", lambda: built)
    return changes


def test_a_session_says_what_ran(stand_in, artifact):
    with OrtCudaSession(artifact, threads=1) as session:
        assert session._session.provider_options == {"device_id": "0", "use_tf32": "0"}
        assert session.info.runtime == "ort-cuda"
        assert session.info.device == "NVIDIA H100 (sm_90)"
        assert session.info.isa == "CUDA 90-real"
        x = images(micro(), 2)
        with vssm.open_session(artifact, "ort-cpu", threads=1) as cpu:
            want = cpu.run(x)
        for name, value in session.run(x).items():
            np.testing.assert_array_equal(value, want[name])
    with pytest.raises(ValueError, match=r"session=closed"):
        session.run(x)


def test_nodes_that_stay_on_the_cpu_are_named(stand_in, artifact):
    stand_in["left"] = [("", "Shape"), ("", "Concat"), ("", "Shape")]
    with OrtCudaSession(artifact) as session:
        assert "NVIDIA H100 (sm_90), 3 nodes on the CPU (Concat, Shape)" in str(session.info)
    stand_in["left"] = [("vssm", "TokenGather"), ("", "Shape")]
    with pytest.raises(RuntimeUnavailableError, match=r"^TokenGather would run on the CPU, not on"):
        OrtCudaSession(artifact)


def test_a_provider_that_does_not_load_is_an_error(stand_in, artifact):
    stand_in["loads"] = False
    message = (
        r"could not load CUDAExecutionProvider: .* pip install 'onnxruntime-gpu\[cuda,cudnn\]'"
    )
    with pytest.raises(RuntimeUnavailableError, match=message):
        OrtCudaSession(artifact)


def test_kernels_that_did_not_run_are_an_error(stand_in, artifact, monkeypatch):
    monkeypatch.setattr(ort_cuda, "cuda_kernel_calls", lambda: 7)
    with (
        OrtCudaSession(artifact) as session,
        pytest.raises(RuntimeUnavailableError, match=r"but ort-cuda did not run them"),
    ):
        session.run(images(micro(), 1))


def test_a_library_without_cuda_is_an_error(stand_in, artifact, monkeypatch):
    plain = dataclasses.replace(library_info(), cuda_architectures=())
    monkeypatch.setattr(ort_cuda, "library_info", lambda: plain)
    with pytest.raises(RuntimeUnavailableError, match=r"was built without CUDA kernels; put nvcc"):
        OrtCudaSession(artifact)
    with OrtCudaSession(artifact, backend="body") as session:
        assert session.run(images(micro(), 1))["logits"].shape == (1, 7)


def test_a_cuda_graph_holds_one_batch_size(stand_in, artifact):
    with OrtCudaSession(artifact, cuda_graph_batch=2, threads=1) as session:
        inner = session._session
        assert inner.provider_options["enable_cuda_graph"] == "1"
        assert inner.options.entries["session.disable_cpu_ep_fallback"] == "1"
        assert inner.get_inputs()[0].shape[0] == 2, "the size is settled at load"
        with vssm.open_session(artifact, "ort-cpu", threads=1) as cpu:
            for seed in (0, 1):
                x = images(micro(), 2, seed=seed)
                got, want = session.run(x), cpu.run(x)
                np.testing.assert_array_equal(got["logits"], want["logits"])
        with pytest.raises(ValueError, match=r"is not a batch of cuda_graph_batch=2, which"):
            session.run(images(micro(), 3))


def test_a_graph_that_the_provider_cannot_hold_is_explained(stand_in, artifact, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise RuntimeError(
            "This session contains graph nodes that are assigned to the default CPU EP, but "
            "fallback to CPU EP has been explicitly disabled by the user."
        )

    monkeypatch.setattr(ort_cuda.onnxruntime, "InferenceSession", refuse)
    with pytest.raises(UnsupportedError, match=r"^cuda_graph_batch=4: .* leave cuda_graph_batch"):
        OrtCudaSession(artifact, cuda_graph_batch=4)


def test_images_stay_on_the_device(stand_in, artifact):
    x, other = images(micro(), 2), images(micro(), 2, seed=1)
    with OrtCudaSession(artifact, threads=1) as session:
        held = session.on_device(x)
        held.run()
        np.testing.assert_array_equal(held.outputs()["logits"], session.run(x)["logits"])
        held.update(other)
        held.run()
        np.testing.assert_array_equal(held.outputs()["logits"], session.run(other)["logits"])
        with pytest.raises(ValueError, match=r"open the session with timed=True"):
            held.device_ms(1)
        with pytest.raises(ValueError, match=r"is not \('batch', 3, 48, 48\)"):
            session.on_device(x[:, :, :40])


class _Stream:
    """Stands in for a stream: runs the work and calls it one millisecond."""

    address = 0xABC

    def __init__(self, ordinal):
        assert ordinal == 0

    def milliseconds(self, work):
        work()
        return 1.0

    def close(self):
        pass


def test_device_times_are_taken_on_the_sessions_stream(stand_in, artifact, monkeypatch):
    monkeypatch.setattr(ort_cuda, "TimedStream", _Stream)
    with OrtCudaSession(artifact, timed=True, threads=1) as session:
        assert session._session.provider_options["user_compute_stream"] == str(0xABC)
        assert session.on_device(images(micro(), 1)).device_ms(3) == [1.0, 1.0, 1.0]


def test_parity_is_checked_on_the_provider(stand_in, artifact):
    report = vssm.check_parity(micro(), artifact, "ort-cuda", threads=1)
    assert report.passed
    assert report.info.runtime == "ort-cuda"


def test_the_benchmark_measures_the_provider(stand_in, artifact, tmp_path):
    page = tmp_path / "bench.html"
    with shared_traces():
        report = vssm.bench_directory(
            artifact.directory, runtime="ort-cuda", batches=(1, 2), samples=1, page=page
        )
    subjects = {"ort kernel", "ort body", "torch loop", "ort kernel, dense"}
    assert {row.subject for row in report.rows} == {*subjects, "ort kernel, images on the GPU"}
    assert all(row.info.startswith("ort-cuda") for row in report.rows if "ort" in row.subject)
    assert report.context["command"].endswith("--runtime ort-cuda")
    assert "floor was not measured" in page.read_text()
    with pytest.raises(ValueError, match=r"runtime='torch' is not one of ort-cpu, ort-cuda"):
        vssm.bench_directory(artifact.directory, runtime="torch")


def test_assignments_are_read_from_this_onnxruntime(artifact):
    """On a real session: there, where nothing runs on CUDA, every node runs elsewhere."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.register_custom_ops_library(str(library_info().path))
    session = onnxruntime.InferenceSession(
        str(artifact.model_path), options, providers=["CPUExecutionProvider"]
    )
    found = nodes_elsewhere(session)
    assert found["vssm", "TokenGather"] == 2
    assert found["", "MatMul"] > 1
    assert nodes_elsewhere(object()) == {}


class _Driver:
    """The driver's library in ctypes' clothes: two devices."""

    def __init__(self, status=0):
        self.status = status

    def __getitem__(self, name):
        return lambda *arguments: self._answer(name, arguments)

    def _answer(self, name, arguments):
        values = {"cuDriverGetVersion": 13020, "cuDeviceGetCount": 2}
        if name in values:
            arguments[0]._obj.value = values[name]
        if name == "cuDeviceGet":
            arguments[0]._obj.value = arguments[1]
        if name == "cuDeviceGetName":
            arguments[0].value = b"NVIDIA H100"
        if name == "cuDeviceGetAttribute":
            arguments[0]._obj.value = {75: 9, 76: 0}[arguments[1]]
        if name == "cuGetErrorString":
            arguments[1]._obj.value = b"no CUDA-capable device is detected"
            return 0
        return self.status


def test_the_driver_is_asked_what_is_there(monkeypatch):
    monkeypatch.setattr(cuda_driver, "_load", _Driver)
    found = cuda_driver.driver()
    assert found.cuda == (13, 2)
    assert [str(gpu) for gpu in found.gpus] == ["NVIDIA H100 (sm_90)"] * 2
    assert cuda_driver.find_gpu(1).ordinal == 1
    with pytest.raises(ValueError, match=r"device=2 is not one of the GPUs here \(0: NVIDIA H100"):
        cuda_driver.find_gpu(2)
    monkeypatch.setattr(cuda_driver, "_load", lambda: _Driver(status=100))
    message = r"cuInit failed with 100 \(no CUDA-capable device is detected\)"
    with pytest.raises(RuntimeUnavailableError, match=message):
        cuda_driver.driver()


def test_a_machine_without_a_driver_is_said(monkeypatch):
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libcuda_of_no_machine.so.1")
    with pytest.raises(RuntimeUnavailableError, match=r"there is no NVIDIA driver here"):
        cuda_driver.driver()


needs_provider = pytest.mark.skipif(
    PROVIDER not in onnxruntime.get_available_providers(),
    reason="this onnxruntime has no CUDA provider: pip install onnxruntime-gpu",
)


@pytest.mark.gpu
@needs_provider
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("make", [micro, micro_plain])
def test_parity_on_a_gpu(tmp_path, make, dtype):
    artifact = exported(tmp_path, make(), dtype=dtype)
    report = check_parity(None, artifact, "ort-cuda", per_block=True)
    assert report.passed, report.failures


@pytest.mark.gpu
@needs_provider
def test_a_cuda_graph_on_a_gpu(artifact):
    with (
        vssm.open_session(artifact, "ort-cpu") as cpu,
        vssm.open_session(artifact, "ort-cuda", cuda_graph_batch=2) as session,
    ):
        for seed in range(4):
            x = images(micro(), 2, seed=seed)
            got, want = session.run(x)["logits"], cpu.run(x)["logits"]
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.gpu
@needs_provider
def test_device_times_on_a_gpu(artifact):
    with OrtCudaSession(artifact, timed=True) as session:
        held = session.on_device(images(micro(), 8))
        held.run()
        assert all(0 < ms < 1000 for ms in held.device_ms(5))
