"""The commands as functions: the only file, with cli, that sees the making and the running side."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vssm.artifact.directory import MODEL_FILE, Artifact, open_artifact
from vssm.artifact.preprocessing import preprocess, read_labels
from vssm.artifact.reference import is_module, refuse_module, stored_reference
from vssm.commands.pipeline_deploy import ENGINE_RUNTIMES, open_engine, run_engine
from vssm.evaluation.evaluate_folded import class_probabilities
from vssm.parity.compare import OracleResult, ParityReport, compare, module_result
from vssm.runtimes.session import Array, RuntimeInfo, Session

if TYPE_CHECKING:
    from vssm.runtimes.ort import OrtSession
    from vssm.runtimes.torch import TorchModule

RUNTIMES = ("ort-cpu", "ort-cuda", "torch", *ENGINE_RUNTIMES)
_RUN_BATCH = 16  # images a run of `classify`


def open_session(
    artifact: Artifact | str | os.PathLike[str],
    runtime: str = "ort-cpu",
    *,
    operators: str | None = None,
    threads: int | None = None,
    device: int | None = None,
    cuda_graph_batch: int | None = None,
    trust: bool = False,
) -> Session:
    """Open an export in a runtime. torch is imported for runtime "torch" alone.

    Args:
        artifact: what `export` returned, or the directory it wrote, wherever that is now.
        runtime: "ort-cpu", "ort-cuda", "torch", "tensorrt" or "tensorrt-rtx".
        operators: "kernel" (this package's library; the default) or "body" (the file's fallback
            functions); for runtime "torch" None; for an engine what it must have been built with.
        threads: threads of one run; None for all cores; not for an engine.
        trust: load an engine that is foreign or tampered; the session's `info` then says so.
        device: ordinal of the GPU, for "ort-cuda"; None for the first.
        cuda_graph_batch: for "ort-cuda", the one batch size to record a CUDA graph for.

    Raises:
        ValueError: an argument is not one of these.
        ArtifactError: the directory is no export, or was changed.
        RuntimeUnavailableError: the runtime or the library is missing.
        UnsupportedError: the runtime cannot run this export.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime={runtime!r} is not one of {', '.join(RUNTIMES)}; choose one")
    options = {"device": device, "cuda_graph_batch": cuda_graph_batch}
    on_gpu = {name: value for name, value in options.items() if value is not None}
    if on_gpu and runtime != "ort-cuda":
        given = ", ".join(f"{name}={value}" for name, value in on_gpu.items())
        raise ValueError(f"{given} with runtime={runtime!r}: only ort-cuda takes it; leave it out")
    opened = open_artifact(artifact, only=None if runtime == "torch" else (MODEL_FILE,))
    if runtime in ENGINE_RUNTIMES:
        return open_engine(opened, runtime, operators, threads=threads, trust=trust)
    if trust:
        raise ValueError(
            f"trust=True with runtime={runtime!r}, which loads no engine: leave it out"
        )
    if runtime == "torch":
        if operators is not None:
            raise ValueError(
                f"operators={operators!r} with runtime='torch', which runs the oracle: leave it out"
            )
        from vssm.runtimes.torch import TorchSession

        return TorchSession(opened, threads=threads)
    return _ort_session(runtime)(opened, operators=operators or "kernel", threads=threads, **on_gpu)


def _ort_session(runtime: str) -> Callable[..., OrtSession]:
    """The class of a runtime; the CUDA one loads libraries of the driver."""
    from vssm.runtimes.ort import OrtCpuSession

    if runtime == "ort-cpu":
        return OrtCpuSession
    from vssm.runtimes.ort_cuda import OrtCudaSession

    return OrtCudaSession


def check_parity(
    model: TorchModule | None,
    artifact: Artifact | str | os.PathLike[str],
    runtime: str = "ort-cpu",
    images: Array | None = None,
    *,
    operators: str | None = None,
    threads: int | None = None,
    trust: bool = False,
    per_block: bool = False,
) -> ParityReport:
    """Compare a runtime with the float64 oracle, forced to its positions and free-running.

    Args:
        model: the oracle; None rebuilds it from the export's weights.
        artifact: the export, or its directory.
        runtime: "ort-cpu", "ort-cuda", or "tensorrt" or "tensorrt-rtx", which build an engine of
            the edited graph for the forced positions.
        images: (batch, 3, height, width) float32, preprocessed, or what else the model takes; None
            for `sample_images`, or the inputs that the export of a user's module keeps.
        operators: as for `open_session`.
        threads: as for `open_session`.
        trust: as for `open_session`.
        per_block: also compare every block's streams, and name the first out of tolerance.

    Raises:
        ValueError: the runtime is the oracle itself, or `model` is another one than was exported.
        ArtifactError, RuntimeUnavailableError, UnsupportedError: as for `open_session`.
    """
    if runtime == "torch":
        raise ValueError(
            "runtime='torch' is the oracle itself; check another runtime, for example ort-cpu"
        )
    from vssm.runtimes.torch import model_of, oracle

    opened = open_artifact(artifact, only=None if model is None else (MODEL_FILE,))
    known: OracleResult | None = None
    if model is None and is_module(opened):
        images, known = _kept_reference(opened, images, per_block)
    with open_session(
        opened, runtime, operators=operators, threads=threads, trust=trust
    ) as session:
        images = _default_images(opened, session) if images is None else images
        free = session.run(images)
        info = session.info
    if known is None:
        known = oracle(model_of(opened) if model is None else model, opened, images)
    expected = known

    def run_edited(graph: bytes, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if runtime in ENGINE_RUNTIMES:
            return run_engine(graph, feeds, info)
        edited = _ort_session(runtime)(
            opened, operators=info.operators, threads=info.threads, model=graph
        )
        with edited:
            return edited.run_feeds(feeds)

    return compare(
        opened,
        images,
        expected,
        info=info,
        free=free,
        run_edited=run_edited,
        per_block=per_block,
    )


def _kept_reference(
    artifact: Artifact, images: Array | None, per_block: bool
) -> tuple[Array, OracleResult]:
    """The inputs and outputs that the export of a user's module keeps."""
    if per_block:
        refuse_module(artifact, "so its blocks cannot be compared; leave --per-block out")
    if images is not None:
        refuse_module(
            artifact,
            "so only the inputs it keeps can be checked; leave the images out, or give "
            "check_parity the model",
        )
    kept, outputs = stored_reference(artifact)
    return kept, module_result(outputs)


def _default_images(artifact: Artifact, session: Session) -> Array:
    """Noise, as many as the session takes, or what the export of a user's module keeps."""
    if is_module(artifact):
        return stored_reference(artifact)[0]
    low, high = session.batches
    return sample_images(artifact, min(max(low, 4), high))


def sample_images(artifact: Artifact, count: int = 4, *, seed: int = 0) -> Array:
    """Standard normal images (count, 3, height, width) float32, the same for the same seed."""
    shape = (count, *artifact.image_shape)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check_directory(
    directory: Path,
    runtime: str,
    *,
    image_files: Sequence[Path] = (),
    operators: str | None = None,
    threads: int | None = None,
    trust: bool = False,
    per_block: bool = False,
) -> ParityReport:
    """`check_parity` on an export's own weights and image files; None of these: noise."""
    artifact = open_artifact(directory)
    images = preprocess(list(image_files), artifact) if image_files else None
    return check_parity(
        None,
        artifact,
        runtime,
        images,
        operators=operators,
        threads=threads,
        trust=trust,
        per_block=per_block,
    )


def classify(
    directory: Path,
    files: Sequence[Path],
    runtime: str,
    *,
    operators: str | None = None,
    threads: int | None = None,
    trust: bool = False,
    labels: Path | None = None,
    top: int = 5,
) -> tuple[list[dict[str, Any]], RuntimeInfo]:
    """The `top` classes of image files, with their softmax probabilities.

    Raises:
        ValueError: a file is no image, its logits are not finite, the labels do not fit, or `top`
            is below 1.
    """
    if top < 1:
        raise ValueError(f"top={top} is below 1; give the number of classes to print")
    artifact = open_artifact(directory, only=(MODEL_FILE,))
    manifest = artifact.manifest
    classes = int(manifest.outputs[0].shape[1])
    names = manifest.labels if labels is None else read_labels(labels, classes)
    results: list[dict[str, Any]] = []
    with open_session(
        artifact, runtime, operators=operators, threads=threads, trust=trust
    ) as session:
        step = min(_RUN_BATCH, session.batches[1])
        for start in range(0, len(files), step):
            some = files[start : start + step]
            logits = session.run(preprocess(list(some), artifact))["logits"]
            results += [
                {"file": str(file), "predictions": _predictions(file, scores, names, top)}
                for file, scores in zip(some, logits, strict=True)
            ]
        return results, session.info


def _predictions(
    file: Path, logits: Array, names: Sequence[str] | None, top: int
) -> list[dict[str, Any]]:
    """The best classes of one image, by its logits (classes,)."""
    shares = class_probabilities(logits, file)
    return [
        {
            "class": int(c),
            "label": str(c) if names is None else names[c],
            "probability": float(shares[c]),
        }
        for c in np.argsort(-shares, kind="stable")[:top]
    ]


def describe_models() -> list[dict[str, Any]]:
    """Name, parameters, image size, tokens and cost of every model."""
    from vssm.models import catalog

    return catalog.describe_models()
