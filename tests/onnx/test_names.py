"""What a reader of the graph sees: module paths, parameters' names, the same in every export."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkout import PYTHONPATH, ROOT
from exports import exported, images, micro, micro_plain
from graph_names import assert_readable, assert_true
from hierarchical_cases import small
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from vssm.models.base import VisionModel
from vssm.runtimes.ort import OrtCpuSession

FAMILIES: dict[str, Callable[[], VisionModel]] = {
    "vim": micro,
    "plain_mamba": micro_plain,
    "vmamba": lambda: small("vmamba_tiny_s1l8"),
    "groupmamba": lambda: small("groupmamba_tiny"),
}


@cache
def _proto(family: str, dtype: str = "float32") -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        artifact = exported(Path(folder), FAMILIES[family](), dtype=dtype)
        return onnx.load(str(artifact.model_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_the_model(family: str) -> None:
    assert_readable(_proto(family), FAMILIES[family]())
    assert_true(_proto(family), FAMILIES[family]())


def test_names_of_a_half_export_are_those_of_the_model() -> None:
    assert_readable(_proto("vim", "float16"), micro())


def test_a_layer_of_vim_reads_as_the_model_does() -> None:
    graph = _proto("vim").graph
    nodes = {node.name: node for node in graph.node}
    assert set(nodes["/layers.2/norm/Mul"].input) >= {"layers.2.norm.weight"}
    scan = nodes["/layers.2/mixer/GatedSelectiveScan"]
    assert list(scan.input)[2] == "layers.2.mixer.A_log+A_b_log.Concat.Exp.Neg"
    assert scan.input[7] == "/layers.2/mixer/GatedSelectiveScan.order"
    assert nodes["/layers.2/mixer/out_proj/MatMul"].input[1] == "layers.2.mixer.out_proj.weight.T"
    assert nodes["/layers.2/mixer/out_proj/MatMul"].output[0] == "block_3.hidden"
    assert {"/layers.0/mixer/in_proj/MatMul", "/layers.0/mixer/in_proj/MatMul_1"} <= set(nodes)


_EXPORT = """
import sys
sys.path.insert(0, sys.argv[1])
from exports import micro
import vssm
print(vssm.export(micro(None, depth=1), sys.argv[2]).manifest.files["model.onnx"])
"""


def test_two_exports_are_the_same_bytes(tmp_path: Path) -> None:
    """Also in a process whose sets have another order."""
    first = exported(tmp_path, micro(None, depth=1)).manifest.files["model.onnx"]
    done = subprocess.run(
        [sys.executable, "-c", _EXPORT, str(ROOT / "tests/support"), str(tmp_path / "again")],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [first]


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._batches: Iterator[np.ndarray] = iter([images(micro(), 2, seed=s) for s in range(3)])

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


@pytest.mark.parametrize("how", ["dynamic", "static"])
def test_onnxruntime_quantises_an_export_and_our_library_runs_it(tmp_path: Path, how: str) -> None:
    artifact = exported(tmp_path / "out", micro(None))
    target = tmp_path / "quantised.onnx"
    if how == "dynamic":
        quantize_dynamic(artifact.model_path, target, weight_type=QuantType.QUInt8)
    else:
        quantize_static(artifact.model_path, target, _Calibration())
    found = onnx.load(str(target))
    ours = [node for node in found.graph.node if node.domain == "vssm"]
    assert len(ours) == 2 * 3
    assert {node.name for node in ours} <= {node.name for node in _proto_of(artifact).graph.node}
    x = images(micro(None), 2, seed=9)
    with OrtCpuSession(artifact) as session:
        want = session.run(x)["logits"]
    with OrtCpuSession(artifact, model=target.read_bytes()) as session:  # refuses to run bodies
        got = session.run(x)["logits"]
    assert not np.array_equal(got, want)
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.9  # eight bits, and weights of no use


def _proto_of(artifact: Any) -> onnx.ModelProto:
    return onnx.load(str(artifact.model_path))
