"""Small exported models that several test files share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch

import vssm
from vssm.artifact.directory import Artifact, open_artifact
from vssm.models.base import VisionModel
from vssm.types import Steps

# 37 tokens, the class token in the middle; odd widths everywhere.
MICRO: dict[str, Any] = {
    "image_size": 48,
    "patch_size": 8,
    "stride": 8,
    "depth": 3,
    "d_model": 20,
    "d_state": 5,
    "num_classes": 7,
}
SCHEDULE = "1:0.7,2:0.8"
AS_RELEASED = {"alignment": "none", "importance": "as_released"}


# PlainMamba: a grid of 6 x 5 places.
MICRO_PLAIN: dict[str, Any] = {
    "image_size": (24, 20),
    "patch_size": 4,
    "depth": 4,
    "d_model": 20,
    "d_state": 5,
    "num_classes": 7,
    "stem_width": 8,
}


def micro(
    schedule: str | vssm.MergeSchedule | None = SCHEDULE,
    *,
    rules: dict[str, Any] | None = None,
    **changes: Any,
) -> VisionModel:
    """A micro Vim whose scan matters: fixture weights, pruned after blocks 1 and 2."""
    return _filled("vim_tiny", schedule, rules, {**MICRO, **changes})


def micro_plain(
    schedule: str | None = SCHEDULE, *, rules: dict[str, Any] | None = None, **changes: Any
) -> VisionModel:
    """A micro PlainMamba L1 likewise."""
    return _filled("plain_mamba_l1", schedule, rules, {**MICRO_PLAIN, **changes})


# Segmenters: a table of 4 x 4 places; VMamba has none.
MICRO_HEADS: dict[str, Any] = {"head_width": 16, "auxiliary_width": 8, "num_classes": 7}
MICRO_SEGMENTERS: dict[str, dict[str, Any]] = {
    "vim": {"image_size": (64, 96), "table_size": 64, "depth": 4, "d_model": 24},
    "plain_mamba": {"image_size": (48, 80), "table_size": 64, "depth": 4, "d_model": 20},
    "vmamba": {"image_size": (53, 71), "depths": (1, 1, 1, 1), "d_model": 16},
}


def micro_segmenter(
    name: str,
    schedule: str | vssm.MergeSchedule | None,
    rules: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A micro segmenter, such as "vim_tiny" with the name of its data set left out."""
    family = name.rpartition("_")[0]
    sizes = {**MICRO_SEGMENTERS[family], **MICRO_HEADS}
    if family != "vmamba":
        sizes["taps"] = (1, 2, 3, 4)
    return _filled(f"{name}_upernet_ade20k", schedule, rules, {**sizes, **changes})


def _filled(
    name: str,
    schedule: str | vssm.MergeSchedule | None,
    rules: dict[str, Any] | None,
    options: dict[str, Any],
) -> VisionModel:
    from official_data import fill_weights

    parsed = schedule
    if isinstance(schedule, str):
        ratios = {int(b): r for b, r in (pair.split(":") for pair in schedule.split(","))}
        parsed = vssm.PruneSchedule(ratios, **(rules or {}))
    model = vssm.create_model(name, schedule=parsed, **options)
    fill_weights(model)
    return model


def images(model: VisionModel, batch: int = 2, *, seed: int = 0) -> np.ndarray:
    """Normal images (batch, 3, height, width) float32 for a model."""
    shape = (batch, 3, *model.image_size)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exported(tmp_path: Path, model: VisionModel, **options: Any) -> Artifact:
    """The model's export in `tmp_path`/out: made once in a run of pytest, by whoever asks first.

    Equal models and options give equal bytes, which tests/onnx proves; a test of the export itself
    calls vssm.export.
    """
    described = (model.checkpoint, model.loaded, model.labels, sorted(options.items()))
    with shared_traces():
        return stored(
            tmp_path, _key(model, *described), lambda made: vssm.export(model, made, **options)
        )


def stored(tmp_path: Path, key: str, export: Callable[[Path], object]) -> Artifact:
    """A copy in `tmp_path`/out of what `export` writes, which a run of pytest calls once a key."""
    with _once(key) as made:
        if not made.exists():
            export(made)
    tmp_path.mkdir(parents=True, exist_ok=True)
    shutil.copytree(made, tmp_path / "out")
    return open_artifact(tmp_path / "out")


@contextmanager
def shared_traces() -> Iterator[None]:
    """What vssm.export traces here is traced once in a run of pytest: for tests of all the rest.

    A trace takes seconds, and does not see options such as labels, `inline` or `force`.
    """
    # Not on import: the tests for a GPU do without its packages.
    from vssm.onnx.export import build_proto

    def traced(
        model: VisionModel, *, dtype: str, opset: int, outputs: str | None, progress: Steps
    ) -> onnx.ModelProto:
        with _once(f"{_key(model, dtype, opset, outputs)}.onnx") as made:
            if not made.exists():
                proto = build_proto(
                    model, dtype=dtype, opset=opset, outputs=outputs, progress=progress
                )
                made.write_bytes(proto.SerializeToString())
            return onnx.load_from_string(made.read_bytes())

    with mock.patch("vssm.onnx.export.build_proto", traced):
        yield


@contextmanager
def _once(name: str) -> Iterator[Path]:
    """A path that all processes share, and that this one alone has for now."""
    store = Path(os.environ["VSSM_TEST_EXPORTS"])
    store.mkdir(exist_ok=True)
    made = store / name
    with Path(f"{made}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield made


def _key(model: VisionModel, *options: object) -> str:
    told = repr((model.name, asdict(model.config), model.schedule, *options))
    digest = hashlib.sha256(told.encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
