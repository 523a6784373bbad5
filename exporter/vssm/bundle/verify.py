"""Checks a bundle: every hash, and a run of the model from inside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from vssm.artifact.directory import MODEL_FILE, Artifact
from vssm.artifact.manifest import MANIFEST_NAME, manifest_from_json
from vssm.bundle.manifest import (
    BUNDLE_MANIFEST,
    BundleManifest,
    compare_files,
    read_bundle_manifest,
    read_listed,
)
from vssm.bundle.triton import read_served_name, unserved
from vssm.bundle.web import PAGE
from vssm.errors import ArtifactError
from vssm.files.messages import message_types
from vssm.files.private import library_copy
from vssm.files.staging import settle
from vssm.runtimes.ort import run_once
from vssm.runtimes.session import compare_outputs

_LIBRARY: Final = "lib/libvssm_onnxruntime.so"
# What a whole detector's dense head says of the anchors of its finest level (docs/detection.md).
_DENSE: Final = frozenset({b"rpn.logits0", b"rpn.cls0", b"head.cls0"})
# What is read and added of an ONNX file here, numbered as in onnx.proto.
_ONNX: Final = message_types(
    "dense_head",
    {
        "Value": {"name": (1, "bytes")},
        "Node": {"output": (2, "bytes*")},
        "Graph": {"node": (1, "Node*"), "output": (12, "Value*")},
        "Model": {"graph": (7, "Graph")},
    },
)


@dataclass(frozen=True)
class BundleReport:
    """What `verify_bundle` found; `failures` are sentences, empty when it passed.

    Attributes:
        name: of the model.
        files: how many were hashed.
        kernels: how many kernels of the bundle's library ran for one image; 0 if it did not run.
        difference: largest difference between what library and fallback bodies compute, over the
            largest number of it; None if it did not run.
        compared: which output that is, such as "logits"; of a whole detector the
            dense head's, such as "rpn.cls0".
        not_run: why the model did not run, empty if it did.
        failures: what is wrong.
    """

    name: str
    files: int
    kernels: int = 0
    difference: float | None = None
    compared: str = ""
    not_run: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every file is as it was made, and the model ran wherever it can."""
        return not self.failures


def verify_bundle(directory: Path) -> BundleReport:
    """Hash every file, then run the model on the CPU with the bundle's own library.

    A file that is missing, extra or changed is a failure, and then nothing of the bundle is run: a
    library is code. What runs is a private copy of what was hashed.

    Raises:
        ArtifactError: the directory is no bundle, or changes while it is looked at.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    settle(directory)  # of a replacement that a killed process left half done
    manifest = read_bundle_manifest(directory)
    files = len(manifest.files)
    failures = compare_files(directory, manifest)
    if not failures and PAGE in manifest.files:
        return BundleReport(manifest.name, files, not_run="it is a page, which a browser runs")
    if not failures:
        artifact = _model(directory, manifest)
        # Only now: names and versions are worth a look in files that are as they were made.
        failures = list(_false_claims(directory, manifest, artifact))
    if failures:
        return BundleReport(manifest.name, files, not_run="files differ", failures=failures)
    if (reason := unserved(artifact.manifest).get("onnxruntime")) is not None:
        return BundleReport(manifest.name, files, not_run=reason)
    library = library_copy(directory / _LIBRARY)
    # Hashed once more as it was copied: it may have been replaced since `compare_files`.
    if library.sha256 != manifest.files[_LIBRARY]:
        raise ArtifactError(
            f"{library.source} was changed while the bundle was looked at, so it is not run; "
            "verify again"
        )
    return _run(artifact, Path(library.path), manifest.name, files)


def _model(directory: Path, manifest: BundleManifest) -> Artifact:
    """The bundle's export, as its manifest lists it."""
    text = read_listed(directory, manifest, f"model/{MANIFEST_NAME}").decode()
    try:
        return Artifact(directory / "model", manifest_from_json(text))
    except ValueError as error:
        raise ArtifactError(
            f"{directory / 'model' / MANIFEST_NAME} is damaged: {error}; make the bundle again"
        ) from error


def _false_claims(directory: Path, manifest: BundleManifest, artifact: Artifact) -> Iterator[str]:
    """What the bundle's manifest says of its model that the model's files do not."""
    # The export may be older than the vssm that packed it.
    made = {k: v for k, v in manifest.versions.items() if k != "vssm"}
    exported = {k: v for k, v in artifact.manifest.versions.items() if k != "vssm"}
    if made != exported:
        yield f"{BUNDLE_MANIFEST} says versions {made}, but model/{MANIFEST_NAME} {exported}"
    variant = "onnxruntime" if "tensorrt" in unserved(artifact.manifest) else "tensorrt"
    config = f"triton/{variant}/{manifest.name}/config.pbtxt"
    if config not in manifest.files:
        yield f"{BUNDLE_MANIFEST} says name {manifest.name}, but there is no {config}"
    elif (served := read_served_name(read_listed(directory, manifest, config).decode())) != (
        manifest.name
    ):
        yield f"{BUNDLE_MANIFEST} says name {manifest.name}, but {config} {served}"
    if _LIBRARY not in manifest.files:
        yield f"{_LIBRARY} is missing"


def _run(artifact: Artifact, library: Path, name: str, files: int) -> BundleReport:
    shape = (1, *artifact.image_shape)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    compared, graph = artifact.manifest.main_output.name, None
    if artifact.manifest.gives_boxes:
        # Boxes come in any number, none at worst; what they are chosen by does not.
        compared, graph = _with_dense_head(artifact.read(MODEL_FILE))
    with artifact.opened_model(graph) as model:
        ran = run_once(Path(model), images, library)
        # Without the library the functions in the file run: another program for the same model.
        bodies = run_once(Path(model), images, None).outputs[compared]
    difference, same = compare_outputs(ran.outputs[compared], bodies)
    failures = []
    # A user's own module may have none of our operators, and then no kernel has to run.
    if not ran.kernels and artifact.manifest.operators:
        failures.append(f"{Path(_LIBRARY).name} was loaded, but none of its kernels ran")
    if not same:
        failures.append(
            f"{compared} with {Path(_LIBRARY).name} differ from the fallback bodies' by "
            f"{difference:.1e} of the largest; the library and the model do not belong together"
        )
    return BundleReport(name, files, ran.kernels, difference, compared, failures=failures)


def _with_dense_head(model: bytes) -> tuple[str, bytes]:
    """An inner value of a whole detector that every image has, and the file that gives it too."""
    nodes = _ONNX["Model"].FromString(model).graph.node
    name = next((name for node in nodes for name in node.output if name in _DENSE), None)
    if name is None:
        raise ArtifactError(
            f"model/{MODEL_FILE} has none of the values {sorted(map(bytes.decode, _DENSE))} of a "
            "detector of this package, so nothing can be compared; export the model with this vssm"
        )
    # Protobuf joins what follows to what it has read, so the file need not be written anew.
    more = _ONNX["Model"](graph={"output": [{"name": name}]})
    return name.decode(), model + more.SerializeToString()
