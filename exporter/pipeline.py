"""The commands as functions: the only file, with cli, that sees the making and the running side."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifact import Artifact, open_artifact
from exporter.benchmark import BenchReport, Progress
from exporter.files import atomic_write_bytes
from exporter.parity import ParityReport, compare
from exporter.preprocessing import preprocess, read_labels
from exporter.runtimes.session import Array, RuntimeInfo, Session
from exporter.schedule import PruneSchedule

if TYPE_CHECKING:
    from exporter.models import VisionModel

RUNTIMES = ("ort-cpu", "torch")


def open_session(
    artifact: Artifact | str | os.PathLike[str],
    runtime: str = "ort-cpu",
    *,
    operators: str | None = None,
    threads: int | None = None,
) -> Session:
    """Open an export in a runtime. torch is imported for runtime "torch" alone.

    Args:
        artifact: what `export` returned, or the directory it wrote, wherever that is now.
        runtime: "ort-cpu" or "torch".
        operators: "kernel" (this package's library; the default) or "body" (the file's fallback
            functions); for runtime "torch" None.
        threads: threads of one run; None for all cores.

    Raises:
        ValueError: an argument is not one of these.
        ArtifactError: the directory is no export, or was changed.
        RuntimeUnavailableError: the runtime or the library is missing.
        UnsupportedError: the runtime cannot run this export.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime={runtime!r} is not one of {', '.join(RUNTIMES)}; choose one")
    opened = open_artifact(artifact)
    if runtime == "torch":
        if operators is not None:
            raise ValueError(
                f"operators={operators!r} with runtime='torch', which runs the oracle: leave it out"
            )
        from exporter.torch_session import TorchSession

        return TorchSession(opened, threads=threads)
    from exporter.runtimes.ort import OrtCpuSession

    return OrtCpuSession(opened, operators=operators or "kernel", threads=threads)


def check_parity(
    model: VisionModel | None,
    artifact: Artifact | str | os.PathLike[str],
    runtime: str = "ort-cpu",
    images: Array | None = None,
    *,
    operators: str | None = None,
    threads: int | None = None,
    per_block: bool = False,
) -> ParityReport:
    """Compare a runtime with the float64 oracle, forced to its positions and free-running.

    Args:
        model: the oracle; None rebuilds it from the export's weights.
        artifact: the export, or its directory.
        runtime: "ort-cpu".
        images: (batch, 3, height, width) float32, preprocessed; None for `sample_images`.
        operators: as for `open_session`.
        threads: as for `open_session`.
        per_block: also compare every block's streams, and name the first out of tolerance.

    Raises:
        ValueError: the runtime is the oracle itself.
        ArtifactError, RuntimeUnavailableError, UnsupportedError: as for `open_session`.
    """
    if runtime == "torch":
        raise ValueError(
            "runtime='torch' is the oracle itself; check another runtime, for example ort-cpu"
        )
    from exporter.runtimes.ort import OrtCpuSession
    from exporter.torch_session import model_of, oracle

    opened = open_artifact(artifact)
    with open_session(opened, runtime, operators=operators, threads=threads) as session:
        images = sample_images(opened) if images is None else images
        free = session.run(images)
        info = session.info
    expected = oracle(model_of(opened) if model is None else model, opened, images)

    def run_edited(graph: bytes, feeds: Mapping[str, Array]) -> dict[str, Array]:
        edited = OrtCpuSession(opened, operators=info.operators, threads=info.threads, model=graph)
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


def sample_images(artifact: Artifact, count: int = 4, *, seed: int = 0) -> Array:
    """Standard normal images (count, 3, height, width) float32, the same for the same seed."""
    shape = (count, *artifact.image_shape)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class ExportRequest:
    """What `vssm export` was asked for; the fields are its options."""

    name: str
    checkpoint: Path | None = None
    source: str = "model"
    schedule: str | None = None
    alignment: str = "gap"
    importance: str = "clip"
    dtype: str = "float32"
    opset: int = 18
    num_classes: int = 1000
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: Path | None = None
    inline: bool = False
    weights: bool = True
    force: bool = False


def export_model(
    request: ExportRequest, directory: Path, *, progress: Progress = lambda _: None
) -> Artifact:
    """Build, load, export; nothing is written unless all of it succeeds.

    Raises:
        ValueError, VssmError: as `create_model`, `load_checkpoint` and `export` do.
    """
    from exporter.checkpoint import load_checkpoint
    from exporter.models import create_model
    from exporter.models.schedules import default_schedule
    from exporter.onnx_export import export

    schedule = None
    rules: dict[str, Any] = {"alignment": request.alignment, "importance": request.importance}
    if request.schedule == "default":
        schedule = default_schedule(request.name, **rules)
    elif request.schedule is not None:
        schedule = PruneSchedule.parse(request.schedule, **rules)
    progress(f"building {request.name}")
    model = create_model(
        request.name, schedule=schedule, num_classes=request.num_classes, **request.options
    )
    labels = None if request.labels is None else read_labels(request.labels, request.num_classes)
    if request.checkpoint is not None:
        progress(f"loading {request.checkpoint}")
        load_checkpoint(model, request.checkpoint, source=request.source)
    progress("tracing and writing")
    return export(
        model,
        directory,
        dtype=request.dtype,
        opset=request.opset,
        inline=request.inline,
        weights=request.weights,
        labels=labels,
        force=request.force,
    )


def check_directory(
    directory: Path,
    runtime: str,
    *,
    image_files: Sequence[Path] = (),
    operators: str | None = None,
    threads: int | None = None,
    per_block: bool = False,
) -> ParityReport:
    """`check_parity` on an export's own weights; writes parity.json beside it."""
    artifact = open_artifact(directory)
    images = preprocess(list(image_files), artifact) if image_files else None
    report = check_parity(
        None,
        artifact,
        runtime,
        images,
        operators=operators,
        threads=threads,
        per_block=per_block,
    )
    _write_report(artifact, "parity.json", report)
    return report


def classify(
    directory: Path,
    files: Sequence[Path],
    runtime: str,
    *,
    operators: str | None = None,
    threads: int | None = None,
    labels: Path | None = None,
    top: int = 5,
) -> tuple[list[dict[str, Any]], RuntimeInfo]:
    """The `top` classes of image files, with their softmax probabilities.

    Raises:
        ValueError: a file is no image, the labels do not fit, or `top` is below 1.
    """
    if top < 1:
        raise ValueError(f"top={top} is below 1; give the number of classes to print")
    artifact = open_artifact(directory)
    manifest = artifact.manifest
    classes = int(manifest.outputs[0].shape[1])
    names = manifest.labels if labels is None else read_labels(labels, classes)
    images = preprocess(list(files), artifact)
    with open_session(artifact, runtime, operators=operators, threads=threads) as session:
        logits = session.run(images)["logits"].astype(np.float64)
        info = session.info
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    results: list[dict[str, Any]] = []
    for file, share in zip(files, shares, strict=True):
        best = np.argsort(-share, kind="stable")[:top]
        results.append(
            {
                "file": str(file),
                "predictions": [
                    {
                        "class": int(c),
                        "label": str(c) if names is None else names[c],
                        "probability": float(share[c]),
                    }
                    for c in best
                ],
            }
        )
    return results, info


def bench_directory(
    directory: Path,
    *,
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (1,),
    samples: int = 21,
    torch_loop: bool = True,
    page: Path | None = None,
    progress: Progress = lambda _: None,
) -> BenchReport:
    """Measure an export and, where it is pruned, its dense twin; writes bench.json and a page."""
    from exporter.bench_page import write_page
    from exporter.bench_subjects import bench

    artifact = open_artifact(directory)
    report = bench(
        artifact,
        batches=batches,
        threads=threads,
        samples=samples,
        torch_loop=torch_loop,
        progress=progress,
    )
    _write_report(artifact, "bench.json", report)
    write_page(report, page or artifact.directory / "bench.html")
    return report


def describe_models() -> list[dict[str, Any]]:
    """Name, parameters, image size, tokens and cost of every model."""
    from exporter.models import catalog

    return catalog.describe_models()


def _write_report(artifact: Artifact, name: str, report: ParityReport | BenchReport) -> None:
    text = json.dumps(dataclasses.asdict(report), indent=2)
    atomic_write_bytes(artifact.directory / name, f"{text}\n".encode())
