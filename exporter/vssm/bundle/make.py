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
from vssm.artifact.directory import INLINED_FILE, Artifact
from vssm.artifact.manifest import write_manifest
from vssm.artifact.preprocessing import read_labels
from vssm.bundle.manifest import BundleManifest, hash_files, staged_bundle, write_bundle_manifest
from vssm.bundle.triton import ServingOptions, onnxruntime_config, tensorrt_config
from vssm.errors import RuntimeUnavailableError, UnsupportedError
from vssm.native_library import ORT_LIBRARY
from vssm.runtimes.library import TENSORRT_LIBRARY, find_library, find_sources
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
        labels: file of class names; None for the export's own, or "class 0", "class 1", ...
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
    check_batch(serving.batch)
    low, opt, high = serving.batch
    if low > 1:
        raise ValueError(
            f"batch={low},{opt},{high}: a server may send a single image; let MIN be 1"
        )
    if serving.queue_us < 0 or serving.instances < 1:
        raise ValueError(
            f"queue_us={serving.queue_us} and instances={serving.instances}: the first must be at "
            "least 0, the second at least 1; give such numbers"
        )


def make_bundle(artifact: Artifact, output: Path, request: BundleRequest) -> BundleManifest:
    """Write a bundle of a verified export; it appears whole or not at all.

    Raises:
        ValueError: the request is out of range, or the labels do not fit.
        ArtifactError: `output` cannot be written, or may not be replaced.
        RuntimeUnavailableError: the ONNX Runtime library or the sources are missing.
        UnsupportedError: the model has tensors that no server takes.
    """
    check_request(request)
    if artifact.manifest.gives_boxes:
        raise UnsupportedError(
            f"{artifact.directory} is a whole detector, which takes one image at a time and has "
            "outputs of another size for each; a bundle's server batches: export it with --outputs "
            "dense, or run model.onnx in ONNX Runtime"
        )
    if len(artifact.manifest.inputs) > 1:
        raise UnsupportedError(
            f"{artifact.directory} has the inputs "
            f"{', '.join(spec.name for spec in artifact.manifest.inputs)}; a bundle's server and "
            "client send one: wrap the module in one of one input, or serve model.onnx yourself"
        )
    name = _served_name(artifact, request)
    labels = _labels(artifact, request)
    find_library(ORT_LIBRARY)  # said before anything is written
    sources = find_sources()
    with staged_bundle(output, force=request.force) as root:
        _put_model(artifact, root / "model")
        absent = _put_libraries(root / "lib")
        absent |= _put_repositories(artifact, root, request, name=name, labels=labels)
        _put_sources(sources, root / "sources")
        for file in _SERVING_FILES:
            shutil.copyfile(sources / "examples/serving" / file, root / file)
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


def _labels(artifact: Artifact, request: BundleRequest) -> Sequence[str]:
    classes = int(artifact.manifest.main_output.shape[-1])
    if request.labels is not None:
        return read_labels(request.labels, classes)
    return artifact.manifest.labels or [f"class {index}" for index in range(classes)]


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
    quantization = manifest.quantization
    configs: dict[Path, str] = {}
    absent: dict[str, str] = {}
    if quantization is not None and not quantization.in_tensorrt:
        absent["triton/tensorrt"] = (
            f"TensorRT does not take {quantization}; quantise with --target tensorrt or portable"
        )
    else:
        tensorrt = root / "triton/tensorrt" / name
        (tensorrt / "1").mkdir(parents=True)
        # An empty directory would be in no list of files, and so count as foreign in the check.
        (tensorrt / "1/README.txt").write_text(plan_note, encoding="utf-8")
        configs[tensorrt] = tensorrt_config(name, manifest, request.serving)
        absent[f"triton/tensorrt/{name}/1/model.plan"] = (
            "an engine is built where it runs; see README.md"
        )
    if manifest.dtype == "bfloat16":
        absent["triton/onnxruntime"] = (
            "ONNX Runtime's CPU provider has no bfloat16 matrix product; export float32 or float16"
        )
    elif quantization is not None and not quantization.in_ort:
        absent["triton/onnxruntime"] = (
            f"ONNX Runtime does not run {quantization} by itself; quantise with --target ort or "
            "portable"
        )
    else:
        ort = root / "triton/onnxruntime" / name
        (ort / "1").mkdir(parents=True)
        for file in artifact.model_files():
            # Triton loads our library with the model; the inlined file is for runtimes without it.
            if file != INLINED_FILE:
                _same_file(root / "model" / file, ort / "1" / file)
        configs[ort] = onnxruntime_config(name, manifest, request.serving)
    for folder, config in configs.items():
        (folder / "config.pbtxt").write_text(config, encoding="utf-8")
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
    low, opt, high = request.serving.batch
    shape = "x".join(map(str, artifact.image_shape))
    return (
        f"MODEL={name}\nINPUT={artifact.manifest.inputs[0].name}\n"
        f"SHAPE={shape}\nMIN_BATCH={low}\nOPT_BATCH={opt}\nMAX_BATCH={high}\n"
    )
