"""`vssm.quantize`: the weights, and on request the activations, of matrix products in few bits.

ONNX Runtime's quantiser does it, to the products that `products` chooses and in the form that
`pairs` gives it; labels, preprocessing and weights go along.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from vssm.artifact.directory import (
    INLINED_FILE,
    MODEL_FILE,
    WEIGHTS_FILE,
    Artifact,
    check_target,
    open_artifact,
    staged_export,
)
from vssm.artifact.manifest import CalibrationInfo, QuantizationInfo, write_manifest
from vssm.artifact.preprocessing import preprocessing_of
from vssm.artifact.reference import REFERENCE_FILE
from vssm.files.atomic import check_apart, sha256_of
from vssm.files.progress import automatic, shows_progress
from vssm.onnx.save import EXTERNAL_DATA_ABOVE, save_model
from vssm.quantization.calibrate import CalibrationSet, choose_images, feeds_of, ranges
from vssm.quantization.pairs import insert_pairs, silent, with_own_weights
from vssm.quantization.products import Product, check_operands, chosen, find_products
from vssm.quantization.request import AUTO, QuantizeRequest, check_request, check_source
from vssm.quantization.sensitive import layer_sqnr
from vssm.types import Steps

_QUANTIZING: Final = "quantising"
# Below this, quantising one layer alone already shows in the logits. E4M3's own rounding leaves 28.
SENSITIVE_DB: Final = {"int8": 30.0, "fp8": 20.0}
_MEASURED: Final = 16  # runs that layers are measured in, of an image each as a rule
_BLOCK: Final = 32  # inputs of an output channel that share a scale and a zero point in INT4
_HIDDEN: Final = "Gemm of float"  # an operator that ONNX Runtime does not know
_FLOAT32: Final = 1  # what MatMulNBits computes in, by its `accuracy_level`


@shows_progress
def quantize(
    artifact: Artifact | str | os.PathLike[str],
    images: str | os.PathLike[str] | None,
    directory: str | os.PathLike[str],
    request: QuantizeRequest | None = None,
    *,
    force: bool = False,
    progress: Steps = automatic,
) -> Artifact:
    """Write an export whose matrix products are quantised; scans, gathers and norms stay float.

    Args:
        artifact: a float32 export, or its directory.
        images: the folder to calibrate on; None for the methods that need none.
        directory: where the quantised export goes.
        request: what to do; None for static INT8 for ONNX Runtime.
        force: replace the export that `directory` holds.
        progress: called with how far it is; a bar in a terminal or a notebook by default.

    Raises:
        ValueError: the request contradicts itself, the folder has too few images or a file that is
            none, a pattern fits no node, or a weight is not finite.
        ArtifactError: it is quantised already, was changed, or `directory` cannot be written.
        UnsupportedError: its precision or opset does not fit.
        RuntimeUnavailableError: there is no native library.
    """
    request = request or QuantizeRequest()
    check_request(request, images=images is not None)
    check_target(directory, force=force)
    check_apart(directory, images=None if images is None else Path(images))
    source = open_artifact(artifact)
    check_source(source, request)
    found: CalibrationSet | None = None
    if images is not None:
        spec = preprocessing_of(source)
        found = choose_images(Path(images), spec, count=request.count, seed=request.seed)
    proto = onnx.load_from_string(source.read(MODEL_FILE))
    products = find_products(proto.graph)
    taken = chosen(products, request)
    with staged_export(directory, force=force) as staging, _float_file(source) as model:
        quantized, taken = _quantized(model, taken, request, found, progress=progress)
        quantized.producer_name = proto.producer_name
        del quantized.metadata_props[:]  # of ONNX Runtime's steps
        quantized.metadata_props.extend(proto.metadata_props)
        inline = INLINED_FILE in source.manifest.files
        save_model(quantized, staging, inline=inline, external_data_above=EXTERNAL_DATA_ABOVE)
        for name in (WEIGHTS_FILE, REFERENCE_FILE):
            if name in source.manifest.files:
                source.copy(name, staging / name)
        names = {product.name for product in taken}
        kept = tuple(p.name for p in products if p.name not in names)
        manifest = dataclasses.replace(
            source.manifest,
            files={path.name: sha256_of(path) for path in sorted(staging.iterdir())},
            versions={
                **source.manifest.versions,
                "onnxruntime": importlib.metadata.version("onnxruntime"),
            },
            quantization=_describe(request, len(taken), kept, found),
        )
        write_manifest(staging, manifest)
    return Artifact(Path(directory).absolute(), manifest)


def _describe(
    request: QuantizeRequest, nodes: int, kept: tuple[str, ...], found: CalibrationSet | None
) -> QuantizationInfo:
    calibration = None
    if found is not None:
        hashes = tuple(sorted(found.hashes))
        calibration = CalibrationInfo(request.calibration, request.seed, hashes)
    return QuantizationInfo(request.method, request.type, request.target, nodes, kept, calibration)


@contextmanager
def _float_file(source: Artifact) -> Iterator[Path]:
    """The float model in a folder of its own, beside which ONNX Runtime writes files."""
    with tempfile.TemporaryDirectory(prefix="vssm-") as folder:
        for name in source.model_files():
            if name != INLINED_FILE:
                source.copy(name, Path(folder, name))
        yield Path(folder, MODEL_FILE)


def _quantized(
    model: Path,
    products: list[Product],
    request: QuantizeRequest,
    calibration: CalibrationSet | None,
    *,
    progress: Steps,
) -> tuple[onnx.ModelProto, list[Product]]:
    """The quantised model, and the products that are quantised in it."""
    proto = onnx.load(str(model))
    check_operands(proto.graph, products, request)
    if request.method == "dynamic":
        return _dynamic(proto, products, model.with_name("dynamic.onnx"), progress), products
    if request.type == "int4":
        return _in_blocks(proto, products, progress), products
    feeds = [] if calibration is None else feeds_of(proto.graph, calibration.images)
    found = None
    if feeds:
        method, threads = request.calibration, request.threads
        found = ranges(model, feeds, method=method, threads=threads, tell=progress)
    progress(_QUANTIZING, 0, 1)
    quantized = insert_pairs(proto, products, request, found)
    if AUTO in request.keep_float:
        noise = layer_sqnr(
            onnx.load(str(model)),
            quantized,
            products,
            feeds[:_MEASURED],
            folder=model.parent,
            threads=request.threads,
            progress=progress,
        )
        least = SENSITIVE_DB[request.type]
        left = [product for product in products if noise[product.name] >= least]
        if not left:
            raise ValueError(
                f"keep_float='auto': every layer is below {least:g} dB, so all would stay float; "
                "calibrate on images that the model was made for"
            )
        if len(left) < len(products):
            products = left
            quantized = insert_pairs(onnx.load(str(model)), products, request, found)
    progress(_QUANTIZING, 1, 1)
    return quantized, products


def _dynamic(
    proto: onnx.ModelProto, products: Sequence[Product], target: Path, progress: Steps
) -> onnx.ModelProto:
    progress(_QUANTIZING, 0, 1)
    # ONNX Runtime makes MatMul and Add of every Gemm, those that stay float too, and transposes its
    # weight in place, whoever else reads it.
    _rename(proto, "Gemm", _HIDDEN)
    with silent():
        quantize_dynamic(
            proto,
            target,
            nodes_to_quantize=[product.name for product in products],
            weight_type=QuantType.QInt8,
            reduce_range=True,  # seven bits, as for static files with unsigned activations
        )
    made = onnx.load(str(target))
    _rename(made, _HIDDEN, "Gemm")
    progress(_QUANTIZING, 1, 1)
    return made


def _rename(proto: onnx.ModelProto, operator: str, other: str) -> None:
    for node in proto.graph.node:
        if node.op_type == operator:
            node.op_type = other


def _in_blocks(
    proto: onnx.ModelProto, products: Sequence[Product], progress: Steps
) -> onnx.ModelProto:
    progress(_QUANTIZING, 0, 1)
    names = {product.name for product in with_own_weights(proto.graph, products)}
    made = _four_bit_quantizer()(
        proto,
        bits=4,
        block_size=_BLOCK,
        accuracy_level=_FLOAT32,
        # Its `nodes_to_include` adds to all MatMul, and so leaves none of them out.
        nodes_to_exclude=[p.name for p in find_products(proto.graph) if p.name not in names],
    )
    with silent():
        made.process()
    model: onnx.ModelProto = made.model.model
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            node.name = node.name.removesuffix("_Q4")  # the name that the float file has
    progress(_QUANTIZING, 1, 1)
    return model


def _four_bit_quantizer() -> Any:
    """The library's class; its module has every logger of the process write, unless one does."""
    kept = logging.NullHandler()
    logging.getLogger().addHandler(kept)
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    finally:
        logging.getLogger().removeHandler(kept)
    return MatMulNBitsQuantizer
