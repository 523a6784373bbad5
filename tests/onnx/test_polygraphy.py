"""Polygraphy on our files, as docs/engine.md shows it: inspect, runners, comparison, reduction."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
from exports import exported, images, micro
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import Comparator, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from vssm.artifact.directory import Artifact
from vssm.native_library import find_library

CHECK = """
import sys
import onnx
import onnxruntime

options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
model = "polygraphy_debug.onnx"
onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
sys.exit(any(node.op_type == "TokenGather" for node in onnx.load(model).graph.node))
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(tmp_path_factory.mktemp("polygraphy"), micro())


def polygraphy(*arguments: object, folder: Path, **environment: str) -> str:
    """Output of the command `polygraphy`."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("polygraphy")), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_inspect_model(artifact: Artifact) -> None:
    shown = polygraphy(
        "inspect", "model", "model.onnx", "--show", "layers", folder=artifact.directory
    )
    assert "Other Opsets: {'vssm': 1}" in shown
    assert "logits [dtype=float32, shape=('batch', 7)]" in shown
    assert shown.count("[Op: GatedSelectiveScan]") == 1


# Polygraphy divides by what is kept, and place 0 is kept.
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_runners_with_and_without_the_library_agree(artifact: Artifact) -> None:
    def session(library: Path | None) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if library is not None:
            options.register_custom_ops_library(str(library))
        return onnxruntime.InferenceSession(
            str(artifact.model_path), options, providers=["CPUExecutionProvider"]
        )

    runners = [
        OnnxrtRunner(session(find_library()), name="kernel"),
        OnnxrtRunner(session(None), name="body"),
    ]
    feeds = [{"images": images(micro(), 2)}]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        results = Comparator.run(runners, data_loader=feeds)
        compare = SimpleCompareFunc(rtol=0.0, atol=2e-5, check_error_stat="max")
        found = Comparator.compare_accuracy(results, compare_func=compare)
    assert bool(found)
    assert [name for name, _ in results] == ["kernel", "body"]
    assert set(results[0][1][0]) == {"logits", "kept_positions_0", "kept_positions_1"}


@pytest.mark.slow
def test_debug_reduce(artifact: Artifact, tmp_path: Path) -> None:
    if importlib.util.find_spec("onnx_graphsurgeon") is None:
        pytest.skip("not installed: pip install --no-deps onnx-graphsurgeon==0.6.1")
    (tmp_path / "check.py").write_text(CHECK)
    polygraphy(
        *("debug", "reduce", artifact.model_path, "-o", "reduced.onnx", "--mode=bisect"),
        *("--model-input-shapes", "images:[1,3,48,48]"),
        *("--check", sys.executable, "check.py", find_library()),
        folder=tmp_path,
    )
    reduced = onnx.load(tmp_path / "reduced.onnx")
    assert [node.op_type for node in reduced.graph.node] == ["TokenGather"]
    assert {f.name for f in reduced.functions} >= {"TokenGather"}


@pytest.mark.slow
def test_convert_with_tensorrt_rtx(artifact: Artifact, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed: see docs/engine.md")
    sizes = [
        word
        for kind, batch in (("min", 1), ("opt", 2), ("max", 4))
        for word in (f"--trt-{kind}-shapes", f"images:[{batch},3,48,48]")
    ]
    polygraphy(
        *("convert", artifact.model_path, "--convert-to", "trt", "-o", "model.plan", *sizes),
        folder=tmp_path,
        POLYGRAPHY_USE_TENSORRT_RTX="1",
    )
    assert (tmp_path / "model.plan").stat().st_size > artifact.model_path.stat().st_size
