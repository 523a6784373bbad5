"""What is to be quantised and how, checked before any work; no onnx is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import (
    CALIBRATIONS,
    QUANTIZATION_METHODS,
    QUANTIZATION_TARGETS,
    QUANTIZATION_TYPES,
)
from vssm.errors import ArtifactError, UnsupportedError, check_choice, check_least, check_several

AUTO: Final = "auto"  # among `keep_float`: find the sensitive layers by measurement


@dataclass(frozen=True)
class Target:
    """What runtimes differ in.

    Attributes:
        signed: activations as int8 around 0, not as uint8 with a zero point of their own.
        per_channel: a scale for each output channel of every weight. False: of those alone whose
            products ONNX Runtime runs with several scales, which are matrices on the right.
        methods: how its models can be quantised.
    """

    signed: bool
    per_channel: bool
    methods: tuple[str, ...]


TARGETS: Final[Mapping[str, Target]] = {
    # Unsigned activations by signed weights are what VNNI and AMX multiply fastest.
    "ort": Target(signed=False, per_channel=False, methods=QUANTIZATION_METHODS),
    "tensorrt": Target(signed=True, per_channel=True, methods=("static", "weights")),
    "portable": Target(signed=True, per_channel=False, methods=("static", "weights")),
}
# The first version of the standard operators in which QuantizeLinear has the type.
_OPSETS: Final = {"int8": 10, "int4": 10, "fp8": 19}


@dataclass(frozen=True)
class QuantizeRequest:
    """What to do with an export.

    Attributes:
        method: "static", ranges of activations from images; "dynamic", measured in every run;
            "weights", activations stay float.
        type: "int8"; "int4", weights alone; or "fp8", which is E4M3.
        target: the runtime that it is for: "ort", "tensorrt" or "portable".
        calibration: how a range follows from what images give: "minmax", "percentile" (99.99 % of
            the values) or "entropy".
        count: images to calibrate with.
        seed: which of the folder's images these are.
        keep_float: patterns of node names that stay float, as in a shell; "auto" among them finds
            sensitive layers by measurement.
        ends: quantise the first and the last layers too.
        threads: of the runs that measure; None for all cores.
    """

    method: str = "static"
    type: str = "int8"
    target: str = "ort"
    calibration: str = "minmax"
    count: int = 128
    seed: int = 0
    keep_float: tuple[str, ...] = ()
    ends: bool = False
    threads: int | None = None


def check_request(request: QuantizeRequest, *, images: bool) -> None:
    """Refuse what contradicts itself, before any file is read.

    Args:
        request: what is asked for.
        images: whether a folder of images is given.

    Raises:
        ValueError: a value is out of its range, or two contradict each other.
    """
    check_choice("method", request.method, QUANTIZATION_METHODS)
    check_choice("type", request.type, QUANTIZATION_TYPES)
    check_choice("target", request.target, QUANTIZATION_TARGETS)
    check_choice("calibration", request.calibration, CALIBRATIONS)
    from vssm.runtimes.session import checked_threads  # needs numpy, which --help does not wait for

    checked_threads(request.threads)
    check_several(keep_float=request.keep_float)
    check_least(1, count=request.count)
    check_least(0, seed=request.seed)
    static = request.method == "static"
    if static != images:
        raise ValueError(
            "images: ranges of activations are calibrated on images; give a folder, or "
            "--dynamic or --weights-only, which need none"
            if static
            else f"images are given, but method={request.method!r} uses none; leave them out"
        )
    _refuse_unused(request)
    if AUTO in request.keep_float and not static:
        raise ValueError(
            f"keep_float='auto' with method={request.method!r}: sensitive layers are found on the "
            "calibration images; name patterns, or quantise statically"
        )
    if request.method not in TARGETS[request.target].methods:
        raise ValueError(
            f"target={request.target!r} has no method={request.method!r}: only ONNX Runtime "
            "measures ranges in every run; use --target ort, or calibrate on images"
        )
    if request.type == "int4" and (request.target != "ort" or request.method != "weights"):
        raise ValueError(
            f"type='int4' with target={request.target!r} and method={request.method!r}: ONNX "
            "Runtime alone has products with weights of four bits, and their activations are "
            "float; use --target ort and --weights-only"
        )
    # ONNX Runtime's integer kernels have no float8 products; TensorRT's have.
    if request.type == "fp8" and (request.target != "tensorrt" or not static):
        raise ValueError(
            f"type='fp8' with target={request.target!r} and method={request.method!r}: only "
            "TensorRT multiplies float8, with calibrated ranges; use --target tensorrt and images"
        )


def _refuse_unused(request: QuantizeRequest) -> None:
    """Refuse what is said of calibration images where none are used."""
    if request.method == "static":
        return
    for name in ("calibration", "count", "seed"):
        value = getattr(request, name)
        if value != getattr(QuantizeRequest, name):  # the default
            raise ValueError(
                f"{name}={value!r} with method={request.method!r}: it says how to calibrate on "
                "images, and this method uses none; leave it out"
            )


def check_source(artifact: Artifact, request: QuantizeRequest) -> None:
    """Refuse an export that cannot be quantised so.

    Raises:
        ArtifactError: it is quantised already.
        UnsupportedError: its precision or opset does not fit.
        ValueError: no images can be made into its input, or not so many.
    """
    manifest = artifact.manifest
    if manifest.quantization is not None:
        raise ArtifactError(
            f"{artifact.directory} is quantised already ({manifest.quantization}); quantise the "
            "float export that it was made from"
        )
    if manifest.dtype != "float32":
        raise UnsupportedError(
            f"dtype={manifest.dtype}: what stays float in a quantised file is float32; export with "
            "--dtype float32 and quantise that"
        )
    if request.method == "static":
        _check_images(artifact, request)
    needed = _OPSETS[request.type]
    if manifest.opset < needed:
        raise UnsupportedError(
            f"type={request.type!r} needs opset {needed}, but the export has {manifest.opset}; "
            f"export the model again with --opset {needed}"
        )


def _check_images(artifact: Artifact, request: QuantizeRequest) -> None:
    """Refuse to calibrate an export that takes no image files, or takes them in other numbers."""
    manifest = artifact.manifest
    if manifest.preprocessing is None:
        inputs = ", ".join(spec.name for spec in manifest.fed)
        raise ValueError(
            f"images: {artifact.directory} does not say how image files become its input "
            f"({inputs}), so nothing can be calibrated on them; use --weights-only or --dynamic, "
            "which need none, or export it again with --imagenet if it takes images"
        )
    batch = manifest.batch
    if isinstance(batch, int) and request.count % batch:
        fitting = -(-request.count // batch) * batch
        raise ValueError(
            f"count={request.count} is not a multiple of {batch}, the images that "
            f"{artifact.directory} takes at a time; give --count {fitting}"
        )
