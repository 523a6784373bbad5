"""Ranges of activations over images, by ONNX Runtime's calibrators."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, MinMaxCalibrater
from onnxruntime.quantization.calibrate import EntropyCalibrater, PercentileCalibrater

from vssm.artifact.manifest import Preprocessing
from vssm.artifact.preprocessing import image_files, preprocess
from vssm.files.atomic import sha256_of
from vssm.native_library import find_library
from vssm.quantization.products import OPERATORS
from vssm.runtimes.session import checked_threads
from vssm.types import Array, Steps

_CALIBRATORS: Final[Mapping[str, Any]] = {
    "minmax": MinMaxCalibrater,
    "percentile": partial(PercentileCalibrater, percentile=99.99, symmetric=True),
    "entropy": EntropyCalibrater,
}
_CALIBRATING: Final = "calibrating"
_CHUNK: Final = 8  # images whose activations are in memory at once


@dataclass(frozen=True)
class CalibrationSet:
    """The images that ranges are measured on, and the SHA-256 of each file."""

    hashes: tuple[str, ...]
    images: Array


def choose_images(folder: Path, spec: Preprocessing, *, count: int, seed: int) -> CalibrationSet:
    """`count` images of a folder and the folders in it, chosen by the seed, preprocessed.

    Raises:
        ValueError: the folder has fewer files, or one of those chosen is no image.
    """
    if not folder.is_dir():
        raise ValueError(f"images={folder} is not a folder; give one with images to calibrate on")
    files = image_files(folder)
    if len(files) < count:
        raise ValueError(
            f"images={folder} holds {len(files)} files, fewer than count={count}; give more "
            "images, or a smaller --count"
        )
    # Not sorted: layers are measured on the first, which would be those of one class.
    taken = [files[index] for index in np.random.default_rng(seed).permutation(len(files))[:count]]
    images = preprocess(taken, spec)
    return CalibrationSet(tuple(map(sha256_of, taken)), images)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Inputs one by one, as ONNX Runtime's calibrators read them."""

    def __init__(self, feeds: Sequence[Mapping[str, Array]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Mapping[str, Array] | None:
        """The next input of the model by name; None after the last."""
        return next(self._feeds, None)


class _FiniteSession:
    """A session that refuses NaN and infinity, at which the calibrators fail without a reason."""

    def __init__(self, session: Any, known: Collection[str]) -> None:
        self._session = session
        self._known = known

    def get_inputs(self) -> Any:
        """What a run takes."""
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        """What a run gives, in order."""
        return self._session.get_outputs()

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs, those for the ranges finite."""
        found: list[Array] = self._session.run(names, feeds)
        bad = [
            output.name.removesuffix("_ReduceMin").removesuffix("_ReduceMax")
            for output, array in zip(self.get_outputs(), found, strict=True)
            if output.name not in self._known and not np.isfinite(array).all()
        ]
        if bad:  # in an order of the calibrator's that changes from run to run
            raise ValueError(
                f"images: the value {min(bad)!r} of the float export is not finite on one of them, "
                "so it has no range; give images that the model is made for, or use --weights-only"
            )
        return found


def feeds_of(graph: onnx.GraphProto, images: Array) -> list[dict[str, Array]]:
    """What a model's runs take, of images as many as it takes at a time: one where it takes any.

    Args:
        graph: of the model.
        images: (count, 3, height, width); of a model of a fixed batch a multiple of that.
    """
    first = graph.input[0]
    # A batch of any size has a name there and the value 0.
    batch = first.type.tensor_type.shape.dim[0].dim_value or 1
    return [{first.name: images[i : i + batch]} for i in range(0, len(images), batch)]


def ranges(
    model: Path,
    feeds: Sequence[Mapping[str, Array]],
    *,
    method: str,
    threads: int | None,
    tell: Steps,
) -> Any:
    """The range of every operand of a matrix product, as ONNX Runtime's `TensorsData`.

    Args:
        model: the float model's file, beside which others can be written.
        feeds: inputs by name, one run each.
        method: "minmax", "percentile" or "entropy".
        threads: of a run.
        tell: called with the runs done.

    Raises:
        ValueError: the model gives no finite numbers for the images.
    """
    augmented = str(model.with_name("augmented.onnx"))
    # It prints what it does, line by line.
    with contextlib.redirect_stdout(io.StringIO()):
        # Not by `create_calibrator`, which opens a session of its own, on the bodies.
        calibrator = _CALIBRATORS[method](
            model,
            list(OPERATORS),
            augmented,
            use_external_data_format=True,  # protobuf writes no file above 2 GiB
        )
        calibrator.augment_graph()
        session = open_file(augmented, threads=threads)
        calibrator.infer_session = _FiniteSession(session, calibrator.model_original_outputs)
        tell(_CALIBRATING, 0, len(feeds))
        for start in range(0, len(feeds), _CHUNK):
            calibrator.collect_data(_Reader(feeds[start : start + _CHUNK]))
            tell(_CALIBRATING, min(start + _CHUNK, len(feeds)), len(feeds))
        return calibrator.compute_data()


def open_file(
    path: str, *, threads: int | None = None, config: Mapping[str, str] | None = None
) -> Any:
    """A session of ONNX Runtime with our kernels, which are several times as fast as the bodies.

    Raises:
        RuntimeUnavailableError: there is no library.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = checked_threads(threads)
    # A thread that spins while it waits takes the core that others need, beside other work.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(find_library()))
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
