"""Exports of a module of the user's: what stands in them for the model that cannot be rebuilt.

model.json has no configuration that would make the module again, so `reference.safetensors` holds
inputs and what the float64 module said of them, for `vssm check` to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import MODULE_KEY
from vssm.errors import ArtifactError
from vssm.types import Array

REFERENCE_FILE: Final = "reference.safetensors"


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


def stored_reference(artifact: Artifact) -> tuple[dict[str, Array], dict[str, Array]]:
    """The inputs kept at export, and the float64 outputs of the module, by name.

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
        arrays: dict[str, Array] = load(artifact.read(REFERENCE_FILE))
    # A LookupError is a type of numbers that numpy lacks.
    except (SafetensorError, LookupError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); export the module again") from error
    names = [tensor.name for tensor in artifact.manifest.inputs]
    if not arrays.keys() > set(names):
        raise ArtifactError(f"{path} lacks an input or the outputs; export the module again")
    return {name: arrays.pop(name) for name in names}, arrays


@dataclass(frozen=True)
class OracleMerge:
    """What one merge of the float64 model chose.

    Attributes:
        pairs: (batch, r, 2) indices of each token that joined another, and of that other.
        similarity: (batch, n, m) of the tokens `sources` with the tokens `destinations`.
        sources: (1 or batch, n) indices.
        destinations: (1 or batch, m) indices.
    """

    pairs: Array
    similarity: Array
    sources: Array
    destinations: Array


@dataclass(frozen=True)
class OracleResult:
    """What the float64 model said of some images, as arrays.

    Attributes:
        logits: (batch, classes); of a module without logits, its first output; of a whole detector
            the first of the dense head's.
        kept_positions: one (batch, num_keep) a stage, original positions in index order.
        scores: the (batch, seqlen) scores that chose them; of a merge the similarity.
        positions: the (batch, seqlen) positions those scores belong to.
        blocks: value name -> (batch, seqlen, d_model), a block's hidden or residual stream; and
            further outputs.
        merges: by stage, what those that merge chose.
        labels: the class of every pixel (batch, height, width), of a segmenter that gives it.
        label_margins: how far its best class is from its second, over the largest logit.
        detections: of a whole detector, its outputs for each image.
        main: the value that `logits` is, where it is no output; None for the main output.
    """

    logits: Array
    kept_positions: list[Array]
    scores: list[Array]
    positions: list[Array]
    blocks: dict[str, Array]
    merges: Mapping[int, OracleMerge] = field(default_factory=dict)
    labels: Array | None = None
    label_margins: Array | None = None
    detections: Sequence[Mapping[str, Array]] | None = None
    main: str | None = None


def module_result(outputs: Mapping[str, Array], main: str) -> OracleResult:
    """The float64 outputs of a user's module by name, `scores_i` of a pruned one among them."""
    further = dict(outputs)
    logits = further.pop(main)
    stages = sum(name.startswith("scores_") for name in outputs)
    kept = [further.pop(f"kept_positions_{i}") for i in range(stages)]
    scores = [further.pop(f"scores_{i}") for i in range(stages)]
    positions = np.arange(scores[0].shape[1]) if scores else np.arange(0)
    # A stage scores what the stage before it kept; the first scores everything.
    before = [np.broadcast_to(positions, scores[0].shape), *kept[:-1]] if scores else []
    return OracleResult(logits, kept, scores, before, further)
