"""An exported directory as one object; the running side's way in."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vssm.artifact.manifest import MANIFEST_NAME, Manifest, read_manifest, verify
from vssm.errors import ArtifactError
from vssm.files.atomic import staged_directory

MODEL_FILE = "model.onnx"
INLINED_FILE = "model.inlined.onnx"
WEIGHTS_FILE = "weights.safetensors"
# What our commands write into an export's directory, whether or not its manifest lists it.
EXPORT_FILES: Final = frozenset(
    {
        MANIFEST_NAME,
        "model.onnx",
        "model.inlined.onnx",
        "weights.safetensors",
        "parity.json",
        "bench.json",
        "bench.html",
        "model.plan",
        "engine.json",
        "model.rtx.plan",
        "engine.rtx.json",
        "evaluate.csv",
        "evaluate.csv.journal",
        "evaluate.json",
    }
)


@dataclass(frozen=True)
class Artifact:
    """An export: its directory and what `model.json` says of it."""

    directory: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        """The ONNX file with custom operators and their fallback bodies."""
        return self.directory / MODEL_FILE

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, height, width) of the input."""
        _, channels, height, width = self.manifest.inputs[0].shape
        return int(channels), int(height), int(width)

    @property
    def weights_path(self) -> Path:
        """The float32 weights under their official keys.

        Raises:
            ArtifactError: the export was made without them.
        """
        path = self.directory / WEIGHTS_FILE
        if not path.exists():
            raise ArtifactError(
                f"{path} is not there: the export was made with --no-weights, or lost them, and "
                "this needs the model in PyTorch; export again with weights"
            )
        return path


def open_artifact(
    artifact: Artifact | str | os.PathLike[str], *, only: Collection[str] | None = None
) -> Artifact:
    """Read and verify an exported directory, wherever it is now; an Artifact is verified again.

    Args:
        artifact: the export.
        only: the files to verify besides model.json; None for all.

    Raises:
        ArtifactError: it is no export, or a file's hash is not the one in model.json.
    """
    directory = artifact.directory if isinstance(artifact, Artifact) else Path(artifact).absolute()
    manifest = read_manifest(directory)
    verify(directory, manifest, only=only)
    return Artifact(directory, manifest)


def staged_export(
    target: str | os.PathLike[str], *, force: bool = False
) -> AbstractContextManager[Path]:
    """An empty directory to write an export into; it moves into `target` on success.

    Files in `target` that no export wrote are never touched.

    Args:
        target: the directory to write; its missing parents are made.
        force: replace the export (a `model.json`) that `target` holds.

    Raises:
        ArtifactError: `target` is no directory, holds an export and not `force`, holds a foreign
            file of the same name as a new one, or cannot be written. Nothing was changed then.
    """

    def replaceable(final: Path) -> Collection[str]:
        if os.path.lexists(final / MANIFEST_NAME) and not force:
            raise ArtifactError(
                f"output={final} already holds an export ({MANIFEST_NAME}), which is not "
                "overwritten unasked; name another directory, or pass force=True (--force) to "
                "replace it"
            )
        return _files_of_export(final)

    return staged_directory(target, replaceable=replaceable, last=MANIFEST_NAME)


def _files_of_export(directory: Path) -> Collection[str]:
    """Names that the export in `directory` wrote: none if it holds no manifest."""
    manifest = directory / MANIFEST_NAME
    if not os.path.lexists(manifest):
        return frozenset()
    try:
        listed = json.loads(manifest.read_bytes())["files"]
        # A name with a separator would reach outside the directory; no export writes one.
        names = {n for n in listed if n not in {".", ".."} and Path(n).name == n}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        names = set()  # A damaged manifest may be replaced; the fixed names are ours all the same.
    return EXPORT_FILES | {n for n in names if (directory / n).is_file()}
