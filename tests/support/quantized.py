"""A micro Vim and a folder of pictures that the tests of quantisation share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from exports import exported, micro
from onnx import numpy_helper
from PIL import Image

import vssm
from vssm.artifact.directory import Artifact

COUNT = 6  # images that are calibrated on


def pictures(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Smooth pictures of 60 x 64, in two folders as of two classes."""
    generator = np.random.default_rng(seed)
    for index in range(count):
        small = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        path = folder / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((64, 60), Image.Resampling.BICUBIC).save(path)
    return folder


def micro_export(folder: Path, **options: object) -> Artifact:
    """The pruned micro Vim, one trace of a few seconds."""
    return exported(folder, micro(), labels=[f"class{i}" for i in range(7)], **options)


def in_every_way(
    source: Artifact, folder: Path, out: Path, ways: Mapping[str, vssm.QuantizeRequest]
) -> dict[str, Artifact]:
    """An export quantised by each request; those that measure nothing get no images."""
    return {
        name: vssm.quantize(source, folder if r.method == "static" else None, out / name, r)
        for name, r in ways.items()
    }


def graph_of(artifact: Artifact) -> onnx.GraphProto:
    return onnx.load(str(artifact.model_path)).graph


def constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def sqnr(got: np.ndarray, want: np.ndarray) -> float:
    """Signal to noise in dB."""
    return float(20 * np.log10(np.linalg.norm(want) / np.linalg.norm(got - want)))
