"""The official numbers of dense models, and small ones filled with their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import fill
import numpy as np
import torch
from official_data import fill_weights, fixture, manifest
from torch import Tensor

from vssm import PruneSchedule
from vssm.models.dense.detector import Detector
from vssm.models.dense.plain_mamba import (
    PlainMambaDetector,
    PlainMambaDetectorConfig,
    PlainMambaSegmenter,
    PlainMambaSegmenterConfig,
)
from vssm.models.dense.segmenter import Segmenter
from vssm.models.dense.vim import (
    VimDetector,
    VimDetectorConfig,
    VimSegmenter,
    VimSegmenterConfig,
)
from vssm.models.dense.vmamba import VMambaSegmenter, VMambaSegmenterConfig

FAMILIES = ("vim", "plain_mamba", "vmamba")
# Switches that no released model has, and ours has not either: a norm of the last stream, or none.
OTHERS = {"residual_addnorm_64", "no_final_norm_64"}


def cases(family: str) -> dict[str, Any]:
    """The small segmenters of a family by name, in the words of the official code."""
    found: dict[str, Any] = manifest(f"dense/micro_{family}_upernet")["cases"]
    return {name: case for name, case in found.items() if name not in OTHERS}


def micro_segmenter(
    family: str, case: str, schedule: PruneSchedule | None = None, **changes: Any
) -> Segmenter:
    """A small segmenter with the weights of its case, float32."""
    document = cases(family)[case]
    build: Callable[..., Segmenter] = {
        "vim": lambda c: VimSegmenter(VimSegmenterConfig(**c), schedule),
        "plain_mamba": lambda c: PlainMambaSegmenter(PlainMambaSegmenterConfig(**c), schedule),
        "vmamba": lambda c: VMambaSegmenter(VMambaSegmenterConfig(**c), schedule),
    }[family]
    sizes = {"vim": _vim, "plain_mamba": _plain_mamba, "vmamba": _vmamba}[family](document)
    heads = {"head_width": 32, "auxiliary_width": 16, "num_classes": 11}
    model = fill_weights(build({**sizes, **heads, **changes}))
    assert isinstance(model, Segmenter)
    return model


def _vim(document: Mapping[str, Any]) -> dict[str, Any]:
    official = document["backbone"]
    return {
        "image_size": official["img_size"],
        "table_size": official["img_size"],
        "patch_size": official.get("patch_size", 16),
        "depth": official["depth"],
        "d_model": official["embed_dim"],
        "rope": official["if_rope"],
        "divide_out": official["if_divide_out"],
        "taps": tuple(index + 1 for index in official["out_indices"]),
        "tap_stream": "sum" if official.get("use_residual_as_feature") else "mixer",
    }


def _plain_mamba(document: Mapping[str, Any]) -> dict[str, Any]:
    official = document["backbone"]
    mixer = official["layer_cfgs"]["mamba_cfg"]
    return {
        "image_size": tuple(document["input"]["shape"][2:]),
        "table_size": official["img_size"],
        "depth": official["num_layers"],
        "d_model": official["embed_dims"],
        "d_state": mixer["d_state"],
        "conv_size": mixer["conv_size"],
        "stem_convs": official["num_convs_patch_embed"],
        "layers_with_dwconv": official["layers_with_dwconv"],
        "taps": tuple(index + 1 for index in official["out_indices"]),
    }


def _vmamba(document: Mapping[str, Any]) -> dict[str, Any]:
    official = document["config"]["backbone"]
    return {
        "image_size": tuple(document["input"]["shape"][2:]),
        "depths": official["depths"],
        "d_model": official["dims"],
        "d_state": official["ssm_d_state"],
        "expand": official["ssm_ratio"],
        "conv_bias": official["ssm_conv_bias"],
        "gate": official["forward_type"] == "v05",
        "mlp_ratio": official["mlp_ratio"],
        "patch_embed": official["patchembed_version"],
        "downsample": official["downsample_version"],
    }


def case_images(family: str, case: str) -> Tensor:
    """The official images of a case, float32."""
    asked = cases(family)[case]["input"]
    return torch.from_numpy(fill.make_input(tuple(asked["shape"]), key=asked["key"]))


def errors(file: str, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of each tensor that a file has, over the largest of its numbers there."""
    numbers = fixture(file)
    return {
        name: _error(numbers, f"{prefix}{name}", value)
        for name, value in tensors.items()
        if f"{prefix}{name}.shape" in numbers
    }


def _error(numbers: Mapping[str, np.ndarray], key: str, value: Tensor) -> float:
    got = np.asarray(value.detach().double()).reshape(-1)
    assert tuple(value.shape) == tuple(numbers[f"{key}.shape"])
    if f"{key}.f64" in numbers:
        want = numbers[f"{key}.f64"].reshape(-1)
    else:
        want = numbers[f"{key}.f64.samples"]
        got = got[fill.sample_index(got.size, want.size)]
    return float(np.abs(got - want).max() / np.abs(want).max())


# Cases with switches that no released detector has: two points a level, no tokens in the outputs,
# the mixer's output alone.
OTHER_DETECTORS = {"maskrcnn_96x64_heads4", "maskrcnn_novit_64", "last_none_64"}


def detector_cases(family: str) -> dict[str, Any]:
    """The small detectors of "vim" or "plain_mamba" by name, in the words of the official code."""
    found: dict[str, Any] = manifest(f"dense/micro_{family}_det")["cases"]
    return {name: case for name, case in found.items() if name not in OTHER_DETECTORS}


def micro_detector(
    family: str, case: str, schedule: PruneSchedule | None = None, **changes: Any
) -> Detector:
    """A small detector with the weights of its case, float32."""
    document = detector_cases(family)[case]
    heads = {"neck_width": 32, "region_width": 64, "num_classes": 7}
    model: Detector
    if family == "vim":
        sizes = {**_vim_detector(document), **heads, **changes}
        model = VimDetector(VimDetectorConfig(**sizes), schedule)
    else:
        sizes = {**_adapter(document), **heads, **changes}
        model = PlainMambaDetector(PlainMambaDetectorConfig(**sizes), schedule)
    fill_weights(model)
    return model


def _vim_detector(document: Mapping[str, Any]) -> dict[str, Any]:
    official = document["config"]["backbone"]["net"]
    return {
        "image_size": official["img_size"],
        "table_size": official["img_size"],
        "depth": official["depth"],
        "d_model": official["embed_dim"],
        "rope": official["if_rope"],
        "divide_out": official.get("if_devide_out", False),
    }


def _adapter(document: Mapping[str, Any]) -> dict[str, Any]:
    official = document["config"]["backbone"]
    retinanet = document["config"]["type"] == "RetinaNet"
    shape = {"backbone": {**official, "out_indices": []}, "input": document["input"]}
    sizes = _plain_mamba(shape)
    return {
        **{key: value for key, value in sizes.items() if key != "taps"},
        "groups": tuple(last + 1 for _, last in official["interaction_indexes"]),
        "attention_heads": official["deform_num_heads"],
        "prior_width": official["conv_inplane"],
        "head": "retinanet" if retinanet else "mask_rcnn",
        "head_convs": 2 if retinanet else 4,
    }


def detector_images(family: str, case: str) -> Tensor:
    """The official images of a case as the backbone gets them, float64; Vim's padded with zeros."""
    document = detector_cases(family)[case]
    if family == "plain_mamba":
        asked = document["input"]
        return torch.from_numpy(fill.make_input(tuple(asked["shape"]), key=asked["key"])).double()
    side = document["config"]["backbone"]["net"]["img_size"]
    padded = torch.zeros(len(document["images"]), 3, side, side, dtype=torch.float64)
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[..., None, None]
    for image, asked in zip(padded, document["images"], strict=True):
        pixels = fill.make_input(tuple(asked["shape"]), key=asked["key"]) * 50 + 120
        _, height, width = pixels.shape
        image[:, :height, :width] = (
            torch.from_numpy(pixels.astype(np.float32)).double() - mean.double()
        ) / std.double()
    return padded


def detector_sizes(family: str, case: str) -> list[tuple[int, int]]:
    """(height, width) of the images of a case before they were padded."""
    document = detector_cases(family)[case]
    if family == "vim":
        return [tuple(image["shape"][1:]) for image in document["images"]]
    batch, _, height, width = document["input"]["shape"]
    return [(height, width)] * batch


def official_boxes(
    family: str, case: str, numbers: Mapping[str, np.ndarray], image: int
) -> dict[str, np.ndarray]:
    """Boxes, scores and labels of one image in float64, best first."""
    if family == "vim":
        names = {"boxes": "boxes{}.f64", "scores": "scores{}.f64", "labels": "classes{}"}
        return {k: numbers[f"{case}/{name.format(image)}"] for k, name in names.items()}
    boxes, scores = np.split(numbers[f"{case}/dets{image}.f64"], [4], axis=1)
    labels = numbers[f"{case}/labels{image}"]
    return {"boxes": boxes, "scores": scores.ravel(), "labels": labels}
