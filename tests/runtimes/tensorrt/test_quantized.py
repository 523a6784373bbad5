"""Quantised files in NVIDIA's own parser and builder: TensorRT for RTX, on the fallback bodies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exports import exported, micro
from quantized import COUNT, pictures
from tensorrt_build import ROOT, rtx_path, run_python

import vssm
from vssm.artifact.directory import Artifact

SCRIPT = (ROOT / "tests/tensorrt_harness/parser.py").read_text(encoding="utf-8")
LONG = pytest.mark.slow
REQUESTS = [
    pytest.param(vssm.QuantizeRequest(target="tensorrt", count=COUNT), id="int8"),
    pytest.param(vssm.QuantizeRequest(target="portable", count=COUNT), id="portable", marks=LONG),
    pytest.param(vssm.QuantizeRequest(method="weights"), id="weights", marks=LONG),
    pytest.param(
        vssm.QuantizeRequest(target="tensorrt", type="fp8", count=COUNT), id="fp8", marks=LONG
    ),
]


def _quantized(folder: Path, request: vssm.QuantizeRequest) -> Artifact:
    source = exported(folder / "float", micro(), opset=19 if request.type == "fp8" else 18)
    images = pictures(folder / "pictures", COUNT) if request.method == "static" else None
    return vssm.quantize(source, images, folder / "out", request)


@pytest.mark.parametrize("request_", REQUESTS)
def test_quantised_file_builds_on_its_bodies(
    request_: vssm.QuantizeRequest, tmp_path: Path
) -> None:
    path = rtx_path()
    artifact = _quantized(tmp_path, request_)
    shown = run_python(SCRIPT, "build", str(artifact.model_path), path=path)
    built = json.loads(shown.strip().splitlines()[-1])
    assert built["errors"] == []
    assert built["bytes"] > 0
    assert built["outputs"] == [output.name for output in artifact.manifest.outputs]


@pytest.mark.slow
def test_fp8_is_near_the_float_model(tmp_path: Path) -> None:
    request = vssm.QuantizeRequest(target="tensorrt", type="fp8", count=COUNT)
    artifact = _quantized(tmp_path, request)
    files = sorted((tmp_path / "pictures").rglob("*.png"))
    report = vssm.check_parity(None, artifact, images=vssm.preprocess(files, artifact))
    assert report.signals[0].decibels > 15
