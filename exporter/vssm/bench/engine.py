"""What `vssm bench` compares on TensorRT: the engine, the same without CUDA graphs, a dense one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from vssm._version import __version__
from vssm.artifact.directory import Artifact
from vssm.bench.measure import BenchReport, Contender, check_arguments, measure
from vssm.bench.subjects import asked_outputs
from vssm.models.cost import count
from vssm.onnx.export import export
from vssm.runtimes.session import Session, compare_outputs
from vssm.runtimes.tensorrt.build import EngineRequest, build_engine
from vssm.runtimes.tensorrt.session import TensorRtSession
from vssm.runtimes.torch import TorchSession, model_of
from vssm.types import Array, Steps


def bench_engine(
    artifact: Artifact,
    *,
    runtime: str,
    batches: Sequence[int],
    samples: int,
    trust: bool,
    progress: Steps,
) -> BenchReport:
    """Time the engine beside an export, and an engine of its dense twin, in one run.

    Times are the host's, from images in its memory to outputs in its memory; the first batch's
    logits are compared with the oracle's before anything is timed.

    Args:
        artifact: a verified export with an engine beside it.
        runtime: "tensorrt" or "tensorrt-rtx".
        batches: batch sizes, inside the engine's profile.
        samples: timed runs of each.
        trust: as for `open_session`.
        progress: called with a line a step.

    Raises:
        ValueError: a batch is outside the profile, or the engine's logits are wrong.
        ArtifactError, RuntimeUnavailableError, UnsupportedError: as for the session and the build.
    """
    check_arguments(batches, (1,), samples)
    with _open(artifact, runtime, 1, trust=trust) as session:
        low, high = session.batches
        if not low <= min(batches) <= max(batches) <= high:
            raise ValueError(
                f"batches={list(batches)} leave the engine's [{low}, {high}]; measure others, or "
                "build it again with --batch MIN,OPT,MAX"
            )
        progress("comparing with the oracle", 0, 1)
        # Before the dense engine is built and anything is timed: wrong numbers end the run at once.
        _check_logits(session, artifact, batches[0])
        device, version = session.info.device, session.info.version
    with _dense_engine(artifact, runtime, batches, progress) as dense:
        subjects = _subjects(artifact, dense, runtime, trust=trust)
        rows = measure(
            subjects,
            artifact.image_shape,
            None,
            batches=batches,
            samples=samples,
            progress=progress,
        )
    manifest = artifact.manifest
    command = (
        f"vssm bench {artifact.directory} --batch {','.join(map(str, batches))} --samples "
        f"{samples} --runtime {runtime}"
    )
    context = {
        "model": f"{manifest.name} {manifest.precision} {manifest.tokens}",
        "weights": manifest.weights,
        "images": "x".join(map(str, artifact.image_shape)) + " float32, after 2 runs to warm up",
        "gpu": device,
        runtime: version,
        "vssm": __version__,
        "command": command,
    }
    return BenchReport(rows=rows, rates=None, operators={}, scan_over_floor=None, context=context)


def _open(
    artifact: Artifact,
    runtime: str,
    threads: int,
    *,
    trust: bool = False,
    graphs: bool | None = None,
) -> Session:
    """`threads` is 1: the host only waits."""
    return TensorRtSession(artifact, runtime=runtime, trust=trust, graphs=graphs)


def _subjects(
    artifact: Artifact, dense: Artifact | None, runtime: str, *, trust: bool
) -> list[Contender]:
    work = count(model_of(artifact))
    made = partial(_open, artifact, runtime, trust=trust)
    subjects = [Contender(runtime, made, work.exps, work.gemm)]
    if runtime == "tensorrt":  # the other product runs without graphs of ours anyway
        plain = partial(made, graphs=False)
        name = f"{runtime}, no CUDA graph"
        subjects.append(Contender(name, plain, work.exps, work.gemm, runtime))
    if dense is not None:
        work = count(model_of(dense))
        opened = partial(_open, dense, runtime)
        subjects.append(Contender(f"{runtime}, dense", opened, work.exps, work.gemm))
    return subjects


@contextmanager
def _dense_engine(
    artifact: Artifact, runtime: str, batches: Sequence[int], progress: Steps
) -> Iterator[Artifact | None]:
    """The same weights without the schedule, exported and built in a temporary directory."""
    manifest = artifact.manifest
    if manifest.dense or manifest.quantization is not None:
        yield None
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "dense"
        dtype, opset = manifest.dtype, manifest.opset
        model = model_of(artifact, dense=True)
        outputs = asked_outputs(model, manifest)

        def twin(phase: str, done: int, total: int, note: str = "", /) -> None:
            progress(f"dense twin: {phase}", done, total, note)

        dense = export(model, path, dtype=dtype, outputs=outputs, opset=opset, progress=twin)
        twin("building an engine", 0, 1)
        # MIN, OPT, MAX: one profile for all batches, tuned for the largest.
        sizes = (min(batches), max(batches), max(batches))
        build_engine(dense, EngineRequest(runtime, batch=sizes), progress=twin)
        yield dense


def _check_logits(session: Session, artifact: Artifact, batch: int) -> None:
    shape = (batch, *artifact.image_shape)
    images = np.random.default_rng(batch).standard_normal(shape).astype(np.float32)
    got = session.run(images)["logits"]
    # By name: the session's default is our own kernels, and this is to be the oracle.
    with TorchSession(artifact, backend="reference") as oracle:
        want: Array = oracle.run(images)["logits"]
    difference, same = compare_outputs(got, want)
    # Ranges that were calibrated on images do not hold for noise: of it only NaN says something.
    if artifact.manifest.quantization is not None and np.isfinite(got).all():
        return
    if not same:
        raise ValueError(
            f"the engine's logits differ from the oracle's by {difference:.1e} of the largest; a "
            f"timing of wrong numbers says nothing: run vssm check --runtime {session.info.runtime}"
        )
