"""Checks a bundle: every hash, and a run of the model from inside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from vssm.artifact.directory import MODEL_FILE, Artifact, open_artifact
from vssm.bundle.manifest import compare_files, read_bundle_manifest
from vssm.runtimes.ort import run_once

_LIBRARY: Final = "lib/libvssm_onnxruntime.so"
# Far above the error of any dtype: two programs that should be one model (as in benchmark.py).
_SAME: Final = 0.2


@dataclass(frozen=True)
class BundleReport:
    """What `verify_bundle` found; `failures` are sentences, empty when it passed.

    Attributes:
        name: of the model.
        files: how many were hashed.
        kernels: how many kernels of the bundle's library ran for one image; 0 if it did not run.
        difference: largest difference between the logits of library and fallback bodies, over the
            largest logit; None if it did not run.
        not_run: why the model did not run, empty if it did.
        failures: what is wrong.
    """

    name: str
    files: int
    kernels: int = 0
    difference: float | None = None
    not_run: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every file is as it was made, and the model ran wherever it can."""
        return not self.failures


def verify_bundle(directory: Path) -> BundleReport:
    """Hash every file, then run the model on the CPU with the bundle's own library.

    A file that is missing, extra or changed is a failure, and then nothing of the bundle is run: a
    library is code.

    Raises:
        ArtifactError: the directory is no bundle.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    manifest = read_bundle_manifest(directory)
    files = len(manifest.files)
    if failures := compare_files(directory, manifest):
        return BundleReport(manifest.name, files, not_run="files differ", failures=failures)
    artifact = open_artifact(directory / "model")
    if artifact.manifest.dtype == "bfloat16":
        reason = "bfloat16 has no matrix product in ONNX Runtime's CPU provider"
        return BundleReport(manifest.name, files, not_run=reason)
    return _run(artifact, directory.absolute() / _LIBRARY, manifest.name, files)


def _run(artifact: Artifact, library: Path, name: str, files: int) -> BundleReport:
    shape = (1, *artifact.image_shape)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model = artifact.directory / MODEL_FILE
    ran = run_once(model, images, library)
    main = artifact.manifest.main_output.name
    logits, bodies = ran.outputs[main], run_once(model, images, None).outputs[main]
    difference = float(np.abs(logits - bodies).max() / np.abs(bodies).max())
    failures = []
    if not ran.kernels and artifact.manifest.operators:
        failures.append(f"{library.name} was loaded, but none of its kernels ran")
    if not difference <= _SAME:  # NaN counts
        failures.append(
            f"logits with {library.name} differ from the fallback bodies' by {difference:.1e} of "
            "the largest; the library and the model do not belong together"
        )
    return BundleReport(name, files, ran.kernels, difference, failures=failures)
