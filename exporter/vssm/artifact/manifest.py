"""`model.json`: what an exported directory holds, read, checked and written.

The two sides of the package meet here, so this file needs the standard library alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vssm.files.atomic import atomic_write_bytes
from vssm.files.json import FieldError, Node, read_json
from vssm.ops.spec import FLOAT_TYPES

MANIFEST_NAME: Final = "model.json"
FORMAT_VERSION: Final = 1
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
_CROP_RATIO: Final = 0.875  # crop over shorter side, of all official evaluations


@dataclass(frozen=True)
class TensorInfo:
    """One graph input or output.

    `shape` holds sizes; a first axis of open size is "batch", or "detections": what an image holds.
    In a module of the user's, names of free sizes and what is computed from them, such as
    "height//4".
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def takes(self, shape: Sequence[int], sizes: Mapping[str, FreeSize]) -> bool:
        """Whether an array has these sizes behind its first axis; `sizes` are the open ones."""
        return len(shape) == len(self.shape) and all(
            n == size if isinstance(size, int) else size in sizes and sizes[size].allows(n)
            for n, size in zip(shape[1:], self.shape[1:], strict=True)
        )


@dataclass(frozen=True)
class FreeSize:
    """What a size that an export of a user's module leaves open may be.

    Attributes:
        example: the size of the example input.
        multiple: it is a multiple of this.
        minimum: the smallest.
    """

    example: int
    multiple: int
    minimum: int

    def allows(self, size: int) -> bool:
        """Whether the file is right at this size."""
        return size >= self.minimum and size % self.multiple == 0


def rules_of(sizes: Mapping[str, FreeSize]) -> str:
    """What open sizes may be, in words that go behind a shape."""
    return "".join(
        f", {name} a multiple of {size.multiple} from {size.minimum} on"
        for name, size in sizes.items()
    )


@dataclass(frozen=True)
class BlockOutput:
    """Value names of what one block returns; `block` is 1-based, `residual` None without one."""

    block: int
    hidden: str
    residual: str | None = None


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes the model's input: resize, centre crop or pad, normalise.

    Attributes:
        resize: the shorter side in pixels after resizing, at least as long as the crop's sides;
            with fit "pad" the most that the longer side may have.
        crop: (height, width) in pixels, the model's input size.
        interpolation: "bicubic", "bilinear" or "nearest", always PIL's, which antialiases.
        mean: of R, G, B, where the pixels lie in [0, 1].
        std: of R, G, B, likewise.
        fit: "crop", the middle of the image; or "pad", the whole of it, as large as it fits, with
            zeros at the bottom and the right.
    """

    resize: int
    crop: tuple[int, int]
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    fit: str = "crop"

    @classmethod
    def for_image_size(cls, size: int | tuple[int, int]) -> Preprocessing:
        """The official evaluation of a model of this input size: 256 then 224, ImageNet statistics.

        The shorter side is rounded down, as the evaluation code of Vim, VMamba and timm does; of a
        crop that is not square, the longer side counts.
        """
        crop = (size, size) if isinstance(size, int) else size
        return cls(resize=int(max(crop) / _CROP_RATIO), crop=crop)

    def check(self, tensor: TensorInfo, sizes: Mapping[str, FreeSize]) -> None:
        """Refuse what images become if that is not what a model takes.

        Args:
            tensor: the model's one input.
            sizes: what its open sizes may be.

        Raises:
            ValueError: a value is out of its range, or the input has another size or type.
        """
        text = json.dumps({"preprocessing": dataclasses.asdict(self)})
        _preprocessing(Node.parse(text).at("preprocessing"))
        made = f"3 x {self.crop[0]} x {self.crop[1]}"
        if tensor.dtype != "float32" or not tensor.takes((1, 3, *self.crop), sizes):
            shape = " x ".join(map(str, tensor.shape[1:]))
            raise FieldError(
                f"preprocessing.crop={list(self.crop)} makes float32 of {made} of an image, but "
                f"the input {tensor.name} is {tensor.dtype} of {shape}{rules_of(sizes)}; give the "
                "crop the size that the model takes"
            )


@dataclass(frozen=True)
class ScheduleInfo:
    """What was pruned where. `blocks`: 1-based block -> keep ratio as a decimal string.

    `num_keep` has one entry a stage, the class token included; `cls_position` is the class token's
    position in the unpruned sequence, None without one; `seed` belongs to importance "random",
    `restore` to dense heads.
    """

    blocks: Mapping[int, str]
    alignment: str
    importance: str
    score_direction: str
    gated: bool
    conv: str
    step_parameters: str
    num_keep: tuple[int, ...]
    cls_position: int | None = None
    seed: int | None = None
    restore: str = "frozen"


@dataclass(frozen=True)
class MergeInfo:
    """What was merged where; the rules are `MergeSchedule`'s.

    `blocks` are 1-based, `num_keep` has the tokens after each of them, class token included;
    `restore` belongs to dense heads.
    """

    blocks: tuple[int, ...]
    num_keep: tuple[int, ...]
    r: int
    every: int
    start: int
    metric: str
    distance: str
    order: bool
    class_token: str
    choose: int
    mode: str
    alignment: str
    final_tokens: int | None = None
    restore: str = "group"


@dataclass(frozen=True)
class CheckpointInfo:
    """The checkpoint that the weights came from: its file name (no directory) and SHA-256.

    In place of the name a checkpoint from a hub has its address, hf://OWNER/REPO@COMMIT/FILE.
    """

    file: str
    sha256: str


@dataclass(frozen=True)
class CalibrationInfo:
    """What the ranges of activations were measured on: how, with what seed, and on which files.

    `images` are their SHA-256, so that nobody proves the model on them.
    """

    method: str
    seed: int
    images: tuple[str, ...]


@dataclass(frozen=True)
class QuantizationInfo:
    """How an export was quantised; the words are `QuantizeRequest`'s.

    Attributes:
        method: "static", "dynamic" or "weights".
        type: of weights, and with "static" of activations as well.
        target: the runtime that it is for.
        nodes: how many matrix products and convolutions are quantised.
        kept_float: names of those that are not.
        calibration: None where no images were used.
    """

    method: str
    type: str
    target: str
    nodes: int
    kept_float: tuple[str, ...]
    calibration: CalibrationInfo | None = None

    @property
    def in_tensorrt(self) -> bool:
        """Whether TensorRT takes the file.

        It knows signed pairs around 0 alone, and weights of four bits beside float16 alone.
        """
        return self.type != "int4" and (self.method == "weights" or self.target != "ort")

    @property
    def in_ort(self) -> bool:
        """Whether ONNX Runtime runs the file with its own settings.

        What is made for TensorRT has scales by channel that its integer products refuse.
        """
        return self.method == "weights" or self.target != "tensorrt"

    def __str__(self) -> str:
        return f"{self.type} {self.method} for {self.target}"


@dataclass(frozen=True)
class Manifest:
    """The whole of `model.json`.

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
    merge: MergeInfo | None = None
    block_outputs: tuple[BlockOutput, ...] = ()
    preprocessing: Preprocessing | None = None
    checkpoint: CheckpointInfo | None = None
    labels: tuple[str, ...] | None = None
    quantization: QuantizationInfo | None = None
    sizes: Mapping[str, FreeSize] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def precision(self) -> str:
        """The type of its numbers in words: "float16", or "float32, int8 static for ort"."""
        return self.dtype if self.quantization is None else f"{self.dtype}, {self.quantization}"

    @property
    def dense(self) -> bool:
        """Whether no tokens are pruned or merged."""
        return self.schedule is None and self.merge is None

    @property
    def tokens(self) -> str:
        """What becomes of the tokens, in words: "dense", "10:0.8 gap", "5 merged after 2, 4"."""
        parts = []
        if self.schedule is not None:
            ratios = ",".join(f"{block}:{ratio}" for block, ratio in self.schedule.blocks.items())
            parts.append(f"{ratios} {self.schedule.alignment}")
        if self.merge is not None:
            blocks = ", ".join(map(str, self.merge.blocks))
            aligned = "" if self.merge.alignment == "none" else f", {self.merge.alignment}"
            parts.append(f"{self.merge.r} merged after {blocks}{aligned}")
        return "; ".join(parts) or "dense"

    @property
    def fed(self) -> tuple[TensorInfo, ...]:
        """The inputs that a caller gives; a whole detector's second one has a default."""
        return self.inputs[:1] if self.gives_boxes else self.inputs

    @property
    def batch(self) -> int | str:
        """How many images the file takes at once: "batch" for any number."""
        sizes = [tensor.shape[0] for tensor in self.inputs if tensor.shape]
        return BATCH if BATCH in sizes else next(iter(sizes), 1)

    @property
    def main_output(self) -> TensorInfo:
        """The output that is compared and timed: `logits`, or the first where there are none."""
        return next((o for o in self.outputs if o.name == LOGITS), self.outputs[0])

    @property
    def gives_boxes(self) -> bool:
        """Whether it is a whole detector, from one image to the boxes of what is in it."""
        # In a module of the user's the name says nothing.
        return self.main_output.name == BOXES and MODULE_KEY not in self.config

    @property
    def num_classes(self) -> int:
        """How many classes the logits are of.

        Raises:
            ValueError: there is no output `logits` of shape (batch, classes).
        """
        found = self.main_output
        if found.name != LOGITS or len(found.shape) != 2:
            remedy = "run it by vssm.open_session"
            if MODULE_KEY in self.config:  # of a user's own, whose outputs can have other names
                remedy = "export the module again with --outputs logits=NAME"
            shapes = ", ".join(f"{o.name} {list(o.shape)}" for o in self.outputs)
            raise ValueError(
                f"the export of {self.name} has the outputs {shapes}, of which none is `logits` of "
                f"shape [batch, classes], so images cannot be classified by it; {remedy}"
            )
        return int(found.shape[1])


INTERPOLATIONS: Final = ("bicubic", "bilinear", "nearest")
FITS: Final = ("crop", "pad")
TENSOR_TYPES: Final = (*FLOAT_TYPES, "int64", "int32", "bool")
WEIGHTS: Final = ("checkpoint", "initial", "custom")
QUANTIZATION_METHODS: Final = ("static", "dynamic", "weights")
QUANTIZATION_TYPES: Final = ("int8", "int4", "fp8")
QUANTIZATION_TARGETS: Final = ("ort", "tensorrt", "portable")
CALIBRATIONS: Final = ("minmax", "percentile", "entropy")
BATCH: Final = "batch"
DETECTIONS: Final = "detections"
_LONGEST_NAME: Final = 256
_WORD: Final = re.compile(r"[^\W\d]\w*")
_COMPUTED: Final = frozenset({"Max", "Min", "Mod", "floor", "ceiling"})  # as sympy writes them
_LONGEST_LABEL: Final = 1024
MAX_CROP: Final = 4096  # pixels of a side: 192 MiB an image of float32
LOGITS: Final = "logits"  # the output that images are classified by
BOXES: Final = "boxes"  # the first output of a whole detector
SIZES: Final = "sizes"  # its second input: height and width before the image was padded
MODULE_KEY: Final = "module"  # of the config of a user's module
ROUNDING_KEY: Final = "rounding"  # there, how far it is in float32 from its exact outputs
MERGED_PAIRS: Final = "merged_pairs_"  # before the number of a merge: the output with its pairs
_LARGEST: Final = 1e6  # of a mean; float32 holds what is divided by a deviation's least
_MIN_SEED: Final = -(1 << 63)


def manifest_to_json(manifest: Manifest) -> str:
    """Text of `model.json`: the same manifest gives the same bytes.

    Raises:
        ValueError: a field is out of its range, or a value has no JSON form.
    """
    text = json.dumps(
        dataclasses.asdict(manifest), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False
    )
    try:
        # A value that no reader would take is told where it was made, not where it is opened.
        manifest_from_json(text)
    except FieldError as error:
        raise ValueError(f"manifest: {error}") from error
    return text + "\n"


def write_manifest(directory: str | os.PathLike[str], manifest: Manifest) -> Path:
    """Write `model.json` into `directory`, whole or not at all; return its path.

    Raises:
        ValueError: a field is out of its range.
        ArtifactError: the directory cannot be written.
    """
    path = Path(directory) / MANIFEST_NAME
    atomic_write_bytes(path, manifest_to_json(manifest).encode())
    return path


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check `model.json` of an exported directory.

    Raises:
        ArtifactError: it is missing, no JSON, of a newer format, or a field is wrong.
    """
    return read_json(
        Path(directory) / MANIFEST_NAME,
        _parse,
        absent=f"{directory} is not an export; name the directory that `vssm export -o` wrote",
        damaged="export the model again",
    )


def manifest_from_json(text: str) -> Manifest:
    """Parse and check the text of `model.json`.

    Raises:
        ValueError: no JSON, or a field (named) has a wrong type or value.
    """
    return _parse(Node.parse(text))


def _parse(root: Node) -> Manifest:
    # First: of a newer format nothing else can be judged.
    version = root.at("format_version").format_version(FORMAT_VERSION)
    # Files from before sizes could be open do not have them.
    members = root.at("sizes").entries() if "sizes" in root.mapping() else []
    sizes = {name: _free_size(node) for name, node in members}
    manifest = Manifest(
        name=root.at("name").text(_LONGEST_NAME),
        config=root.at("config").mapping(),
        inputs=tuple(_tensor(node, sizes) for node in root.at("inputs").items(at_least=1)),
        outputs=tuple(_tensor(node, sizes) for node in root.at("outputs").items(at_least=1)),
        dtype=root.at("dtype").choice(FLOAT_TYPES),
        # 18 is the oldest that `vssm export` writes.
        opset=root.at("opset").integer(18),
        files={n: node.sha256() for n, node in root.at("files").entries(file_names=True)},
        operators={n: node.integer(1) for n, node in root.at("operators").entries()},
        versions={n: node.text(_LONGEST_NAME) for n, node in root.at("versions").entries()},
        weights=root.at("weights").choice(WEIGHTS),
        schedule=root.at("schedule").optional(_schedule),
        # Files from before there was merging do not have it.
        merge=root.at("merge").optional(_merge) if "merge" in root.mapping() else None,
        block_outputs=tuple(_block_output(node) for node in root.at("block_outputs").items()),
        preprocessing=root.at("preprocessing").optional(_preprocessing),
        checkpoint=root.at("checkpoint").optional(_checkpoint),
        labels=root.at("labels").optional(
            lambda n: tuple(i.text(_LONGEST_LABEL) for i in n.items())
        ),
        quantization=_quantization(root),
        sizes=sizes,
        format_version=version,
    )
    if MODULE_KEY in manifest.config and ROUNDING_KEY in manifest.config:
        # A module whose two answers are further apart is not exported.
        root.at("config").at(ROUNDING_KEY).optional(lambda node: node.number(0.0, 1e-2))
    _check_together(manifest)
    return manifest


def _tensor(node: Node, sizes: Mapping[str, FreeSize]) -> TensorInfo:
    shape: list[int | str] = []
    for axis, size in enumerate(node.at("shape").items()):
        text = size.value if isinstance(size.value, str) else ""
        words = set(_WORD.findall(text))
        # Sizes are the batch and what `sizes` names, or computed from these, such as height//4;
        # every other size was fixed by the export.
        computed = words & sizes.keys() and words <= {*sizes, *_COMPUTED, BATCH}
        counted = axis == 0 and text in {BATCH, DETECTIONS}
        is_open = counted or (computed and len(text) <= _LONGEST_NAME)
        shape.append(text if is_open else size.integer(1))
    return TensorInfo(node.at("name").name(), node.at("dtype").choice(TENSOR_TYPES), tuple(shape))


def _free_size(node: Node) -> FreeSize:
    return FreeSize(
        node.at("example").integer(1),
        node.at("multiple").integer(1),
        node.at("minimum").integer(1),
    )


def _block_output(node: Node) -> BlockOutput:
    residual = node.at("residual").optional(Node.name)
    return BlockOutput(node.at("block").integer(1), node.at("hidden").name(), residual)


def _preprocessing(node: Node) -> Preprocessing:
    height, width = (n.integer(1, MAX_CROP) for n in node.at("crop").items(exactly=2))
    r, g, b = (n.number(-_LARGEST, _LARGEST) for n in node.at("mean").items(exactly=3))
    std_r, std_g, std_b = (
        n.number(1 / _LARGEST, _LARGEST) for n in node.at("std").items(exactly=3)
    )
    # Files from before there were whole detectors do not have it.
    fit = node.at("fit").choice(FITS) if "fit" in node.mapping() else "crop"
    return Preprocessing(
        # A shorter side below the crop's would let the crop reach outside the image.
        resize=node.at("resize").integer(1 if fit == "pad" else max(height, width), 2 * MAX_CROP),
        crop=(height, width),
        interpolation=node.at("interpolation").choice(INTERPOLATIONS),
        mean=(r, g, b),
        std=(std_r, std_g, std_b),
        fit=fit,
    )


def _checkpoint(node: Node) -> CheckpointInfo:
    return CheckpointInfo(node.at("file").text(), node.at("sha256").sha256())


def _schedule(node: Node) -> ScheduleInfo:
    blocks = {n.key_integer(1): n.keep_ratio() for _, n in node.at("blocks").entries(at_least=1)}
    num_keep = tuple(n.integer(1) for n in node.at("num_keep").items(exactly=len(blocks)))
    if list(num_keep) != sorted(num_keep, reverse=True):
        raise FieldError(f"{node.path}.num_keep={list(num_keep)} grows, but tokens never come back")
    # Files of the first releases call score_direction "source", and the convolution "grid".
    old, conv = "source" in node.mapping(), node.at("conv").text()
    return ScheduleInfo(
        blocks=dict(sorted(blocks.items())),
        alignment=node.at("alignment").text(),
        importance=node.at("importance").text(),
        score_direction=node.at("source" if old else "score_direction").text(),
        gated=node.at("gated").flag(),
        conv="position" if old and conv == "grid" else conv,
        step_parameters=node.at("step_parameters").text(),
        num_keep=num_keep,
        cls_position=node.at("cls_position").optional(lambda n: n.integer(0)),
        seed=node.at("seed").optional(lambda n: n.integer(_MIN_SEED)),
        # Files from before there were dense models do not have it.
        restore=node.at("restore").text() if "restore" in node.mapping() else "frozen",
    )


def _merge(node: Node) -> MergeInfo:
    blocks = tuple(n.integer(1) for n in node.at("blocks").items())
    num_keep = tuple(n.integer(1) for n in node.at("num_keep").items(exactly=len(blocks)))
    for name, found in (("blocks", blocks), ("num_keep", num_keep[::-1])):
        if list(found) != sorted(set(found)):
            raise FieldError(
                f"{node.path}.{name}: merges follow one another and each takes tokens away"
            )
    return MergeInfo(
        blocks=blocks,
        num_keep=num_keep,
        r=node.at("r").integer(0),
        every=node.at("every").integer(1),
        start=node.at("start").integer(1),
        metric=node.at("metric").text(),
        distance=node.at("distance").text(),
        order=node.at("order").flag(),
        class_token=node.at("class_token").text(),
        choose=node.at("choose").integer(1),
        mode=node.at("mode").text(),
        alignment=node.at("alignment").text(),
        final_tokens=node.at("final_tokens").optional(lambda n: n.integer(1)),
        # Files from before dense models could merge do not have it.
        restore=node.at("restore").text() if "restore" in node.mapping() else "group",
    )


def _quantization(root: Node) -> QuantizationInfo | None:
    # Files from before there was quantisation do not have it.
    if "quantization" not in root.mapping():
        return None
    return root.at("quantization").optional(
        lambda node: QuantizationInfo(
            method=node.at("method").choice(QUANTIZATION_METHODS),
            type=node.at("type").choice(QUANTIZATION_TYPES),
            target=node.at("target").choice(QUANTIZATION_TARGETS),
            nodes=node.at("nodes").integer(1),
            kept_float=tuple(n.text() for n in node.at("kept_float").items()),
            calibration=node.at("calibration").optional(_calibration),
        )
    )


def _calibration(node: Node) -> CalibrationInfo:
    return CalibrationInfo(
        method=node.at("method").choice(CALIBRATIONS),
        seed=node.at("seed").integer(0),
        images=tuple(n.sha256() for n in node.at("images").items(at_least=1)),
    )


def _check_together(manifest: Manifest) -> None:
    """Rules that span fields."""
    names = [t.name for t in (*manifest.inputs, *manifest.outputs)]
    if len(set(names)) != len(names):
        raise FieldError(f"inputs and outputs name a value twice: {names}")
    if (manifest.weights == "checkpoint") != (manifest.checkpoint is not None):
        raise FieldError(
            f"weights={manifest.weights!r} and checkpoint={manifest.checkpoint} contradict each "
            "other"
        )
    quantized = manifest.quantization
    if quantized is not None and (quantized.method == "static") != (
        quantized.calibration is not None
    ):
        raise FieldError(
            f"quantization.method={quantized.method!r} and calibration="
            f"{quantized.calibration is not None} contradict each other"
        )
    if manifest.preprocessing is not None:
        if len(manifest.fed) > 1:
            fed = ", ".join(tensor.name for tensor in manifest.fed)
            raise FieldError(f"preprocessing makes one input of an image, but there are {fed}")
        manifest.preprocessing.check(manifest.fed[0], manifest.sizes)
    main = manifest.main_output
    # Of maps (batch, classes, height, width) the second axis, else the last.
    axis = 1 if len(main.shape) == 4 else -1
    classes = main.shape[axis] if main.shape and main.name == LOGITS else None
    if manifest.gives_boxes:
        classes = manifest.config.get("num_classes")
    if manifest.labels is not None and len(manifest.labels) != classes:
        raise FieldError(f"labels has {len(manifest.labels)} names for {classes} classes")
