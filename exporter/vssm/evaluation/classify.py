"""The most likely classes of image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vssm.artifact.directory import MODEL_FILE, open_artifact
from vssm.artifact.preprocessing import preprocess, read_labels
from vssm.runtimes.open import open_session
from vssm.runtimes.session import RuntimeInfo
from vssm.types import Array

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
    classes = manifest.num_classes
    names = manifest.labels if labels is None else read_labels(labels, classes)
    results: list[dict[str, Any]] = []
    with open_session(artifact, runtime, backend=backend, threads=threads, trust=trust) as session:
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
    shares = np.exp(logits.astype(np.float64) - logits.max())
    probabilities: Array = shares / shares.sum()
    return probabilities
