"""Bundles of segmenters and detectors: what a server reads, what `--verify` runs, the client."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command import Run
from exports import exported, micro_segmenter
from google.protobuf import text_format
from official_dense import micro_detector
from PIL import Image
from triton_server import ask, serving, triton_schema

import vssm
from vssm.artifact.data_sets import ADE20K, ADE20K_COLOURS, COCO, voc_colours
from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import FreeSize, TensorInfo
from vssm.bundle import make
from vssm.bundle.make import BundleRequest, make_bundle
from vssm.bundle.manifest import read_bundle_manifest
from vssm.bundle.triton import ServingOptions, onnxruntime_config, tensorrt_config
from vssm.bundle.verify import _with_dense_head, verify_bundle
from vssm.errors import ArtifactError, UnsupportedError
from vssm.evaluation.detect import detect
from vssm.evaluation.label_maps import write_label_maps

SEGMENTER, DETECTOR = "vim_small_upernet_ade20k", "vim_tiny_cascade_mask_rcnn_coco"


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The export that tests/onnx/test_segmenters.py makes too, of seven classes."""
    model = micro_segmenter("vim_small", "1:0.8,3:0.7", {}, num_classes=7)
    return exported(tmp_path_factory.mktemp("segmenter"), model, outputs="labels", dtype="float32")


@pytest.fixture(scope="module")
def segmenters_bundle(segmenter: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    make_bundle(segmenter, path, BundleRequest(serving=ServingOptions(batch=(1, 2, 2))))
    return path


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The export that tests/onnx/test_detectors.py makes too."""
    told = {"level_proposals": 120, "proposals": 60, "most": 20, "score": 0.2}
    model = micro_detector("vim", "rope_96_padded", **told)
    model.name = DETECTOR
    return exported(tmp_path_factory.mktemp("detector"), model, outputs="boxes")


@pytest.fixture(scope="module")
def detectors_bundle(detector: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    make_bundle(detector, path, BundleRequest())
    return path


def _settings(bundle: Path) -> dict[str, str]:
    lines = (bundle / "bundle.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


def _tensors(tensors: Any) -> list[tuple[str, list[int]]]:
    return [(tensor.name, list(tensor.dims)) for tensor in tensors]


@pytest.mark.parametrize("variant", ["tensorrt", "onnxruntime"])
def test_what_is_served_of_a_segmenter(segmenters_bundle: Path, variant: str) -> None:
    folder = segmenters_bundle / "triton" / variant / SEGMENTER
    config = text_format.Parse((folder / "config.pbtxt").read_text(), triton_schema().ModelConfig())
    assert config.max_batch_size == 2
    assert _tensors(config.input) == [("images", [3, 64, 96])]
    assert _tensors(config.output)[:2] == [("logits", [7, 16, 24]), ("labels", [64, 96])]
    assert config.output[1].data_type == triton_schema().TYPE_INT32
    # Triton would name the best of all 7 x 16 x 24 numbers.
    assert not config.output[0].label_filename
    assert (folder / "labels.txt").read_text().splitlines() == [f"class {i}" for i in range(7)]


def test_what_is_served_of_a_detector(detectors_bundle: Path) -> None:
    schema = triton_schema()
    assert not (detectors_bundle / "triton/tensorrt").exists()
    folder = detectors_bundle / "triton/onnxruntime" / DETECTOR
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    # Shapes are whole: there is no batch that the server could add.
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert _tensors(config.input) == [("images", [1, 3, 96, 96]), ("sizes", [1, 2])]
    assert [tensor.optional for tensor in config.input] == [False, True]
    assert _tensors(config.output) == [
        ("boxes", [-1, 4]),
        ("scores", [-1]),
        ("labels", [-1]),
        ("masks", [-1, 28, 28]),
    ]
    assert list(config.model_operations.op_library_filename)
    settings = _settings(detectors_bundle)
    assert (settings["MIN_BATCH"], settings["MAX_BATCH"]) == ("1", "1")
    reason = read_bundle_manifest(detectors_bundle).absent["triton/tensorrt"]
    assert "a whole detector finds another number of objects in each image" in reason


@pytest.mark.parametrize("kind", ["segmenters_bundle", "detectors_bundle"])
def test_verify_runs_them(kind: str, request: pytest.FixtureRequest, cli: Run) -> None:
    bundle = request.getfixturevalue(kind)
    assert cli("bundle", "--verify", bundle) == 0, cli.out
    compared = "logits" if kind == "segmenters_bundle" else "rpn.logits0"
    assert f"kernels ran, {compared} within " in cli.out
    assert "passed" in cli.out


def test_verify_finds_a_library_of_something_else(
    detectors_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vssm.bundle import verify as bundle_verify

    real = bundle_verify.run_once

    def wrong(model: Path, images: Any, library: Path | None) -> Any:
        ran = real(model, images, library)
        if library is None:
            return ran
        # What was found stays, so only the dense head's numbers tell.
        outputs = {**ran.outputs, "rpn.logits0": -ran.outputs["rpn.logits0"]}
        return dataclasses.replace(ran, outputs=outputs)

    monkeypatch.setattr(bundle_verify, "run_once", wrong)
    (failure,) = verify_bundle(detectors_bundle).failures
    assert failure.startswith("rpn.logits0 with libvssm_onnxruntime.so differ")


@pytest.mark.parametrize("head", ["rpn.cls0", "head.cls0", "other.cls0"])
def test_what_verify_compares_of_a_detector(head: str) -> None:
    """The dense head is an inner value; the file that gives it too is the old one, and more."""
    nodes = [onnx.helper.make_node("Identity", ["images"], [name]) for name in (head, "boxes")]
    values = [onnx.helper.make_tensor_value_info(name, 1, [1, 4]) for name in ("images", "boxes")]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", values[:1], values[1:]))
    if head == "other.cls0":
        with pytest.raises(ArtifactError, match="of a detector of this package"):
            _with_dense_head(model.SerializeToString())
        return
    name, data = _with_dense_head(model.SerializeToString())
    both = onnx.ModelProto.FromString(data)
    assert name == head
    assert [output.name for output in both.graph.output] == ["boxes", head]
    del both.graph.output[1]
    assert both == model


def test_palettes_and_labels(
    segmenter: Artifact, segmenters_bundle: Path, detectors_bundle: Path, tmp_path: Path
) -> None:
    lines = (segmenters_bundle / "palette.txt").read_text().splitlines()
    assert lines[:2] == ["0 0 0 class 0", "128 0 0 class 1"]
    assert len(lines) == 7
    first = (detectors_bundle / "palette.txt").read_text().splitlines()[0]
    assert first == "128 0 0 class 0"
    names = tmp_path / "names.txt"
    names.write_text("sky\nsea\nold rose\na\nb\nc\nd\n")
    make_bundle(segmenter, tmp_path / "named", BundleRequest(labels=names))
    lines = (tmp_path / "named/palette.txt").read_text().splitlines()
    assert lines[2] == "0 128 0 old rose"
    names.write_text("sky\nsea")
    with pytest.raises(ValueError, match="names 2 classes on 2 lines, but the model has 7"):
        make_bundle(segmenter, tmp_path / "wrong", BundleRequest(labels=names))


def test_names_have_their_colours(segmenter: Artifact, detector: Artifact) -> None:
    ade = make._palette(segmenter.manifest, ADE20K).splitlines()
    assert ade[2] == "{} {} {} sky".format(*ADE20K_COLOURS[2])
    coco = make._palette(detector.manifest, COCO).splitlines()
    assert coco[79] == "{} {} {} toothbrush".format(*voc_colours(81)[80])


@pytest.fixture
def levels(segmenter: Artifact) -> Artifact:
    """As an export of levels is described."""
    outputs = (TensorInfo("level0", "float32", ("batch", 24, 16, 24)),)
    manifest = dataclasses.replace(segmenter.manifest, outputs=outputs, labels=None)
    return dataclasses.replace(segmenter, manifest=manifest)


def test_levels_have_no_classes(levels: Artifact, tmp_path: Path) -> None:
    assert make._classes(levels.manifest) == 0
    assert make._palette(levels.manifest, []) == ""
    for config in (tensorrt_config, onnxruntime_config):
        assert "labels.txt" not in config("levels", levels.manifest, ServingOptions())
    request = BundleRequest(labels=tmp_path / "names.txt")
    with pytest.raises(
        ValueError, match=r"names\.txt: .* has the outputs level0 and so no classes"
    ):
        make_bundle(levels, tmp_path / "bundle", request)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "a whole detector .*; ONNX Runtime's CPU provider has no bfloat16"),
        ({"sizes": {"height": FreeSize(8, 4, 8)}}, "takes images of any height, but an engine"),
    ],
)
def test_what_no_variant_serves(
    detector: Artifact, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    manifest = dataclasses.replace(detector.manifest, **changes)
    artifact = dataclasses.replace(detector, manifest=manifest)
    with pytest.raises(UnsupportedError, match=message):
        make_bundle(artifact, tmp_path / "bundle", BundleRequest())


def test_a_fixed_batch_is_refused(segmenter: Artifact, tmp_path: Path) -> None:
    inputs = (TensorInfo("images", "float32", (3, 3, 64, 96)),)
    manifest = dataclasses.replace(segmenter.manifest, inputs=inputs)
    artifact = dataclasses.replace(segmenter, manifest=manifest)
    with pytest.raises(UnsupportedError, match="takes 3 images at a time, but a server gathers"):
        make_bundle(artifact, tmp_path / "bundle", BundleRequest())


@pytest.mark.parametrize("option", ["--batch=1,8,32", "--queue-us=500"])
def test_a_detector_has_no_batches(
    detector: Artifact, tmp_path: Path, cli: Run, option: str
) -> None:
    assert cli("bundle", detector.directory, "-o", tmp_path / "bundle", option) == 2
    assert "a whole detector takes one image at a time" in cli.out
    assert not (tmp_path / "bundle").exists()


def _photo(path: Path, width: int, height: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_the_client_of_a_segmenter(
    segmenter: Artifact, segmenters_bundle: Path, tmp_path: Path
) -> None:
    """What `vssm run` writes, to the pixel: windows, label map, overlay and shares."""
    photo = _photo(tmp_path / "photo.png", 160, 100)
    with vssm.open_session(segmenter, threads=1) as session:
        names = [f"class {i}" for i in range(7)]
        (row,) = write_label_maps(session, [photo], tmp_path / "run", names=names)
        with serving(lambda feeds: session.run(feeds["images"])) as server:
            lines = ask(segmenters_bundle, server, photo, "-o", tmp_path / "client")
    for kind in ("labels", "overlay"):
        with (
            Image.open(row[kind]) as want,
            Image.open(tmp_path / f"client/photo.{kind}.png") as got,
        ):
            assert (np.asarray(got) == np.asarray(want)).all()
    told = [f"  {found['share']:8.3f}  {found['label']}" for found in row["classes"]]
    assert lines == [str(photo), *told]
    # As many windows in a request as the server takes.
    batches = [shapes["images"][0] for _, shapes in server.seen]
    assert batches == [2] * (len(batches) - 1) + [batches[-1]]


def test_the_client_of_a_detector(
    detector: Artifact, detectors_bundle: Path, tmp_path: Path
) -> None:
    photo = _photo(tmp_path / "photo.png", 60, 40)
    with vssm.open_session(detector, threads=1) as session:
        want = detect(session, photo)
        with serving(lambda feeds: session.run(feeds["images"], sizes=feeds["sizes"])) as server:
            lines = ask(detectors_bundle, server, photo, "-o", tmp_path / "client", "--score=0.2")
    assert server.seen[0][1] == {"images": [1, 3, 96, 96], "sizes": [1, 2]}
    assert len(lines) == 1 + len(want.scores) > 1
    box = " ".join(f"{part:.1f}" for part in want.boxes[0])
    assert lines[1] == f"  {want.scores[0]:8.3f}  class {want.labels[0]}  {box}"
    with Image.open(tmp_path / "client/photo.detections.png") as drawn:
        assert drawn.size == (60, 40)


def _spec(artifact: Artifact) -> Any:
    return json.loads((artifact.directory / "model.json").read_text())["preprocessing"]


def test_clients_agree_without_a_server(
    detector: Artifact, segmenter: Artifact, tmp_path: Path
) -> None:
    """What they compute, where NVIDIA's HTTP client is not installed."""
    client = runpy.run_path(str(make.find_sources() / "examples/serving/client.py"))
    photo = _photo(tmp_path / "photo.png", 160, 100)
    with vssm.open_session(segmenter, threads=1) as session:
        (row,) = write_label_maps(session, [photo], tmp_path / "run")
        labels = client["classes_of_pixels"](
            str(photo), _spec(segmenter), lambda images, names: session.run(images), 2
        )
    with Image.open(row["labels"]) as want:
        assert (labels == np.asarray(want)).all()
    with vssm.open_session(detector, threads=1) as session:
        found = client["objects"](
            str(photo), _spec(detector), lambda x, sizes: session.run(x, sizes=sizes)
        )
        want = detect(session, photo)
    for name in ("boxes", "scores", "labels", "masks"):
        np.testing.assert_array_equal(found[name], getattr(want, name))
