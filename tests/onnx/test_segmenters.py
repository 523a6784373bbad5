"""Exports of segmenters: numbers with and without the library, outputs, labels, the graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exports import exported, images, micro_segmenter
from PIL import Image
from typer.testing import CliRunner

import vssm
from vssm.artifact.data_sets import ADE20K
from vssm.artifact.directory import Artifact, open_artifact
from vssm.commands.main import app
from vssm.models.dense.segmenter import Segmenter
from vssm.models.dense.vim import VimSegmenter
from vssm.onnx.export import _cast_copy, build_proto
from vssm.parity.compare import TOLERANCES, _compare_labels
from vssm.runtimes.torch import model_of, oracle, schedule_of

# The model, its schedule and rules, the outputs, the dtype; what is pruned is read at a tap.
ASKED: dict[str, tuple[str, str | None, dict[str, Any], str, str]] = {
    "vim": ("vim_small", "1:0.8,3:0.7", {}, "labels", "float32"),
    "plain_mamba": ("plain_mamba_l1", "2:0.6", {"restore": "nearest"}, "features", "float32"),
    "vmamba": ("vmamba_tiny", None, {}, "labels", "float16"),
}
# Vim's two streams at the three taps behind the first stage; four layers of PlainMamba's grid, of
# which two are behind its stage. What is nearest is gathered.
SCATTERS = {"vim_small": 6, "plain_mamba_l1": 0, "vmamba_tiny": 0}
# Of the largest value. Measured 8.0e-7, 2.6e-6; in half precision 1.1e-3.
TOLERANCE = {"float32": 1e-5, "float16": 5e-3}
# Operators of which each would mean a loop, or a shape that depends on the image.
UNWANTED = {"Loop", "If", "NonZero", "Scan", "AveragePool", "Einsum"}


@pytest.fixture(
    scope="module",
    params=["vim", "vmamba", pytest.param("plain_mamba", marks=pytest.mark.slow)],
)
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Segmenter, Artifact, str]:
    name, schedule, rules, outputs, dtype = ASKED[request.param]
    classes = 150 if request.param == "vmamba" else 7
    model = micro_segmenter(name, schedule, rules, num_classes=classes)
    folder = tmp_path_factory.mktemp(request.param)
    return model, exported(folder, model, outputs=outputs, dtype=dtype), outputs


def test_numbers_with_and_without_the_library(whole: tuple[Segmenter, Artifact, str]) -> None:
    model, artifact, outputs = whole
    limit = TOLERANCE[artifact.manifest.dtype]
    main = artifact.manifest.main_output.name
    # The first image alone, and with another.
    want = oracle(model, artifact, images(model, 2))
    named = {main: want.logits, **{n: v for n, v in want.blocks.items() if "block" not in n}}
    for backend in ("kernel", "body"):
        with vssm.open_session(artifact, "ort-cpu", backend=backend, threads=1) as session:
            for batch in (1, 2):
                got = session.run(images(model, 2)[:batch])
                for name, value in named.items():
                    assert got[name].dtype == np.float32
                    error = np.abs(got[name] - value[:batch]).max()
                    assert error <= limit * np.abs(value[:batch]).max()
                for stage, kept in enumerate(want.kept_positions):
                    assert np.array_equal(got[f"kept_positions_{stage}"], kept[:batch])
    assert set(named) == set(model.output_groups[outputs]) - {"labels"}


def test_parity_passes(whole: tuple[Segmenter, Artifact, str]) -> None:
    _, artifact, outputs = whole
    told: list[tuple[object, ...]] = []
    report = vssm.check_parity(None, artifact, progress=lambda *step: told.append(step))
    blocks = [step[1:3] for step in told if step[0] == "float64 oracle, blocks"]
    assert blocks[0][0] == 0
    assert blocks[-1][0] == blocks[-1][1] > 1
    assert told[-1][0] == "comparing with the float64 oracle"
    assert report.failures == []
    assert (report.labels is not None) == (outputs == "labels")
    if report.labels is not None:
        assert report.labels.agreement > 0.99


def test_outputs(whole: tuple[Segmenter, Artifact, str]) -> None:
    model, artifact, outputs = whole
    found = {o.name: (o.dtype, o.shape) for o in artifact.manifest.outputs}
    if outputs == "labels":
        assert found["labels"] == ("int32", ("batch", *model.image_size))
        assert found["logits"][1] == ("batch", model.num_classes, *model.level_sizes[0])
    else:
        sizes = {name: shape[2:] for name, (_, shape) in found.items() if name.startswith("level")}
        assert tuple(sizes.values()) == model.level_sizes


def test_graph(whole: tuple[Segmenter, Artifact, str]) -> None:
    model, artifact, outputs = whole
    nodes = onnx.load(artifact.model_path).graph.node
    operators = Counter(node.op_type for node in nodes)
    assert not UNWANTED.intersection(operators)
    assert sum(count for name, count in operators.items() if "Scan" in name) == model.traced_blocks
    assert not operators["ScatterND"] + operators["ScatterElements"]
    assert operators["TokenScatter"] == SCATTERS[model.name.partition("_upernet")[0]]
    # The auxiliary head is in the checkpoint, not in the graph; nor is the head with the features.
    weights = {i.name for i in onnx.load(artifact.model_path).graph.initializer}
    assert not any("auxiliary_head" in name for name in weights)
    assert any("decode_head" in name for name in weights) == (outputs == "labels")


def test_position_tables_are_folded(whole: tuple[Segmenter, Artifact, str]) -> None:
    """No node reads a table alone: what is made from weights only is a constant."""
    graph = onnx.load(whole[1].model_path).graph
    weights = {i.name for i in graph.initializer}
    assert not [n.name for n in graph.node if n.input and weights.issuperset(n.input)]


def test_torch_session_gives_the_same_outputs(whole: tuple[Segmenter, Artifact, str]) -> None:
    model, artifact, _ = whole
    x = images(model, 1)
    with vssm.open_session(artifact, "torch", backend="reference") as session:
        got = session.run(x)
    assert set(got) == {output.name for output in artifact.manifest.outputs}


def test_model_json_makes_the_model_again(whole: tuple[Segmenter, Artifact, str]) -> None:
    model, artifact, _ = whole
    again = model_of(open_artifact(artifact.directory))
    assert again.schedule == model.schedule
    assert again.config == model.config


def test_names_are_those_of_the_data_set(whole: tuple[Segmenter, Artifact, str]) -> None:
    model, artifact, _ = whole
    assert artifact.manifest.labels == (ADE20K if model.num_classes == 150 else None)


def test_labels_that_no_rounding_explains_are_told(whole: tuple[Segmenter, Artifact, str]) -> None:
    model, artifact, outputs = whole
    if outputs != "labels":
        pytest.skip("this export has no labels")
    want = oracle(model, artifact, images(model, 1))
    tolerance = TOLERANCES["float32"]
    assert want.labels is not None
    sure = np.unravel_index(want.label_margins.argmax(), want.labels.shape)
    changed = want.labels.copy()
    changed[sure] = (changed[sure] + 1) % model.num_classes
    found = _compare_labels({"labels": changed}, want, [0], tolerance)
    assert found is not None
    assert (found.wrong, found.margin) == (1, want.label_margins.max())
    excused = replace(want, label_margins=np.zeros_like(want.label_margins))
    found = _compare_labels({"labels": changed}, excused, [0], tolerance)
    assert found is not None
    assert found.wrong == 0


@pytest.mark.slow  # how positions show their group is proved in PyTorch, merges in files elsewhere
def test_a_merged_segmenter(tmp_path: Path) -> None:
    """Every position shows its group, with and without the library."""
    schedule = vssm.MergeSchedule(3, start=1, every=1)
    artifact = exported(tmp_path, micro_segmenter("vim_small", schedule), outputs="features")
    assert artifact.manifest.merge is not None
    assert artifact.manifest.merge.restore == "group"
    assert schedule_of(open_artifact(artifact.directory)) == schedule
    for backend in ("kernel", "body"):
        report = vssm.check_parity(None, artifact, backend=backend)
        assert report.failures == []
        assert report.kept_agreement == [1.0, 1.0, 1.0]
    kinds = {node.op_type for node in onnx.load(artifact.model_path).graph.node}
    assert not kinds & {*UNWANTED, "ScatterND", "TokenScatter"}


def test_half_precision_is_in_the_matrices() -> None:
    model = micro_segmenter("vim_tiny", None)
    twin = _cast_copy(model, torch.float16)
    assert isinstance(twin, VimSegmenter)
    state = twin.state_dict()
    wide = {"decode_head.bottleneck.conv.weight", "decode_head.lateral_convs.0.bn.weight"}
    wide |= {"backbone.fpn1.0.weight", "backbone.pos_embed", "backbone.layers.0.norm.weight"}
    half = {"decode_head.conv_seg.weight", "backbone.fpn1.3.weight", "backbone.fpn2.0.weight"}
    half |= {"backbone.layers.0.mixer.in_proj.weight"}
    assert {state[key].dtype for key in wide} == {torch.float32}
    assert {state[key].dtype for key in half} == {torch.float16}


@pytest.mark.slow
def test_bfloat16_is_a_valid_file() -> None:
    proto = build_proto(micro_segmenter("vim_tiny", None, depth=4), dtype="bfloat16", opset=18)
    onnx.checker.check_model(proto, full_check=True)


def test_a_classifier_has_no_features(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = vssm.create_model("vim_tiny", depth=1)
    with pytest.raises(ValueError, match="outputs='features' is not one of logits, which models"):
        vssm.export(model, tmp_path / "out", outputs="features")


def test_whole_images_are_not_classified(whole: tuple[Segmenter, Artifact, str]) -> None:
    _, artifact, outputs = whole
    if outputs == "labels":
        with pytest.raises(ValueError, match="cannot be classified by it; run it by vssm"):
            _ = artifact.manifest.num_classes


def test_run_writes_label_maps(whole: tuple[Segmenter, Artifact, str], tmp_path: Path) -> None:
    model, artifact, outputs = whole
    if outputs != "labels":
        pytest.skip("this export has no logits")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    run = CliRunner().invoke
    done = run(app, ["run", str(artifact.directory), str(tmp_path / "noise.png")])
    assert isinstance(done.exception, ValueError)
    assert "say -o DIR" in str(done.exception)
    done = run(
        app,
        ["run", str(artifact.directory), str(tmp_path / "noise.png"), "-o", str(tmp_path / "out")],
    )
    assert done.exit_code == 0, done.exception
    with Image.open(tmp_path / "out" / "noise.labels.png") as image:
        assert image.size == (150, 90)
        assert np.asarray(image).max() < model.num_classes
    assert (tmp_path / "out" / "noise.overlay.png").is_file()
