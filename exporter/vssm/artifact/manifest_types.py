"""The parts of `model.json` as frozen dataclasses; `manifest.py` reads and writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

FORMAT_VERSION: Final = 1
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
_CROP_RATIO: Final = 0.875  # crop over shorter side, of all official evaluations


@dataclass(frozen=True)
class TensorInfo:
    """One graph input or output; `shape` holds sizes, and "batch" for the dynamic first axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class BlockOutput:
    """Value names of what one block returns; `block` is 1-based, `residual` None without one."""

    block: int
    hidden: str
    residual: str | None = None


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes the model's input: resize, centre crop, normalise.

    Attributes:
        resize: the shorter side in pixels after resizing; at least as long as the crop's sides.
        crop: (height, width) in pixels, the model's input size.
        interpolation: "bicubic", "bilinear" or "nearest", always PIL's, which antialiases.
        mean: of R, G, B, where the pixels lie in [0, 1].
        std: of R, G, B, likewise.
    """

    resize: int
    crop: tuple[int, int]
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @classmethod
    def for_image_size(cls, size: int | tuple[int, int]) -> Preprocessing:
        """The official evaluation of a model of this input size: 256 then 224, ImageNet statistics.

        The shorter side is rounded down, as the evaluation code of Vim, VMamba and timm does; of a
        crop that is not square, the longer side counts.
        """
        crop = (size, size) if isinstance(size, int) else size
        return cls(resize=int(max(crop) / _CROP_RATIO), crop=crop)


@dataclass(frozen=True)
class ScheduleInfo:
    """What was pruned where. `blocks`: 1-based block -> keep ratio as a decimal string.

    `num_keep` has one entry a stage, the class token included; `cls_position` is the class token's
    place in the unpruned sequence, None without one; `seed` belongs to importance "random".
    """

    blocks: Mapping[int, str]
    alignment: str
    importance: str
    source: str
    gated: bool
    conv: str
    step_parameters: str
    num_keep: tuple[int, ...]
    cls_position: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class CheckpointInfo:
    """The checkpoint that the weights came from: its file name (no directory) and SHA-256."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The whole of `model.json`; DESIGN section 4 says what each field is for.

    `files` maps every other file of the directory to its SHA-256, `operators` the custom operators
    in the graph to their versions, `versions` the packages that made the export to theirs.
    `weights` is "checkpoint" (from the file that `checkpoint` names), "initial" (the seeded ones of
    `create_model`) or "custom" (any other).
    """

    name: str
    config: Mapping[str, Any]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    dtype: str
    opset: int
    files: Mapping[str, str]
    operators: Mapping[str, int]
    versions: Mapping[str, str]
    weights: str = "initial"
    schedule: ScheduleInfo | None = None
    block_outputs: tuple[BlockOutput, ...] = ()
    preprocessing: Preprocessing | None = None
    checkpoint: CheckpointInfo | None = None
    labels: tuple[str, ...] | None = None
    format_version: int = FORMAT_VERSION
