"""An exported directory as one object; the running side's way in."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vssm.artifact.manifest import Manifest, read_manifest, verify
from vssm.errors import ArtifactError

MODEL_FILE = "model.onnx"
INLINED_FILE = "model.inlined.onnx"
WEIGHTS_FILE = "weights.safetensors"


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
