"""Whether a runtime computes what the model computes: `vssm.check_parity`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vssm.artifact.directory import MODEL_FILE, Artifact, open_artifact
from vssm.artifact.manifest import BOXES, DETECTIONS
from vssm.artifact.preprocessing import image_files, preprocess
from vssm.artifact.reference import (
    OracleResult,
    is_module,
    module_result,
    refuse_module,
    stored_reference,
)
from vssm.files.atomic import sha256_of
from vssm.files.progress import automatic, shows_progress
from vssm.parity.compare import ParityReport, compare
from vssm.runtimes.open import ENGINE_RUNTIMES, check_runtime, open_session, ort_session
from vssm.runtimes.session import RuntimeInfo, Session, by_name
from vssm.types import Array, Steps

if TYPE_CHECKING:
    from vssm.runtimes.torch import TorchModule


@shows_progress
def check_parity(
    model: TorchModule | None,
    artifact: Artifact | str | os.PathLike[str],
    runtime: str = "ort-cpu",
    images: Array | Mapping[str, Array] | None = None,
    *,
    backend: str | None = None,
    threads: int | None = None,
    trust: bool = False,
    per_block: bool = False,
    progress: Steps = automatic,
) -> ParityReport:
    """Compare a runtime with the float64 oracle, forced to its positions and free-running.

    Args:
        model: the oracle; None rebuilds it from the export's weights.
        artifact: the export, or its directory.
        runtime: "ort-cpu", "ort-cuda", or "tensorrt" or "tensorrt-rtx", which build an engine of
            the edited graph for the forced positions.
        images: (batch, 3, height, width) float32, preprocessed, or what else the model takes, of
            several inputs by name; None for `sample_images`, or the inputs that the export of a
            user's module keeps. A quantised export needs images that it was not calibrated on:
            `held_out_images`.
        backend: as for `open_session`.
        threads: as for `open_session`, and of the oracle; None leaves torch's as they are.
        trust: as for `open_session`.
        per_block: also compare every block's streams, and name the first out of tolerance.
        progress: called with how far it is; a bar in a terminal or a notebook by default.

    Raises:
        ValueError: the runtime is the oracle itself, or `model` is another one than was exported.
        ArtifactError, RuntimeUnavailableError, UnsupportedError: as for `open_session`.
    """
    if runtime == "torch":
        raise ValueError(
            "runtime='torch' is the oracle itself; check another runtime, for example ort-cpu"
        )
    check_runtime(runtime, backend=backend, threads=threads, trust=trust)
    # After the options have been checked: this import brings torch, which takes seconds.
    from vssm.runtimes.torch import model_of, oracle, torch_threads

    # The weights beside the graph are looked at only where the oracle must be made from them.
    opened = open_artifact(artifact, only=None if model is None else (MODEL_FILE,))
    if images is None:
        _refuse_noise(opened)
    known: OracleResult | None = None
    if model is None and is_module(opened):
        # A user's module cannot be rebuilt from the export: what it gave then is the oracle.
        images, known = _kept_reference(opened, images, per_block)
    progress(f"running {runtime}", 0, 1)
    with open_session(opened, runtime, backend=backend, threads=threads, trust=trust) as session:
        images = _default_images(opened, session) if images is None else images
        feeds = by_name(opened.manifest, images)
        # A user's module of several inputs may have some without a batch: they stay whole.
        single = session.batches == (1, 1) and len(opened.manifest.fed) == 1
        free = _joined([session.run(part) for part in _parts(feeds, single)])
        info = session.info
    if known is None:
        with torch_threads(threads):
            exact = model_of(opened) if model is None else model
            known = oracle(exact, opened, feeds, progress=progress)
    progress("comparing with the float64 oracle", 0, 1)

    def run_edited(graph: bytes, feeds: Mapping[str, Array]) -> dict[str, Array]:
        # An engine cannot be edited: the forced graph is built into one of its own.
        if runtime in ENGINE_RUNTIMES:
            return _run_engine(opened, graph, feeds, info)
        # By what did run, not by what was asked for: `backend` may have been None.
        edited = ort_session(runtime)(
            opened, backend=info.backend, threads=info.threads, model=graph
        )
        with edited:
            return _joined([edited.run_feeds(part) for part in _parts(feeds, single)])

    return compare(
        opened,
        feeds,
        known,
        info=info,
        free=free,
        run_edited=run_edited,
        per_block=per_block,
    )


def _refuse_noise(artifact: Artifact) -> None:
    quantization = artifact.manifest.quantization
    if quantization is not None and not is_module(artifact):
        raise ValueError(
            f"images: {artifact.directory} is quantised ({quantization}), and noise says nothing "
            "about that: give images of the kind that it is for, but not those of the calibration "
            "(vssm check --image FILE or FOLDER)"
        )


def held_out_images(paths: Sequence[Path], artifact: Artifact) -> Array:
    """Image files and those of folders, preprocessed; none that the export was calibrated on.

    Raises:
        ValueError: there is no image, one cannot be read, or one was calibrated on.
    """
    files = [file for path in paths for file in (image_files(path) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"image={', '.join(map(str, paths))} holds no file; give images")
    quantization = artifact.manifest.quantization
    if quantization is not None and quantization.calibration is not None:
        known = set(quantization.calibration.images)
        for file in files:
            if file.is_file() and sha256_of(file) in known:
                raise ValueError(
                    f"image={file} is one that the export was calibrated on, so it proves nothing; "
                    "give images that were held out"
                )
    return preprocess(files, artifact)


def _kept_reference(
    artifact: Artifact, images: object, per_block: bool
) -> tuple[dict[str, Array], OracleResult]:
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
    return kept, module_result(outputs, artifact.manifest.main_output.name)


def _default_images(artifact: Artifact, session: Session) -> Array | dict[str, Array]:
    """Noise, as many as the session takes, or what the export of a user's module keeps."""
    if is_module(artifact):
        return stored_reference(artifact)[0]
    low, high = session.batches
    # What takes one image at a time is given several one by one.
    return sample_images(artifact, 2 if high == 1 else min(max(low, 4), high))


def _parts(feeds: Mapping[str, Array], single: bool) -> list[Mapping[str, Array]]:
    """The images of a batch, one by one where a session takes no more."""
    if not single:
        return [feeds]
    count = len(next(iter(feeds.values())))
    return [{name: value[i : i + 1] for name, value in feeds.items()} for i in range(count)]


def _joined(runs: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """The outputs of runs, one behind the other, and how many detections each has."""
    outputs = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
    if BOXES in outputs:
        outputs[DETECTIONS] = np.array([len(run[BOXES]) for run in runs])
    return outputs


def sample_images(artifact: Artifact, count: int) -> Array:
    """Standard normal images (count, 3, height, width) float32, the same every time."""
    shape = (count, *artifact.image_shape)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _run_engine(
    artifact: Artifact, graph: bytes, feeds: Mapping[str, Array], info: RuntimeInfo
) -> dict[str, Array]:
    """Run an edited graph in an engine of its own, built as the session's was."""
    from vssm.runtimes.tensorrt.build import run_graph

    with artifact.opened_model(graph) as path:
        return run_graph(Path(path), feeds, runtime=info.runtime, backend=info.backend)
