"""Sessions: what ran is what was asked for, in every runtime, from several threads."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exports import exported, images, micro

import vssm
from vssm.artifact.directory import Artifact
from vssm.errors import ArtifactError, RuntimeUnavailableError, UnsupportedError
from vssm.runtimes.ort import OrtCpuSession, sum_node_times
from vssm.runtimes.session import run_any

RUNS = [
    ("ort-cpu", "kernel"),
    ("ort-cpu", "body"),
    ("torch", "kernel"),
    ("torch", "reference"),
]
# float32 against float32 by three programs: 1.3e-6 of the largest logit measured.
SAME = 4e-6


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(tmp_path_factory.mktemp("session"), micro())


def test_all_runtimes_agree_and_say_what_ran(artifact: Artifact) -> None:
    x = images(micro(), 3)
    outputs = {}
    for runtime, backend in RUNS:
        with vssm.open_session(artifact, runtime, backend=backend, threads=1) as session:
            outputs[runtime, backend] = session.run(x)
            assert session.info.runtime == runtime
            assert session.info.backend == backend
            assert session.info.threads == 1
            assert (session.info.library is not None) == (backend == "kernel")
            assert session.info.backend in str(session.info)
            assert "None" not in str(session.info)
    want = outputs.pop(("torch", "reference"))
    for got in outputs.values():
        assert set(got) == set(want) == {"logits", "kept_positions_0", "kept_positions_1"}
        scale = np.abs(want["logits"]).max()
        np.testing.assert_allclose(got["logits"], want["logits"], rtol=0, atol=SAME * scale)
        for name in ("kept_positions_0", "kept_positions_1"):
            assert got[name].dtype == np.int64
            np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize(
    ("batches", "ran"), [((4, 4), [4, 4]), ((2, 3), [3, 2]), ((1, 1), [1] * 5), ((8, 16), [8])]
)
def test_any_number_of_images_in_the_batches_that_a_session_takes(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, batches: tuple[int, int], ran: list[int]
) -> None:
    x, sizes = images(micro(), 5), []
    with vssm.open_session(artifact, threads=1) as session:
        whole, run = session.run(x), session.run
        monkeypatch.setattr(OrtCpuSession, "batches", property(lambda _: batches))
        monkeypatch.setattr(session, "run", lambda some: sizes.append(len(some)) or run(some))
        found = run_any(session, x)
    assert sizes == ran
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=SAME * np.abs(value).max())


def test_a_body_in_place_of_the_kernel_is_an_error(artifact: Artifact) -> None:
    """A graph without our operators, passed off as the file: the counter of kernel runs tells."""
    model = onnx.inliner.inline_local_functions(onnx.load(artifact.model_path))
    x = images(micro(), 1)
    kernel = OrtCpuSession(artifact, backend="kernel", model=model.SerializeToString())
    with kernel, pytest.raises(RuntimeUnavailableError, match=r"ran the fallback bodies"):
        kernel.run(x)
    with OrtCpuSession(artifact, backend="body", model=model.SerializeToString()) as body:
        assert body.run(x)["logits"].shape == (1, 7)


def test_missing_library_is_an_error(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeUnavailableError("library=libvssm_onnxruntime.so is in none of these")

    monkeypatch.setattr("vssm.runtimes.library.find_library", missing)
    with pytest.raises(RuntimeUnavailableError, match=r"libvssm_onnxruntime"):
        vssm.open_session(artifact, "ort-cpu")
    with vssm.open_session(artifact, "ort-cpu", backend="body") as session:
        assert session.run(images(micro(), 1))["logits"].shape == (1, 7)


@pytest.mark.parametrize("backend", [None, "kernel", "reference"])
def test_a_torch_session_runs_what_it_says(artifact: Artifact, backend: str | None) -> None:
    with (
        vssm.open_session(artifact, "torch", backend=backend) as session,
        vssm.record_backends() as ran,
    ):
        session.run(images(micro(), 1))
    assert session.info.backend == (backend or "kernel")
    assert {ran_on for _, ran_on in ran} == {session.info.backend}


def test_library_without_an_operator_is_an_error(artifact: Artifact) -> None:
    operators = {**artifact.manifest.operators, "FutureScan": 1}
    newer = dataclasses.replace(artifact.manifest, operators=operators)
    with pytest.raises(RuntimeUnavailableError, match=r"no kernels for FutureScan"):
        OrtCpuSession(dataclasses.replace(artifact, manifest=newer))


def test_bfloat16_is_refused_with_the_reason(tmp_path: Path) -> None:
    artifact = exported(tmp_path, micro(), dtype="bfloat16")
    with pytest.raises(UnsupportedError, match=r"no bfloat16 kernels for MatMul .* float16"):
        vssm.open_session(artifact, "ort-cpu")


@pytest.mark.parametrize(("runtime", "backend"), RUNS)
def test_a_session_serves_several_threads(
    artifact: Artifact, runtime: str, backend: str | None
) -> None:
    batches = [images(micro(), 1 + i % 3, seed=i) for i in range(12)]
    with vssm.open_session(artifact, runtime, backend=backend, threads=1) as session:
        alone = [session.run(x)["logits"] for x in batches]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            together = [out["logits"] for out in pool.map(session.run, batches)]
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("runtime", ["ort-cpu", "torch"])
def test_threads_do_not_come_along_to_a_fork(
    artifact: Artifact, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in the fork would wait for them without end, as torch's did."""
    x = images(micro(), 1)
    with vssm.open_session(artifact, runtime, threads=2) as session:
        session.run(x)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(RuntimeUnavailableError, match=r"with 2 threads .* is a fork .*; open"):
            session.run(x)
    monkeypatch.undo()
    with vssm.open_session(artifact, runtime, threads=1) as session:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        session.run(x)


def test_bad_arguments(artifact: Artifact) -> None:
    with pytest.raises(ValueError, match=r"runtime='cuda' is not one of ort-cpu, ort-cuda, torch"):
        vssm.open_session(artifact, "cuda")
    with pytest.raises(ValueError, match=r"backend='fast' is not one of kernel, body"):
        vssm.open_session(artifact, "ort-cpu", backend="fast")
    with pytest.raises(ValueError, match=r"backend='body' is not one of kernel, reference"):
        vssm.open_session(artifact, "torch", backend="body")
    for runtime in ("ort-cpu", "torch"):
        for threads in (-1, 0, 1025, 10**20):
            with pytest.raises(ValueError, match=r"threads=-?\d+ is outside \[1, 1024\]"):
                vssm.open_session(artifact, runtime, threads=threads)
        with pytest.raises(TypeError, match=r"threads='2' is not an integer"):
            vssm.open_session(artifact, runtime, threads="2")


@pytest.mark.parametrize("runtime", ["ort-cpu", "torch"])
def test_a_closed_session_says_so(artifact: Artifact, runtime: str) -> None:
    session = vssm.open_session(artifact, runtime)
    session.close()
    session.close()
    with pytest.raises(ValueError, match=r"session=closed"):
        session.run(images(micro(), 1))


def test_a_torch_session_gives_the_threads_back(artifact: Artifact) -> None:
    before = torch.get_num_threads()
    with vssm.open_session(artifact, "torch", threads=before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("runtime", "backend"), RUNS)
def test_views_and_read_only_images_run(
    artifact: Artifact, runtime: str, backend: str | None
) -> None:
    view = images(micro(), 2)[:, ::-1]  # BGR to RGB
    view.setflags(write=False)
    with vssm.open_session(artifact, runtime, backend=backend) as session:
        want = session.run(np.ascontiguousarray(view))["logits"]
        np.testing.assert_array_equal(session.run(view)["logits"], want)


def test_a_session_needs_the_model_file_alone(tmp_path: Path) -> None:
    artifact = exported(tmp_path, micro())
    (artifact.directory / "weights.safetensors").unlink()
    with vssm.open_session(artifact) as session:
        assert session.run(images(micro(), 1))["logits"].shape == (1, 7)
    assert vssm.check_parity(micro(), artifact).passed
    with pytest.raises(ArtifactError, match=r"weights.safetensors"):
        vssm.open_session(artifact, "torch")


def test_what_onnxruntime_refuses_is_said_in_one_line(artifact: Artifact) -> None:
    model = onnx.load(artifact.model_path)
    model.ir_version = 999
    with pytest.raises(UnsupportedError, match=r"ONNX Runtime .* cannot open .*model.onnx"):
        OrtCpuSession(artifact, model=model.SerializeToString())
    with OrtCpuSession(artifact) as session, pytest.raises(UnsupportedError, match=r"cannot run"):
        session.run_feeds({"images": np.zeros((1, 3, 8, 8), np.float32)})


def test_bad_images(artifact: Artifact) -> None:
    x = images(micro(), 1)
    with vssm.open_session(artifact, backend="body") as session:
        with pytest.raises(TypeError, match=r"float64 is no NumPy array of float32"):
            session.run(x.astype(np.float64))
        with pytest.raises(TypeError, match=r"list of no dtype is no NumPy array"):
            session.run(x.tolist())
        for shape in ((1, 3, 48, 40), (3, 48, 48), (0, 3, 48, 48)):
            with pytest.raises(ValueError, match=r"images.shape=.* is not \('batch', 3, 48, 48\)"):
                session.run(np.zeros(shape, np.float32))


def test_a_changed_file_is_not_opened(tmp_path: Path) -> None:
    artifact = exported(tmp_path, micro())
    data = bytearray(artifact.model_path.read_bytes())
    data[len(data) // 2] ^= 1
    artifact.model_path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model.onnx"):
        vssm.open_session(artifact)
    (artifact.directory / "model.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"model.json"):
        vssm.open_session(artifact.directory)
    with pytest.raises(ArtifactError, match=r"nowhere"):
        vssm.open_session(tmp_path / "nowhere")


def test_profile_names_our_operators(artifact: Artifact) -> None:
    session = OrtCpuSession(artifact, threads=1, profile=True)
    with session:
        for _ in range(2):
            session.run(images(micro(), 1))
        times = session.profiled_operators()
    assert {"SelectiveScan", "GatedSelectiveScan", "TokenGather"} <= set(times)
    assert list(times.values()) == sorted(times.values(), reverse=True)


def test_a_profile_counts_each_nodes_fastest_run() -> None:
    def event(name: str, kind: str, microseconds: int) -> dict[str, object]:
        name += "_kernel_time"
        return {"cat": "Node", "name": name, "dur": microseconds, "args": {"op_name": kind}}

    events = [event("a", "Conv", 500), event("a", "Conv", 300), event("b", "Conv", 200)]
    events += [event("c", "MatMul", 900), {"cat": "Session", "name": "model_run", "dur": 9}]
    assert sum_node_times(events) == {"MatMul": 0.9, "Conv": 0.5}
