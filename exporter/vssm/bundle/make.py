"""Makes a bundle: a directory with all that a server needs to run an export."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vssm._version import __version__
from vssm.artifact.data_sets import Colour, palette_of, voc_colours
from vssm.artifact.directory import INLINED_FILE, Artifact
from vssm.artifact.manifest import BATCH, LOGITS, Manifest, write_manifest
from vssm.artifact.preprocessing import read_labels
from vssm.bundle.manifest import BundleManifest, hash_files, staged_bundle, write_bundle_manifest
from vssm.bundle.triton import ServingOptions, onnxruntime_config, tensorrt_config, unserved
from vssm.errors import RuntimeUnavailableError, UnsupportedError, check_least
from vssm.native_library import ORT_LIBRARY, find_library
from vssm.runtimes.library import TENSORRT_LIBRARY, find_sources
from vssm.runtimes.tensorrt.engine import check_batch

AUTOLOAD_LIBRARY: Final = "vssm_tensorrt_autoload"
_SERVING_FILES: Final = ("Dockerfile", "README.md", "client.py", "start.sh")
# What CMake needs for the libraries; it reads the version from the package's file.
_SOURCES: Final = ("CMakeLists.txt", "exporter/vssm/_version.py", "plugins", "examples/cpp")
_NOT_SHIPPED: Final = "plugins/emulation"  # of a checkout: what tests alone need
_PLAIN: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
# By kind, so that what a checkout has besides (caches, builds) stays out.
_SOURCE_SUFFIXES: Final = frozenset({".h", ".cuh", ".cpp", ".cu", ".cmake", ".txt", ".py", ".md"})


@dataclass(frozen=True)
class BundleRequest:
    """What a bundle is to hold.

    Attributes:
        name: what the server calls the model; None for the export's name.
        labels: file of class names; None for the export's own, or "class 0", "class 1", ... A
            model without classes has none.
        serving: how the server batches.
        force: replace a bundle that is there.
    """

    name: str | None = None
    labels: Path | None = None
    serving: ServingOptions = field(default_factory=ServingOptions)
    force: bool = False


def check_request(request: BundleRequest) -> None:
    """Refuse what cannot be served.

    Raises:
        ValueError: a value is out of its range.
    """
    serving = request.serving
    if serving.batch is not None:
        check_batch(serving.batch)
        low, opt, high = serving.batch
        if low > 1:
            raise ValueError(
                f"batch={low},{opt},{high}: a server may send a single image; let MIN be 1"
            )
    check_least(0, queue_us=serving.queue_us)
    check_least(1, instances=serving.instances)


def make_bundle(artifact: Artifact, output: Path, request: BundleRequest) -> BundleManifest:
    """Write a bundle of a verified export; it appears whole or not at all.

    Raises:
        ValueError: the request is out of range, or the labels do not fit.
        ArtifactError: `output` cannot be written, or may not be replaced.
        RuntimeUnavailableError: the ONNX Runtime library or the sources are missing.
        UnsupportedError: the model has tensors that no server takes, or no variant that serves it.
    """
    check_request(request)
    _check_servable(artifact, request)
    name = _served_name(artifact, request)
    labels = _labels(artifact.manifest, request)
    find_library(ORT_LIBRARY)  # said before anything is written
    sources = find_sources()
    with staged_bundle(output, force=request.force) as root:
        _put_model(artifact, root / "model")
        absent = _put_libraries(root / "lib")
        absent |= _put_repositories(artifact, root, request, name=name, labels=labels)
        _put_sources(sources, root / "sources")
        for file in _SERVING_FILES:
            shutil.copyfile(sources / "examples/serving" / file, root / file)
        if palette := _palette(artifact.manifest, labels):
            (root / "palette.txt").write_text(palette, encoding="utf-8")
        (root / "bundle.env").write_text(_settings(artifact, request, name), encoding="utf-8")
        manifest = BundleManifest(
            name=name,
            files=hash_files(root),
            absent=absent,
            # The export's versions, but its vssm: this one made the bundle.
            versions={**artifact.manifest.versions, "vssm": __version__},
        )
        write_bundle_manifest(root, manifest)
    return manifest


def _served_name(artifact: Artifact, request: BundleRequest) -> str:
    """It becomes a folder, and a word in a file that a shell reads."""
    name = request.name or artifact.manifest.name
    for field_name, value in (("name", name), ("input", artifact.manifest.inputs[0].name)):
        if not _PLAIN.fullmatch(value):
            raise ValueError(
                f"{field_name}={value!r} is not a letter followed by letters, digits, '_', '-'; "
                "give the model such a name with --name, and its input when it is exported"
            )
    return name


def _labels(manifest: Manifest, request: BundleRequest) -> Sequence[str]:
    """A name for each class; none for a model that gives levels or other tensors."""
    classes = _classes(manifest)
    if request.labels is not None:
        if not classes:
            outputs = ", ".join(output.name for output in manifest.outputs)
            raise ValueError(
                f"labels={request.labels}: the export of {manifest.name} has the outputs {outputs} "
                "and so no classes; leave it out"
            )
        return read_labels(request.labels, classes)
    return manifest.labels or [f"class {index}" for index in range(classes)]


def _classes(manifest: Manifest) -> int:
    if manifest.gives_boxes:
        return int(manifest.config.get("num_classes", 0))
    main = manifest.main_output
    # Of maps (batch, classes, height, width) the second axis, of a classifier that too.
    return int(main.shape[1]) if main.name == LOGITS and len(main.shape) in {2, 4} else 0


def _palette(manifest: Manifest, labels: Sequence[str]) -> str:
    """A line for each class of a segmenter or detector: red, green, blue and its name."""
    found: Sequence[Colour]
    if manifest.gives_boxes:
        # As `vssm run` draws them: the first colour is black, which is hard to see.
        found = voc_colours(len(labels) + 1)[1:]
    elif labels and len(manifest.main_output.shape) == 4:
        found = palette_of(labels, len(labels))
    else:
        return ""
    lines = zip(found, labels, strict=True)
    return "".join(f"{r} {g} {b} {name}\n" for (r, g, b), name in lines)


def _check_servable(artifact: Artifact, request: BundleRequest) -> None:
    """Refuse a model that no variant can serve, or not as it is asked for."""
    manifest = artifact.manifest
    request.serving.batching(manifest)
    if not manifest.gives_boxes and len(manifest.inputs) > 1:
        raise UnsupportedError(
            f"{artifact.directory} has the inputs "
            f"{', '.join(spec.name for spec in manifest.inputs)}; a bundle's server and client "
            "send one: wrap the module in one of one input, or serve model.onnx yourself"
        )
    batch = manifest.inputs[0].shape[0]
    if not manifest.gives_boxes and batch != BATCH:
        raise UnsupportedError(
            f"{artifact.directory} takes {batch} images at a time, but a server gathers as many as "
            "there are; export it with a batch of any size"
        )
    if manifest.sizes:
        raise UnsupportedError(
            f"{artifact.directory} takes images of any {' and '.join(manifest.sizes)}, but an "
            "engine and its server have one size; export it without --dynamic"
        )
    if len(reasons := unserved(manifest)) > 1:
        raise UnsupportedError(f"{artifact.directory}: {'; '.join(reasons.values())}")


def _put_model(artifact: Artifact, folder: Path) -> None:
    """The export without its weights file, which serving does not read."""
    folder.mkdir()
    names = artifact.model_files()
    for name in names:
        artifact.copy(name, folder / name)
    # Or the bundle's model.json would list weights that are not in it.
    kept = {name: artifact.manifest.files[name] for name in names}
    write_manifest(folder, dataclasses.replace(artifact.manifest, files=kept))


def _put_libraries(folder: Path) -> dict[str, str]:
    """Copy the libraries that are here; returns what is missing, and why."""
    folder.mkdir()
    absent = {}
    for library in (ORT_LIBRARY, TENSORRT_LIBRARY, AUTOLOAD_LIBRARY):
        try:
            path = find_library(library)
        except RuntimeUnavailableError:
            absent[f"lib/lib{library}.so"] = (
                "not built on this machine (it takes nvcc); the Dockerfile builds it from sources/"
            )
        else:
            shutil.copyfile(path, folder / path.name)
    return absent


def _put_repositories(
    artifact: Artifact, root: Path, request: BundleRequest, *, name: str, labels: Sequence[str]
) -> dict[str, str]:
    manifest = artifact.manifest
    plan_note = (
        "start.sh puts model.plan here: an engine belongs to the GPU that it was built on.\n"
    )
    configs: dict[Path, str] = {}
    reasons = unserved(manifest)
    absent = {f"triton/{variant}": reason for variant, reason in reasons.items()}
    if "tensorrt" not in reasons:
        tensorrt = root / "triton/tensorrt" / name
        (tensorrt / "1").mkdir(parents=True)
        # An empty directory would be in no list of files, and so count as foreign in the check.
        (tensorrt / "1/README.txt").write_text(plan_note, encoding="utf-8")
        configs[tensorrt] = tensorrt_config(name, manifest, request.serving)
        absent[f"triton/tensorrt/{name}/1/model.plan"] = (
            "an engine is built where it runs; see README.md"
        )
    if "onnxruntime" not in reasons:
        ort = root / "triton/onnxruntime" / name
        (ort / "1").mkdir(parents=True)
        for file in artifact.model_files():
            # Triton loads our library with the model; the inlined file is for runtimes without it.
            if file != INLINED_FILE:
                _same_file(root / "model" / file, ort / "1" / file)
        configs[ort] = onnxruntime_config(name, manifest, request.serving)
    for folder, config in configs.items():
        (folder / "config.pbtxt").write_text(config, encoding="utf-8")
        if labels:
            (folder / "labels.txt").write_text("\n".join([*labels, ""]), encoding="utf-8")
    return absent


def _same_file(source: Path, target: Path) -> None:
    """A second name for a large file; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _put_sources(sources: Path, folder: Path) -> None:
    for name in _SOURCES:
        source = sources / name
        files = [source] if source.is_file() else sorted(source.rglob("*"))
        for path in files:
            place = path.relative_to(sources)
            shipped = path.suffix in _SOURCE_SUFFIXES and not place.is_relative_to(_NOT_SHIPPED)
            if path.is_file() and shipped:
                target = folder / place
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def _settings(artifact: Artifact, request: BundleRequest, name: str) -> str:
    """bundle.env, which start.sh and client.py read; a shell sources it, so names are plain."""
    (low, opt, high), _ = request.serving.batching(artifact.manifest)
    shape = "x".join(map(str, artifact.image_shape))
    return (
        f"MODEL={name}\nINPUT={artifact.manifest.inputs[0].name}\n"
        f"SHAPE={shape}\nMIN_BATCH={low}\nOPT_BATCH={opt}\nMAX_BATCH={high}\n"
    )
