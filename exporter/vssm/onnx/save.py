"""A ModelProto to the files of an export; the package onnx is all that this needs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx
from onnx import inliner

from vssm.artifact.directory import EXTERNAL_FILE, INLINED_FILE, MODEL_FILE

# Protobuf reads no message above 2 GiB; what is not weights takes a few MB.
EXTERNAL_DATA_ABOVE: Final = 2_000_000_000
_SMALL_TENSOR: Final = 1024  # bytes; shapes and the like stay where shape inference sees them


def save_model(
    proto: onnx.ModelProto, folder: Path, *, inline: bool, external_data_above: int
) -> None:
    """Write model.onnx, checked, and with `inline` model.inlined.onnx.

    Args:
        proto: the model; where its weights go beside it, they leave the proto.
        folder: where to.
        inline: also write the file without functions.
        external_data_above: bytes of weights beyond which they go to a file beside the two, which
            both read.
    """
    weights = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    beside = {"location": EXTERNAL_FILE, "size_threshold": _SMALL_TENSOR}
    onnx.save(
        proto,
        folder / MODEL_FILE,
        **({"save_as_external_data": True, **beside} if weights > external_data_above else {}),
    )
    onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
    if inline:
        onnx.save(inliner.inline_local_functions(proto), folder / INLINED_FILE)
