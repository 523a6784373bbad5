"""Exports of detectors: levels, dense head and what is found, with and without the library."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from command import Run
from exports import exported, images, micro
from official_data import fill_weights, fixture
from official_dense import (
    detector_images,
    detector_sizes,
    micro_detector,
    official_boxes,
)
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

import vssm
from vssm import PruneSchedule
from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import Preprocessing
from vssm.artifact.preprocessing import padded
from vssm.bench.run import bench_directory
from vssm.errors import UnsupportedError
from vssm.models.dense.adapter import Interaction, centres
from vssm.models.dense.detector import Detector
from vssm.onnx.program import program_to_proto
from vssm.runtimes.tensorrt.build import EngineRequest, build_engine
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


@pytest.mark.slow
def test_numbers_with_and_without_the_library(adapter: tuple[Detector, Artifact]) -> None:
    _check_numbers(*adapter, FLOAT32)


@pytest.mark.slow
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


@pytest.mark.slow
def test_parity_passes(adapter: tuple[Detector, Artifact]) -> None:
    assert vssm.check_parity(None, adapter[1]).failures == []


def test_images_are_not_classified(whole: tuple[Detector, Artifact]) -> None:
    with pytest.raises(ValueError, match="cannot be classified by it; run it by vssm"):
        _ = whole[1].manifest.num_classes


def test_labels_need_logits(tmp_path: Path, whole: tuple[Detector, Artifact]) -> None:
    model, _ = whole
    with pytest.raises(ValueError, match="labels=7 names with outputs='features', which has no"):
        vssm.export(model, tmp_path / "out", outputs="features", labels=list("abcdefg"))
    with pytest.raises(
        ValueError, match="outputs='logits' is not one of features, dense, boxes, which"
    ):
        vssm.export(model, tmp_path / "out", outputs="logits")


class _Trade(nn.Module):
    """What an adapter does around its last blocks: tokens of a grid, a pyramid of three maps."""

    grid, sizes = (2, 3), ((4, 6), (2, 3), (1, 2))

    def __init__(self) -> None:
        super().__init__()
        self.model = Interaction(12, 3, last=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x, pyramid = images.split([6, 24 + 6 + 2], dim=1)
        x = self.model.inject(x, centres(self.grid, x), pyramid, self.sizes)
        places = torch.cat([centres(size, x) for size in self.sizes], dim=1)
        return x, self.model.extract(pyramid, places, self.sizes, x, self.grid)


def test_deformable_attention() -> None:
    """Of an adapter alone, which takes seconds; whole ones are among the slow tests."""
    trade = fill_weights(_Trade())
    example = torch.zeros(2, 38, 12)
    with torch.no_grad():
        program = torch.export.export(trade, (example,), dynamic_shapes=({0: Dim("batch")},))
    proto = program_to_proto(program, 18, inputs=["images"], names=["x", "pyramid"], public=2)
    operators = Counter(node.op_type for node in proto.graph.node)
    assert not UNWANTED.intersection(operators)
    # Three levels for the injector, one for each of three extractors.
    assert operators["GridSample"] == 3 + 3
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((3, 38, 12)).astype(np.float32)
    with torch.no_grad():
        wanted = trade.double()(torch.from_numpy(images).double())
    for got, want in zip(session.run(None, {"images": images}), wanted, strict=True):
        assert np.abs(got - want.numpy()).max() <= FLOAT32 * want.abs().max()


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


# What is told of the small detectors, as their official numbers were made.
TOLD = {"level_proposals": 120, "proposals": 60, "most": 20, "score": 0.2}
PADDED = ("vim", "rope_96_padded")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Artifact]:
    """A cascade from the padded image to boxes and masks."""
    model = _named(micro_detector(*PADDED, **TOLD), "vim_tiny_cascade_mask_rcnn_coco")
    return model, exported(tmp_path_factory.mktemp("whole"), model, outputs="boxes")


def _check_boxes(family: str, case: str, artifact: Artifact, backend: str) -> None:
    """Boxes, scores, classes and masks in the order of the official code."""
    numbers = fixture(f"dense/micro_{family}_det")
    padded = detector_images(family, case).float().numpy()
    with vssm.open_session(artifact, "ort-cpu", backend=backend, threads=1) as session:
        for i, size in enumerate(detector_sizes(family, case)):
            got = session.run(padded[i : i + 1], sizes=np.array([size]))
            want = official_boxes(family, case, numbers, i)
            assert np.array_equal(got["labels"], want["labels"])
            # Measured 3.7e-3 pixels and 7e-5, in a PlainMamba.
            np.testing.assert_allclose(got["boxes"], want["boxes"], rtol=0, atol=1e-2)
            np.testing.assert_allclose(got["scores"], want["scores"], rtol=0, atol=2e-4)
            assert got["labels"].dtype == np.int64
            assert ("masks" in got) == ("retinanet" not in case)


@pytest.mark.parametrize("backend", ["kernel", "body"])
def test_official_boxes(whole: tuple[Detector, Artifact], backend: str) -> None:
    _check_boxes(*PADDED, whole[1], backend)


def test_a_whole_image_is_the_default(whole: tuple[Detector, Artifact]) -> None:
    model, artifact = whole
    image = detector_images(*PADDED)[:1]
    with torch.no_grad():
        (want,) = model.detect(image.float())
    for runtime in ("ort-cpu", "torch"):
        with vssm.open_session(artifact, runtime, threads=1) as session:
            got = session.run(image.float().numpy())
        assert np.array_equal(got["labels"], want.labels)
        np.testing.assert_allclose(got["boxes"], want.boxes, rtol=0, atol=1e-2)
        np.testing.assert_allclose(got["masks"], want.masks, rtol=0, atol=1e-3)


def test_graph_of_a_whole_detector(whole: tuple[Detector, Artifact]) -> None:
    manifest = whole[1].manifest
    assert [(i.name, i.shape) for i in manifest.inputs] == [
        ("images", (1, 3, 96, 96)),
        ("sizes", (1, 2)),
    ]
    assert [(o.name, o.shape) for o in manifest.outputs] == [
        ("boxes", ("detections", 4)),
        ("scores", ("detections",)),
        ("labels", ("detections",)),
        ("masks", ("detections", 28, 28)),
    ]
    proto = onnx.load(whole[1].model_path)
    onnx.checker.check_model(proto, full_check=True)
    operators = Counter(node.op_type for node in proto.graph.node)
    # Of proposals and at the end; four levels for each of three stages and the masks.
    assert (operators["NonMaxSuppression"], operators["RoiAlign"]) == (2, 16)
    assert not {"Loop", "If", "Scan"}.intersection(operators)
    aligns = [node for node in proto.graph.node if node.op_type == "RoiAlign"]
    for node in aligns:
        found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert found["coordinate_transformation_mode"] == b"half_pixel"
        assert found["sampling_ratio"] == 0
    session = ort.InferenceSession(whole[1].model_path, providers=["CPUExecutionProvider"])
    # The second one has a default.
    assert [i.name for i in session.get_inputs()] == ["images"]


def test_parity_of_detections(whole: tuple[Detector, Artifact]) -> None:
    report = vssm.check_parity(None, whole[1], images=detector_images(*PADDED).float().numpy())
    assert report.failures == []
    assert report.forced.name == "rpn.logits0"
    dense = {*whole[0].feature_names, *whole[0].dense_names}
    assert {b.name for b in report.blocks} == dense - {"rpn.logits0"}
    assert [d.name for d in report.detections] == ["oracle's positions", "free-running"]
    for found in report.detections:
        assert found.clear == found.found >= 5
        assert found.extra == found.disordered == 0


def test_what_a_whole_detector_refuses(whole: tuple[Detector, Artifact], tmp_path: Path) -> None:
    image = np.zeros((1, 3, 96, 96), np.float32)
    with vssm.open_session(whole[1], threads=1) as session:
        assert session.batches == (1, 1)
        with pytest.raises(ValueError, match=r"images.shape=\(2, 3, 96, 96\) is not \(1, 3, 96"):
            session.run(np.concatenate([image, image]))
        for sizes in ([[97, 1]], [[0, 5]], [[1, 2], [3, 4]], [[1.5, 2]]):
            with pytest.raises(ValueError, match=r"is not \[\[height, width\]\] of an image in 96"):
                session.run(image, sizes=np.array(sizes))
    classifier = exported(tmp_path / "classifier", micro())
    with (
        vssm.open_session(classifier, threads=1) as session,
        pytest.raises(
            ValueError, match="has no such input, only detectors exported with --outputs boxes"
        ),
    ):
        session.run(np.zeros((1, 3, 48, 48), np.float32), sizes=np.array([[48, 48]]))
    with pytest.raises(ValueError, match=r"batches=\[8\]: .* takes 1 at a time"):
        bench_directory(whole[1].directory, batches=[8])
    with pytest.raises(UnsupportedError, match="whole detector, which finds another number"):
        build_engine(whole[1], EngineRequest("tensorrt-rtx"))
    with pytest.raises(UnsupportedError, match="cuda_graph_batch=1 with a whole detector"):
        vssm.open_session(whole[1], "ort-cuda", cuda_graph_batch=1)


def test_images_of_any_size(whole: tuple[Detector, Artifact], tmp_path: Path, cli: Run) -> None:
    """`vssm run` from files: resized, padded, and back in pixels of the image."""
    model, artifact = whole
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "7.png")
    assert cli("run", artifact.directory, tmp_path / "7.png", "-o", tmp_path / "seen") == 0
    assert "wrote 1 PNG files and detections.json to" in cli.out
    results = json.loads((tmp_path / "seen" / "detections.json").read_text())
    assert model.preprocessing() == Preprocessing(96, (96, 96), "bilinear", fit="pad")
    image, size = padded(Image.fromarray(pixels), model.preprocessing())
    assert size == (64, 96)
    with torch.no_grad():
        (want,) = model.detect(torch.from_numpy(image[None]), [size])
    assert [row["category_id"] for row in results] == (want.labels + 1).tolist()
    assert len(results) > 0
    edges = want.boxes.double().numpy() / 1.6
    edges[:, 2:] -= edges[:, :2]
    np.testing.assert_allclose([row["bbox"] for row in results], edges, rtol=0, atol=1e-2)
    for row in results:
        assert row["image_id"] == 7
        assert row["segmentation"]["size"] == [40, 60]
    assert cli("run", artifact.directory, tmp_path / "7.png") == 2
    assert "a detector writes a drawing of each image and what it found; say -o DIR" in cli.out


def test_preprocessing_of_mmdetections_detectors() -> None:
    with torch.device("meta"):
        model = vssm.create_model("vmamba_tiny_maskrcnn_coco")
    assert model.preprocessing() == Preprocessing(1333, (800, 1344), "bilinear", fit="pad")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("maskrcnn_64x96", "plain_mamba_adapter_l1_maskrcnn_coco"),
        ("retinanet_128x96", "plain_mamba_adapter_l1_retinanet_coco"),
    ],
)
def test_other_whole_detectors(tmp_path: Path, case: str, name: str) -> None:
    score = 0.5 if "retinanet" in case else 0.2
    model = _named(micro_detector("plain_mamba", case, **{**TOLD, "score": score}), name)
    artifact = exported(tmp_path, model, outputs="boxes")
    _check_boxes("plain_mamba", case, artifact, "kernel")
    assert vssm.check_parity(None, artifact).failures == []


@pytest.mark.slow
def test_a_whole_detector_in_half_precision(tmp_path: Path) -> None:
    """Measured on six images: 86 of 96 found, 80 % in the worst."""
    name = "plain_mamba_adapter_l1_maskrcnn_coco"
    model = _named(micro_detector("plain_mamba", "maskrcnn_64x96", **TOLD), name)
    artifact = exported(tmp_path, model, outputs="boxes", dtype="float16")
    x = detector_images("plain_mamba", "maskrcnn_64x96").float().numpy()
    report = vssm.check_parity(None, artifact, images=np.concatenate([x, images(model, 4, seed=1)]))
    assert report.failures == []
    assert report.detections[0].clear > 50


@pytest.mark.slow
def test_a_whole_vmamba(tmp_path: Path) -> None:
    """There are no official boxes of one here: the oracle alone says what is right."""
    shape = {"image_size": (64, 96), "depths": (1, 1, 1, 1), "d_model": 16, "neck_width": 32}
    told = {**TOLD, "score": 0.1, "num_classes": 7, "region_width": 64}
    model = fill_weights(vssm.create_model("vmamba_tiny_maskrcnn_coco", **shape, **told))
    report = vssm.check_parity(None, exported(tmp_path, model, outputs="boxes"))
    assert report.failures == []
    assert report.detections[0].clear > 4
