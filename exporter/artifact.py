"""An exported directory as one object; the running side's way in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import ArtifactError
from exporter.manifest import Manifest, read_manifest, verify

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
                f"{path} is not there: the export was made with --no-weights, and this needs the "
                "model in PyTorch; export again with weights"
            )
        return path


def open_artifact(artifact: Artifact | str | os.PathLike[str]) -> Artifact:
    """Read and verify an exported directory; an Artifact is verified again.

    Raises:
        ArtifactError: it is no export, or a file's hash is not the one in model.json.
    """
    directory = artifact.directory if isinstance(artifact, Artifact) else Path(artifact)
    manifest = read_manifest(directory)
    verify(directory, manifest)
    return Artifact(directory, manifest)
