"""The most likely classes of image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vssm.artifact.directory import MODEL_FILE, open_artifact
from vssm.artifact.preprocessing import preprocessing_of, read_labels
from vssm.errors import check_least
from vssm.evaluation.data import load
from vssm.runtimes.open import check_runtime, open_session
from vssm.runtimes.session import RuntimeInfo, run_any
from vssm.types import Array, Steps

_RUN_BATCH = 16  # images a run of `classify`


def classify(
    directory: Path,
    files: Sequence[Path],
    runtime: str,
    *,
    backend: str | None = None,
    threads: int | None = None,
    trust: bool = False,
    labels: Path | None = None,
    top: int = 5,
    progress: Steps = lambda *_: None,
) -> tuple[list[dict[str, Any]], RuntimeInfo]:
    """The `top` classes of image files, with their softmax probabilities.

    `progress` is called with the images that are done.

    Returns:
        A row for each file, with "error" in place of predictions where it is no readable image.

    Raises:
        ValueError: no file is an image, logits are not finite, the labels do not fit, or `top` is
            below 1.
    """
    check_least(1, top=top)
    check_runtime(runtime, backend=backend, threads=threads, trust=trust)
    artifact = open_artifact(directory, only=(MODEL_FILE,))
    manifest, spec = artifact.manifest, preprocessing_of(artifact)
    classes = manifest.num_classes
    names = manifest.labels if labels is None else read_labels(labels, classes)
    results: list[dict[str, Any]] = []
    with open_session(artifact, runtime, backend=backend, threads=threads, trust=trust) as session:
        for start in range(0, len(files), _RUN_BATCH):
            progress("classifying images", start, len(files))
            some = files[start : start + _RUN_BATCH]
            loaded = load([str(file) for file in some], spec)
            scores = iter(run_any(session, loaded.images)["logits"] if len(loaded.images) else ())
            # `scores` has no entry for a file that could not be read: next() only for the others.
            for file, error in zip(some, loaded.errors, strict=True):
                best = [] if error else _predictions(file, next(scores), names, top)
                results.append({"file": str(file), "predictions": best, "error": error})
        # One readable image is an answer; with none there is nothing to print but the reason.
        if not any(row["predictions"] for row in results):
            raise ValueError(results[0]["error"])
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
        # Stable, so that equal shares come in the order of their classes, on every platform.
        for c in np.argsort(-shares, kind="stable")[:top]
    ]


def class_probabilities(logits: Array, image: Path | str) -> Array:
    """Softmax over the logits (classes,) of an image, in float64.

    Raises:
        ValueError: they are not finite; the message names the image.
    """
    if not np.isfinite(logits).all():
        raise ValueError(
            f"image={image} has logits that are NaN or infinite: the model overflows; see "
            "`vssm check --per-block --image FILE`, or export it in float32"
        )
    # Less the largest: exp of a logit above 709 would be infinite even in float64.
    shares = np.exp(logits.astype(np.float64) - logits.max())
    probabilities: Array = shares / shares.sum()
    return probabilities
