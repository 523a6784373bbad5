"""Exports of a module of the user's: what stands in them for the model that cannot be rebuilt.

model.json has no configuration that would make the module again, so `reference.safetensors` holds
inputs and what the float64 module said of them, for `vssm check` to compare with.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vssm.artifact.directory import Artifact
from vssm.errors import ArtifactError

REFERENCE_FILE: Final = "reference.safetensors"
MODULE_KEY: Final = "module"  # of model.json's config
Array = npt.NDArray[Any]


def is_module(artifact: Artifact) -> bool:
    """Whether the export was made by `export_module`."""
    return MODULE_KEY in artifact.manifest.config


def refuse_module(artifact: Artifact, what: str) -> None:
    """Refuse what needs the model in PyTorch, for an export of the user's own module.

    Raises:
        ArtifactError: it is such an export.
    """
    if is_module(artifact):
        raise ArtifactError(
            f"{artifact.directory} is the export of a module of yours ({artifact.manifest.name}), "
            f"whose code is not in it; {what}"
        )


def stored_reference(artifact: Artifact) -> tuple[Array, dict[str, Array]]:
    """The inputs kept at export, and the float64 outputs of the module by name.

    Raises:
        ArtifactError: they were not kept, or the file is damaged.
    """
    if REFERENCE_FILE not in artifact.manifest.files:
        refuse_module(
            artifact,
            "and it was made without reference: give check_parity the model and images, or export "
            "again",
        )
    path = artifact.directory / REFERENCE_FILE
    try:
        arrays: dict[str, Array] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); export the module again") from error
    if "input" not in arrays or len(arrays) < 2:
        raise ArtifactError(f"{path} lacks the input or the outputs; export the module again")
    return np.asarray(arrays.pop("input")), arrays
