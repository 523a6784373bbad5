"""Sessions on TensorRT: logic on stand-ins for the GPU, refusals on real files.

What runs here is our side of every call, on host memory (fake_tensorrt.py). That TensorRT itself
accepts the calls is for a machine with a GPU.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import shutil
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import Run
from exports import exported, images, micro, shared_traces
from fake_cuda import OUT_OF_MEMORY, FakeCuda
from fake_tensorrt import FakeTensorRT

import vssm
from vssm.artifact.directory import Artifact
from vssm.errors import ArtifactError, RuntimeUnavailableError, UnsupportedError
from vssm.native_library import find_library
from vssm.runtimes.library import TENSORRT_LIBRARY
from vssm.runtimes.tensorrt import build as tensorrt_build
from vssm.runtimes.tensorrt import session as tensorrt_session
from vssm.runtimes.tensorrt.build import EngineRequest
from vssm.runtimes.tensorrt.engine import read_info, write_info

SMALL = EngineRequest(batch=(1, 2, 5))


@dataclasses.dataclass
class Bench:
    """The stand-ins in place, and an export."""

    cuda: FakeCuda
    trt: FakeTensorRT
    patch: pytest.MonkeyPatch
    library: Path

    def use(self, trt: FakeTensorRT) -> None:
        self.trt = trt
        trt.__spec__ = ModuleSpec("tensorrt", None)  # as torch asks for before its first trace
        self.patch.setitem(sys.modules, "tensorrt", trt)

    def use_cuda(self, cuda: FakeCuda) -> None:
        self.cuda = self.trt.cuda = cuda
        bindings = types.ModuleType("cuda.bindings")
        bindings.runtime = cuda  # type: ignore[attr-defined]
        self.patch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
        self.patch.setitem(sys.modules, "cuda.bindings", bindings)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """Stand-ins; a copy of the ONNX Runtime library stands in for the plugin library."""
    library = tmp_path / f"lib{TENSORRT_LIBRARY}.so"
    shutil.copy(find_library(), library)
    for module in (tensorrt_build, tensorrt_session):
        monkeypatch.setattr(module, "find_library", lambda name: library)
    cuda = FakeCuda()
    made = Bench(cuda, FakeTensorRT(cuda), monkeypatch, library)
    made.use_cuda(cuda)
    made.use(made.trt)
    return made


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return exported(tmp_path, micro())


def build(artifact: Artifact, **changes: Any) -> Any:
    return tensorrt_build.build_engine(artifact, dataclasses.replace(SMALL, **changes))


def edit(artifact: Artifact, **changes: Any) -> None:
    path = artifact.directory / "engine.json"
    write_info(path, dataclasses.replace(read_info(path, "vssm engine"), **changes))


def open_engine(artifact: Artifact, **options: Any) -> vssm.Session:
    return vssm.open_session(artifact, "tensorrt", **options)


def _from_memory(loaded: list[str]) -> bool:
    """Whether one library was loaded, from the sealed copy of what was hashed."""
    return len(loaded) == 1 and loaded[0].startswith("/proc/self/fd/")


@pytest.mark.parametrize("version", ["10.0.1.6", "10.6.0.26", "10.13.3.9", "11.1.0.1"])
def test_outputs_are_those_of_the_file(bench: Bench, artifact: Artifact, version: str) -> None:
    bench.use(FakeTensorRT(bench.cuda, version))
    info = build(artifact)
    assert (info.backend, info.version, info.batch) == ("kernel", version, (1, 2, 5))
    with vssm.open_session(artifact, "ort-cpu") as session:
        want = {n: session.run(images(micro(), n, seed=n)) for n in (1, 2, 5, 3)}
    with open_engine(artifact) as session:
        assert session.batches == (1, 5)
        for _ in range(2):  # the second time from the graph
            for batch, outputs in want.items():
                got = session.run(images(micro(), batch, seed=batch))
                assert list(got) == list(outputs)
                for name, value in outputs.items():
                    assert got[name].dtype == value.dtype
                    np.testing.assert_array_equal(got[name], value)
    assert _from_memory(bench.trt.loaded)


def test_a_graph_for_each_batch_and_no_allocation_while_running(
    bench: Bench, artifact: Artifact
) -> None:
    build(artifact)
    with open_engine(artifact) as session:
        bench.cuda.calls.clear()
        for batch in (2, 3, 2, 3, 2):
            session.run(images(micro(), batch))
        assert not [name for name in bench.cuda.calls if "Malloc" in name]
        assert bench.cuda.calls.count("cudaGraphInstantiate") == 2
        assert bench.cuda.calls.count("cudaGraphLaunch") == 5
        # Each batch is enqueued twice, before the capture and in it, and never again.
        assert bench.trt.enqueued == 4
    assert bench.cuda.memory == {}
    assert bench.cuda.graphs == {}


def test_a_graph_that_cannot_be_made_is_freed(
    bench: Bench, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(artifact)
    monkeypatch.setattr(bench.cuda, "cudaGraphInstantiate", lambda *_: (OUT_OF_MEMORY, None))
    with open_engine(artifact) as session:
        with pytest.raises(RuntimeUnavailableError, match="Instantiate failed: out of memory"):
            session.run(images(micro(), 2))
        assert bench.cuda.calls.count("cudaGraphDestroy") == 1


def test_without_graphs(bench: Bench, artifact: Artifact) -> None:
    build(artifact)
    session = tensorrt_session.TensorRtSession(artifact, graphs=False)
    with session:
        first, second = (session.run(images(micro(), 2)) for _ in range(2))
        np.testing.assert_array_equal(first["logits"], second["logits"])
    assert "cudaGraphLaunch" not in bench.cuda.calls
    with pytest.raises(ValueError, match="session=closed"):
        session.run(images(micro(), 2))
    session.close()


def test_outputs_are_copies(bench: Bench, artifact: Artifact) -> None:
    build(artifact)
    with open_engine(artifact) as session:
        first = session.run(images(micro(), 2, seed=1))["logits"]
        kept = first.copy()
        session.run(images(micro(), 2, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_old_contexts_make_room(
    bench: Bench, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vssm.runtimes.tensorrt import runner as tensorrt_runner

    monkeypatch.setattr(tensorrt_runner, "_MAX_CONTEXTS", 2)
    build(artifact)
    with open_engine(artifact) as session:
        for batch in (1, 2, 3, 1):
            session.run(images(micro(), batch))
            assert len(bench.cuda.graphs) <= 2
    assert bench.cuda.graphs == {}


def test_threads_take_turns(bench: Bench, artifact: Artifact) -> None:
    build(artifact)
    with open_engine(artifact) as session, concurrent.futures.ThreadPoolExecutor(4) as pool:
        pictures = [images(micro(), 1 + i % 3, seed=i) for i in range(12)]
        want = [session.run(x)["logits"] for x in pictures]
        for got, expected in zip(pool.map(session.run, pictures), want, strict=True):
            np.testing.assert_array_equal(got["logits"], expected)


def test_other_threads_have_another_device(
    bench: Bench, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA keeps the current device for each thread, and begins with the first."""
    build(artifact)
    bench.cuda.current = 1
    session = open_engine(artifact)
    bench.cuda.current = 0
    used = []
    put = bench.cuda.put
    monkeypatch.setattr(
        bench.cuda, "put", lambda work: used.append(bench.cuda.current) or put(work)
    )
    session.run(images(micro(), 2))
    assert set(used) == {1}
    assert bench.cuda.current == 0
    with pytest.raises(ValueError, match="is outside the engine's"):
        session.run(images(micro(), 9))
    assert bench.cuda.current == 0
    session.close()
    assert (bench.cuda.current, bench.cuda.memory) == (0, {})


@pytest.mark.parametrize("batch", [1, 6])
def test_a_batch_outside_the_profile(bench: Bench, artifact: Artifact, batch: int) -> None:
    build(artifact, batch=(2, 2, 5))
    with (
        open_engine(artifact) as session,
        pytest.raises(ValueError, match=rf"batch={batch} is outside the engine's \[2, 5\]"),
    ):
        session.run(images(micro(), batch))


def test_memory_that_runs_out_is_given_back(bench: Bench, artifact: Artifact) -> None:
    build(artifact)
    for allocation in range(5):
        bench.cuda.fail_at = allocation
        with pytest.raises(RuntimeUnavailableError, match="failed: out of memory"):
            open_engine(artifact)
        assert bench.cuda.memory == {}


def test_check_and_run(bench: Bench, cli: Run, artifact: Artifact, picture: Path) -> None:
    build(artifact)
    assert cli("check", artifact.directory, "--runtime=tensorrt", "--per-block") == 0, cli.out
    assert "tensorrt 10.13.3.9, backend: kernel" in cli.out
    assert cli("run", artifact.directory, *[picture] * 7, "--runtime=tensorrt") == 0, cli.out
    assert cli("check", artifact.directory, "--runtime=tensorrt", "--threads=1") == 2
    assert "threads=1 with runtime='tensorrt'" in cli.out
    assert cli("check", artifact.directory, "--runtime=tensorrt", "--backend=body") == 2
    assert "the engine was built with 'kernel'" in cli.out
    assert cli("run", artifact.directory, picture, "--trust") == 2
    assert "which loads no engine" in cli.out


def test_bench_compares_with_a_dense_engine(bench: Bench, cli: Run, artifact: Artifact) -> None:
    build(artifact)
    command = ("bench", artifact.directory, "--runtime=tensorrt", "--samples=2")
    with shared_traces():
        assert cli(*command, "--batch=1,4") == 0, cli.out
    report = json.loads((artifact.directory / "bench.json").read_text())
    names = ["tensorrt", "tensorrt, no CUDA graph", "tensorrt, dense"]
    assert [row["subject"] for row in report["rows"]] == 2 * names
    assert {row["floor_ms"] for row in report["rows"]} == {None}
    assert report["rows"][1]["difference"] == 0
    assert report["context"]["gpu"] == "NVIDIA H100"
    assert cli(*command, "--batch=1,8") == 2
    assert "batches=[1, 8] leave the engine's [1, 5]" in cli.out
    assert cli(*command, "--threads=2") == 2
    assert "threads=[2] with runtime='tensorrt'" in cli.out


def test_bench_times_no_wrong_numbers(
    bench: Bench, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(artifact)
    real = tensorrt_session.EngineRunner.run
    monkeypatch.setattr(
        tensorrt_session.EngineRunner,
        "run",
        lambda self, feeds: {name: -x for name, x in real(self, feeds).items()},
    )
    with pytest.raises(ValueError, match="logits differ from the oracle's by"):
        vssm.bench_directory(artifact.directory, runtime="tensorrt", batches=(1,))


def _stale_model(bench: Bench, artifact: Artifact) -> None:
    edit(artifact, model_sha256="0" * 64)


def _stale_plugin(bench: Bench, artifact: Artifact) -> None:
    with bench.library.open("ab") as file:
        file.write(b"rebuilt")


def _tampered(bench: Bench, artifact: Artifact) -> None:
    with (artifact.directory / "model.plan").open("ab") as file:
        file.write(b"\x12\x01x")  # a producer's name, which changes nothing


def _other_version(bench: Bench, artifact: Artifact) -> None:
    bench.use(FakeTensorRT(bench.cuda, "10.14.1.48"))


def _other_capability(bench: Bench, artifact: Artifact) -> None:
    bench.use_cuda(FakeCuda(gpu="NVIDIA L4", major=8, minor=9))


def _other_gpu(bench: Bench, artifact: Artifact) -> None:
    bench.use_cuda(FakeCuda(gpu="NVIDIA H200"))


def _no_statement(bench: Bench, artifact: Artifact) -> None:
    (artifact.directory / "engine.json").unlink()


REFUSALS = [
    (_stale_model, "model.plan: stale, built from a model.onnx of sha256 000000000000...", False),
    (_stale_plugin, "model.plan: stale, built with libvssm_tensorrt.so", False),
    (_tampered, "model.plan: tampered or damaged", True),
    (_other_version, "foreign, built by tensorrt 10.13.3.9, but 10.14.1.48 is here", True),
    (_other_capability, "built for compute capability 9.0, but this GPU has 8.9", True),
    (_other_gpu, "foreign, built for NVIDIA H100, but this GPU is NVIDIA H200", True),
    (_no_statement, "an engine that does not say what it was built from is not loaded", True),
]


@pytest.mark.parametrize(("spoil", "message", "trusted"), REFUSALS)
def test_refusals(
    bench: Bench,
    cli: Run,
    artifact: Artifact,
    picture: Path,
    spoil: Any,
    message: str,
    trusted: bool,
) -> None:
    build(artifact)
    spoil(bench, artifact)
    command = ("run", artifact.directory, picture, "--runtime=tensorrt")
    assert cli(*command) == 2
    assert message in cli.out
    assert "build it with `vssm engine" in cli.out
    assert cli(*command, "--trust") == (0 if trusted else 2), cli.out
    assert ("trusted although" in cli.out) == trusted


def test_an_engine_may_be_made_for_others(bench: Bench, artifact: Artifact) -> None:
    build(artifact, version_compatible=True, hardware_compatible="ampere-plus")
    assert bench.trt.configs[-1].flags == ["version compatible"]
    bench.use(FakeTensorRT(bench.cuda, "11.0.0.1"))
    _other_capability(bench, artifact)
    open_engine(artifact).close()
    assert bench.trt.host_code
    bench.use(FakeTensorRT(bench.cuda, "10.12.0.1"))
    with pytest.raises(ArtifactError, match=r"built by tensorrt 10.13.3.9, but 10.12.0.1 is here"):
        open_engine(artifact)
    bench.use_cuda(FakeCuda(gpu="NVIDIA T4", major=7, minor=5))
    with pytest.raises(ArtifactError, match=r"compute capability 9.0, but this GPU has 7.5"):
        open_engine(artifact)


def test_same_compute_capability(bench: Bench, artifact: Artifact) -> None:
    build(artifact, hardware_compatible="same-compute-capability")
    _other_gpu(bench, artifact)
    open_engine(artifact).close()
    with pytest.raises(UnsupportedError, match="choose from ampere-plus, same-compute-capability"):
        build(artifact, hardware_compatible="hopper")


def test_a_library_inside_the_engine_is_not_loaded_twice(bench: Bench, artifact: Artifact) -> None:
    build(artifact, plugins_inside=True)
    assert bench.trt.configs[-1].plugins_to_serialize == [str(bench.library)]
    bench.use(FakeTensorRT(bench.cuda))
    _stale_plugin(bench, artifact)  # another library beside it does not matter
    open_engine(artifact).close()
    assert bench.trt.loaded == []
    assert bench.trt.host_code


def test_the_library_is_registered_once(bench: Bench, artifact: Artifact) -> None:
    for _ in range(2):
        build(artifact)
        open_engine(artifact).close()
    assert _from_memory(bench.trt.loaded)
    _stale_plugin(bench, artifact)
    with pytest.raises(RuntimeUnavailableError, match="another vssm plugin library is registered"):
        build(artifact)
    preloaded = FakeTensorRT(bench.cuda)
    preloaded.loaded.append("autoload")
    bench.use(preloaded)
    with pytest.raises(RuntimeUnavailableError, match="LD_PRELOAD, or a program's own"):
        build(artifact)


def test_host_code_stays_forbidden_otherwise(bench: Bench, artifact: Artifact) -> None:
    build(artifact)
    open_engine(artifact).close()
    _no_statement(bench, artifact)
    open_engine(artifact, trust=True).close()
    assert not bench.trt.host_code


def test_check_of_an_engine_without_a_statement(bench: Bench, cli: Run, artifact: Artifact) -> None:
    build(artifact)
    _no_statement(bench, artifact)
    command = ("check", artifact.directory, "--runtime=tensorrt", "--trust")
    assert cli(*command) == 0, cli.out
    assert "backend: unknown" in cli.out
    assert "trusted although engine.json is missing" in cli.out


def test_no_engine(bench: Bench, artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"model.plan is not there, .* `vssm engine "):
        open_engine(artifact)
    build(artifact)
    (artifact.directory / "model.plan").write_bytes(b"garbage")
    with pytest.raises(RuntimeUnavailableError, match="cannot load the engine: magic tag"):
        open_engine(artifact, trust=True)


def test_a_trusted_engine_of_another_model(
    bench: Bench, artifact: Artifact, tmp_path: Path
) -> None:
    other = exported(tmp_path / "other", micro(None))
    build(other)
    shutil.copy(other.directory / "model.plan", artifact.directory)
    with pytest.raises(ArtifactError, match="it is of another model; build it with"):
        open_engine(artifact, trust=True)
    assert bench.cuda.memory == {}


def test_no_gpu(bench: Bench, artifact: Artifact) -> None:
    bench.cuda.devices = 0
    for work in (build, open_engine):
        with pytest.raises(RuntimeUnavailableError, match=r"no GPU that CUDA can use \(no device"):
            work(artifact)
    assert not (artifact.directory / "model.plan").exists()


def test_body_and_plugin_are_not_confused(bench: Bench, artifact: Artifact) -> None:
    info = build(artifact, backend="body")
    assert (info.backend, info.plugin) == ("body", None)
    open_engine(artifact).close()
    assert bench.trt.loaded == []
    build(artifact)
    with pytest.raises(UnsupportedError, match="is already loaded in this process"):
        build(artifact, backend="body")
    bench.patch.setattr(tensorrt_build.api, "load_plugin", lambda *_: None)
    bench.use(FakeTensorRT(bench.cuda))
    with pytest.raises(UnsupportedError, match="made 0 plugin layers of 8 operators"):
        build(artifact)
    # Before 10.7 the bodies are left out, so that a missing plugin is a parser error.
    bench.use(FakeTensorRT(bench.cuda, "10.3.0.26"))
    with pytest.raises(UnsupportedError, match=r"node .*SelectiveScan\): plugin not found"):
        build(artifact)


def test_timing_cache_and_options(bench: Bench, artifact: Artifact, tmp_path: Path) -> None:
    build(artifact, memory_mib=64, level=5)
    config = bench.trt.configs[-1]
    assert config.limits == {"workspace": 64 << 20}
    assert config.builder_optimization_level == 5
    cache = artifact.directory / "timing-10.13.3.9-sm90.cache"
    assert cache.read_bytes() == b"timings"
    build(artifact)
    assert bench.trt.configs[-1].cache.data == b"timings"
    other = tmp_path / "other.cache"
    other.write_bytes(b"of another GPU")
    before = (artifact.directory / "model.plan").read_bytes()
    with pytest.raises(UnsupportedError, match=r"timing_cache=.*other.cache was not made by this"):
        build(artifact, timing_cache=other)
    for wrong in (tmp_path / "absent" / "x.cache", tmp_path):
        builds = len(bench.trt.configs)
        with pytest.raises(ArtifactError, match="cannot be written"):
            build(artifact, timing_cache=wrong)
        assert len(bench.trt.configs) == builds  # said before hours of building
    assert (artifact.directory / "model.plan").read_bytes() == before
    info = json.loads((artifact.directory / "engine.json").read_text())
    assert (info["gpu"], info["compute_capability"]) == ("NVIDIA H100", ["9.0"])
    assert (info["cuda"], info["plugin"]["file"]) == ("13.0", "libvssm_tensorrt.so")


def test_a_library_that_changes_meanwhile(bench: Bench, artifact: Artifact) -> None:
    def progress(*_: object) -> None:
        _stale_plugin(bench, artifact)

    with pytest.raises(ArtifactError, match=r"libvssm_tensorrt.so was changed while the engine"):
        tensorrt_build.build_engine(artifact, SMALL, progress=progress)
    assert not (artifact.directory / "engine.json").exists()


def test_no_tf32(bench: Bench, artifact: Artifact) -> None:
    build(artifact)
    assert bench.trt.configs[-1].flags == []


def test_a_failed_build_says_why(bench: Bench, artifact: Artifact) -> None:
    bench.trt.fail_build = True
    with pytest.raises(UnsupportedError, match="could not find any implementation"):
        build(artifact)
    assert not (artifact.directory / "engine.json").exists()


def test_too_old_a_tensorrt(bench: Bench, artifact: Artifact) -> None:
    bench.use(FakeTensorRT(bench.cuda, "8.6.1"))
    with pytest.raises(RuntimeUnavailableError, match=r"tensorrt=8.6.1 is older than 10.0"):
        build(artifact)
