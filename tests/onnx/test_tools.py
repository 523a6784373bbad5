"""Other people's tools on our files: what docs/tools.md says of each, tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exports import exported, images, micro
from onnxruntime.quantization import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from quantized import COUNT, pictures

import vssm
from vssm.artifact.directory import Artifact
from vssm.errors import UnsupportedError
from vssm.native_library import find_library
from vssm.ops.spec import DOMAIN, OPERATORS
from vssm.runtimes.ort import run_once

FILES = ("model.onnx", "model.inlined.onnx")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(tmp_path_factory.mktemp("tools"), micro(), inline=True)


@pytest.fixture(scope="module")
def quantized(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("int8")
    request = vssm.QuantizeRequest(count=COUNT, target="portable")
    return vssm.quantize(artifact, pictures(folder / "pictures", COUNT), folder / "out", request)


def _logits(path: Path) -> np.ndarray:
    return run_once(path, images(micro()), find_library()).outputs["logits"]


def _ours(path: Path) -> int:
    return sum(node.domain == DOMAIN for node in onnx.load(str(path)).graph.node)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["artifact", "quantized"])
def test_checker_and_strict_shape_inference(
    kind: str, file: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(kind).directory / file
    onnx.checker.check_model(str(path), full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(str(path)), strict_mode=True, data_prop=True)


def _tool(name: str) -> Any:
    wheels = "tests/tensorrt_harness/wheels/tools.txt"
    return pytest.importorskip(name, reason=f"no {name}; pip install --no-deps -r {wheels}")


def _slim(source: Path, target: Path, **options: Any) -> None:
    onnx.save(_tool("onnxslim").slim(str(source), **options), target)


@pytest.mark.parametrize("file", FILES)
def test_onnxsim_keeps_our_operators(file: str, artifact: Artifact, tmp_path: Path) -> None:
    source, out = artifact.directory / file, tmp_path / "out.onnx"
    made, checked = _tool("onnxsim").simplify(onnx.load(str(source)))
    onnx.save(made, out)
    assert checked
    assert _ours(out) == _ours(source)
    np.testing.assert_array_equal(_logits(out), _logits(source))


@pytest.mark.parametrize("kind", ["artifact", "quantized"])
def test_onnxslim_keeps_our_operators(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(kind).model_path
    _slim(source, tmp_path / "out.onnx")
    assert _ours(tmp_path / "out.onnx") == _ours(source)
    np.testing.assert_array_equal(_logits(tmp_path / "out.onnx"), _logits(source))


def test_onnxslim_needs_a_switch_for_the_inlined_file(artifact: Artifact, tmp_path: Path) -> None:
    source, out = artifact.directory / "model.inlined.onnx", tmp_path / "out.onnx"
    _slim(source, out)
    with pytest.raises(UnsupportedError, match="tensor"):
        _logits(out)
    _slim(source, out, skip_optimizations=["constant_folding"])
    np.testing.assert_allclose(_logits(out), _logits(source), rtol=0, atol=1e-6)


def test_onnxruntime_s_preprocessing_needs_two_switches(artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    quant_pre_process(artifact.model_path, out, skip_optimization=True, skip_symbolic_shape=True)
    assert _ours(out) == _ours(artifact.model_path)
    np.testing.assert_array_equal(_logits(out), _logits(artifact.model_path))


def test_onnxruntime_s_float16_converter_needs_our_operators_left_out(
    artifact: Artifact, tmp_path: Path
) -> None:
    out, model = tmp_path / "out.onnx", onnx.load(str(artifact.model_path))
    options = {"keep_io_types": True, "op_block_list": list(OPERATORS)}
    onnx.save(convert_float_to_float16(model, **options), out)
    want = _logits(artifact.model_path)
    np.testing.assert_allclose(_logits(out), want, rtol=0, atol=1e-2 * float(np.abs(want).max()))
