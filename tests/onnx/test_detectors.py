"""Exports of detectors: the levels and the dense head, with and without the library."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from exports import exported, images
from official_dense import micro_detector

import vssm
from vssm import PruneSchedule
from vssm.artifact.directory import Artifact
from vssm.models.dense.detector import Detector
from vssm.runtimes.torch import oracle

# Of the largest value of each output; measured 2.3e-6.
FLOAT32 = 2e-5
UNWANTED = {"Loop", "If", "NonZero", "Scan", "Einsum"}


def _named(model: Detector, name: str) -> Detector:
    # A name of the catalogue, so that model.json makes the model again.
    model.name = name
    return model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Artifact]:
    """The dense part of a pruned adapter: deformable attention, groups, an injector's queries."""
    schedule = PruneSchedule({1: 0.8, 3: 0.75})
    model = micro_detector("plain_mamba", "maskrcnn_64x96", schedule, injector="kept")
    model = _named(model, "plain_mamba_adapter_l1_maskrcnn_coco")
    return model, exported(tmp_path_factory.mktemp("adapter"), model, outputs="dense")


def _check_numbers(model: Detector, artifact: Artifact, limit: float) -> None:
    for batch in (1, 2):
        x = images(model, batch)
        want = oracle(model, artifact, x)
        named = {n: v for n, v in want.blocks.items() if not n.startswith("block_")}
        named[artifact.manifest.main_output.name] = want.logits
        for backend in ("kernel", "body"):
            with vssm.open_session(artifact, "ort-cpu", backend=backend, threads=1) as session:
                got = session.run(x)
            assert set(named) < set(got) | {""}
            for name, value in named.items():
                assert np.abs(got[name] - value).max() <= limit * np.abs(value).max()
            for stage, kept in enumerate(want.kept_positions):
                assert np.array_equal(got[f"kept_positions_{stage}"], kept)


def test_numbers_with_and_without_the_library(adapter: tuple[Detector, Artifact]) -> None:
    _check_numbers(*adapter, FLOAT32)


def test_outputs_and_graph(adapter: tuple[Detector, Artifact]) -> None:
    model, artifact = adapter
    names = [output.name for output in artifact.manifest.outputs]
    kept = [f"kept_positions_{stage}" for stage in range(2)]
    assert names == [*model.feature_names, *model.dense_names, *kept]
    graph = onnx.load(artifact.model_path).graph
    operators = Counter(node.op_type for node in graph.node)
    assert not UNWANTED.intersection(operators)
    # Three levels for each injector, one for each of six extractors.
    assert operators["GridSample"] == 4 * 3 + 6
    assert not any("roi_head" in weight.name for weight in graph.initializer)


def test_parity_passes(adapter: tuple[Detector, Artifact]) -> None:
    assert vssm.check_parity(None, adapter[1]).failures == []


def test_images_are_not_classified(adapter: tuple[Detector, Artifact]) -> None:
    with pytest.raises(ValueError, match="cannot be classified by it; run it by vssm"):
        _ = adapter[1].manifest.num_classes


def test_labels_need_logits(tmp_path: Path, adapter: tuple[Detector, Artifact]) -> None:
    model, _ = adapter
    with pytest.raises(ValueError, match="labels=7 names with outputs='features', which has no"):
        vssm.export(model, tmp_path / "out", outputs="features", labels=list("abcdefg"))
    with pytest.raises(ValueError, match="outputs='logits' is not one of features, dense, which"):
        vssm.export(model, tmp_path / "out", outputs="logits")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "case", "name"),
    [
        ("vim", "rope_96_padded", "vim_tiny_cascade_mask_rcnn_coco"),
        ("plain_mamba", "retinanet_128x96", "plain_mamba_adapter_l1_retinanet_coco"),
    ],
)
def test_other_detectors(tmp_path: Path, family: str, case: str, name: str) -> None:
    model = _named(micro_detector(family, case), name)
    _check_numbers(model, exported(tmp_path, model, outputs="dense"), FLOAT32)
