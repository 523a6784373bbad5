"""Checkpoints of segmenters and detectors that do not fit: another head, or another class count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Run
from official_dense import micro_detector, micro_segmenter

import vssm
from vssm.errors import CheckpointError
from vssm.models.base import VisionModel

MASK_RCNN, RETINANET = "maskrcnn_64x96", "retinanet_128x96"


def _saved(model: VisionModel, folder: Path) -> Path:
    path = folder / "official.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": model.state_dict()}, path)
    return path


@pytest.mark.parametrize(("saved", "loaded"), [(MASK_RCNN, RETINANET), (RETINANET, MASK_RCNN)])
def test_another_head(saved: str, loaded: str, tmp_path: Path) -> None:
    path = _saved(micro_detector("plain_mamba", saved), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        vssm.load_checkpoint(micro_detector("plain_mamba", loaded), path)
    message = str(caught.value)
    assert message.startswith(f"checkpoint={path}: it does not fit the model (missing: neck.")
    assert "unexpected: neck." in message
    assert "create the model with the name, num_classes and options of the file's" in message


@pytest.mark.parametrize(
    ("model", "key"),
    [
        (lambda **c: micro_segmenter("vim", "residual_rope_64", **c), "decode_head.conv_seg"),
        (lambda **c: micro_detector("vim", "rope_64", **c), "box_predictor.0.cls_score"),
        (lambda **c: micro_detector("plain_mamba", MASK_RCNN, **c), "bbox_head.fc_cls"),
        (lambda **c: micro_detector("plain_mamba", RETINANET, **c), "bbox_head.retina_cls"),
    ],
    ids=["segmenter", "cascade", "mask_rcnn", "retinanet"],
)
def test_another_number_of_classes(model, key: str, tmp_path: Path) -> None:
    path = _saved(model(), tmp_path)
    with pytest.raises(CheckpointError, match=rf"misshapen: .*{key}\.weight \(file \("):
        vssm.load_checkpoint(model(num_classes=9), path)


WIDTHS = {"depth": 4, "d_model": 48, "image_size": 64}
HEADS = {"table_size": 64, "head_width": 32, "auxiliary_width": 16, "taps": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        (
            "vim_tiny_cascade_mask_rcnn_coco",
            {"neck_width": 8, "region_width": 8},
            "it does not fit the model (missing: backbone.simfp_2.0.weight",
        ),
        # ADE20K's 150 classes, where the file has 11.
        (
            "vim_tiny_upernet_ade20k",
            HEADS,
            "decode_head.conv_seg.weight (file (11, 32, 1, 1), model (150, 32, 1, 1))",
        ),
    ],
    ids=["head", "classes"],
)
def test_exit_code_of_a_wrong_checkpoint(
    tmp_path: Path, cli: Run, name: str, sizes: dict[str, Any], message: str
) -> None:
    path = _saved(micro_segmenter("vim", "mixer_taps_64"), tmp_path)
    options = [f"--set={key}={json.dumps(value)}" for key, value in (WIDTHS | sizes).items()]
    out = tmp_path / "out"
    assert cli("export", name, "--checkpoint", path, *options, "-o", out) == 2
    assert message in cli.out
    assert not out.exists()


@pytest.mark.parametrize("name", ["vim_tiny_upernet_ade20k", "vmamba_tiny_maskrcnn_coco"])
def test_exit_code_of_an_image_smaller_than_a_patch(tmp_path: Path, cli: Run, name: str) -> None:
    assert cli("export", name, "--set=image_size=3", "-o", tmp_path / "out") == 2
    assert "image_size=3 is smaller than patch_size=" in cli.out
