"""A model to `model.onnx` and `model.json`: torch.export, graph passes, fallback bodies last."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from vssm.artifact.data_sets import names_of
from vssm.artifact.directory import WEIGHTS_FILE, Artifact, staged_export
from vssm.artifact.manifest import (
    BOXES,
    DETECTIONS,
    LOGITS,
    MERGED_PAIRS,
    SIZES,
    Preprocessing,
    TensorInfo,
    write_manifest,
)
from vssm.checkpoints.load import save_safetensors
from vssm.checkpoints.wrapped import refuse_packed, refuse_replaced, refuse_wrapper
from vssm.errors import UnsupportedError, check_several
from vssm.files.atomic import sha256_of
from vssm.files.progress import automatic, shows_progress
from vssm.files.text import is_plain, shown
from vssm.models import model_from_config
from vssm.models.base import VisionModel
from vssm.models.blocks import counted_blocks
from vssm.models.dense.detector import Detector
from vssm.onnx.describe import block_outputs, describe_export
from vssm.onnx.options import check_opset, checked_dtype, checked_outputs
from vssm.onnx.program import (
    BATCH,
    TRACING,
    program_to_proto,
)
from vssm.onnx.save import EXTERNAL_DATA_ABOVE, save_model
from vssm.onnx.schemas import register_schemas
from vssm.onnx.trace import quick_traces, quiet
from vssm.ops.ambient import known_state
from vssm.pruning.schedule import MergeSchedule, MergeStage, Schedule
from vssm.types import Steps

DTYPES: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
INPUT: Final = "images"
_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


@shows_progress
@known_state()
def export(
    model: VisionModel,
    directory: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    outputs: str | None = None,
    opset: int = 18,
    inline: bool = False,
    weights: bool = True,
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] | None = None,
    external_data_above: int = EXTERNAL_DATA_ABOVE,
    force: bool = False,
    progress: Steps = automatic,
) -> Artifact:
    """Write the model as one ONNX file for every runtime, and beside it what `check` needs.

    Args:
        model: a model of `create_model`; it is left as it was.
        directory: where model.onnx, model.json and weights.safetensors go.
        dtype: float32, float16 (fp16, half) or bfloat16 (bf16), of the projections and scan
            operands; norms, residual, A, D, step-size bias, decay and state are float32 in all of
            them, and so are input and logits.
        outputs: of a segmenter "logits"; "labels", the class of every pixel beside them; or
            "features", the levels that its head reads, without the head. Of a detector "features";
            "dense", with the logits and box deltas of every anchor; or "boxes", what is in one
            image. None for the first of them.
        opset: version of the standard operators, 18 to 20.
        inline: also write model.inlined.onnx, without functions, for runtimes that read none.
        weights: also write weights.safetensors, the oracle of `vssm check`.
        preprocessing: how images become inputs; None for the official evaluation at this size.
        labels: a name for every class; None for those that came with the checkpoint, else those of
            the data set that the model's name ends with, if it has that many classes.
        external_data_above: bytes of weights beyond which they go to model.onnx.data, as protobuf
            reads no file above 2 GiB.
        force: replace the export that `directory` holds.
        progress: called with how far it is; a bar in a terminal or a notebook by default.

    Raises:
        TypeError: `model` is not one of this package's models, or a wrapper around one.
        ValueError: `dtype`, `outputs`, `opset` or `labels` does not fit; the weights are not those
            of the model's configuration (parametrised or packed ones, say), on no real device, or
            not finite in `dtype`.
        UnsupportedError: the schedule has no exported form (alignment "masked", and switches of
            merging that no published model has).
        ArtifactError: the directory cannot be written, or holds an export and not `force`.
    """
    dtype = checked_dtype(dtype)
    given, labels = labels, getattr(model, "labels", None) if labels is None else labels
    _refuse(model, opset, labels)
    if preprocessing is not None:
        preprocessing.check(TensorInfo(INPUT, "float32", (BATCH, 3, *model.image_size)), {})
    if labels is None:
        labels = names_of(model.name, model.num_classes)
    outputs = checked_outputs(model.task, outputs)
    if not {LOGITS, BOXES}.intersection(model.output_groups[outputs]):
        if given:
            raise ValueError(
                f"labels={len(given)} names with outputs={outputs!r}, which has no classes that "
                "they could name; leave the labels out"
            )
        labels = None  # those of the checkpoint, or of the data set
    initial = _initial_weights(model)
    with staged_export(directory, force=force) as staging:
        proto = build_proto(model, dtype=dtype, opset=opset, outputs=outputs, progress=progress)
        save_model(proto, staging, inline=inline, external_data_above=external_data_above)
        if weights:
            state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
            wide = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
            save_safetensors(wide, staging / WEIGHTS_FILE, labels=labels)
        manifest = describe_export(
            model,
            proto,
            dtype=dtype,
            preprocessing=preprocessing,
            labels=labels,
            files={path.name: sha256_of(path) for path in sorted(staging.iterdir())},
            initial=initial,
        )
        write_manifest(staging, manifest)
    return Artifact(Path(directory).absolute(), manifest)


def build_proto(
    model: VisionModel,
    *,
    dtype: str,
    opset: int,
    outputs: str | None = None,
    progress: Steps = lambda *_: None,
) -> onnx.ModelProto:
    """The model as a ModelProto with dynamic batch, custom nodes at top level and their bodies.

    Args:
        model: left as it was.
        dtype: one of DTYPES.
        opset: 18 to 20.
        outputs: as for `export`.
        progress: as for `export`.
    """
    register_schemas()
    outputs = checked_outputs(model.task, outputs)
    traced = _Traced(_cast_copy(model, DTYPES[dtype]), outputs)
    with counted_blocks(traced.model, progress, TRACING):
        program = _trace(traced, model.image_size)
    proto = program_to_proto(
        program,
        opset,
        inputs=[INPUT, SIZES] if traced.whole else [INPUT],
        names=traced.output_names(),
        public=traced.public,
        free={} if traced.whole else {0: BATCH},
        progress=progress,
    )
    if traced.whole:
        _finish_detector(proto, model.image_size)
    return proto


class _Traced(nn.Module):
    """What is traced: public outputs first, then every block's streams, to be named."""

    def __init__(self, model: VisionModel, outputs: str) -> None:
        super().__init__()
        self.model, self.outputs = model, model.output_groups[outputs]
        # Of a whole detector the dense part has names inside the graph, so that it can be checked.
        self.whole = isinstance(model, Detector) and outputs == BOXES
        self.inner = model.output_groups["dense"] if self.whole else ()
        stages = model.stages.values()
        self.kept = [f"kept_positions_{i}" for i in range(len(stages))]
        merges = sum(isinstance(stage, MergeStage) for stage in stages)
        self.pairs = [f"{MERGED_PAIRS}{i}" for i in range(merges)]
        self.public = len(self.outputs) + len(stages) + merges

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        found = self.model.forward_details(images, with_blocks=True)
        if isinstance(self.model, Detector) and sizes is not None:
            found = self.model.detected(found, sizes)
        # Each output its own value: a stage's choice may be an input of the next.
        return (
            *(self.model.output(name, found) for name in self.outputs),
            *(kept.clone() for kept in found.kept_positions),
            # Not copies: a parity check puts other pairs in their place.
            *(merge.pairs for merge in found.merges),
            *(self.model.output(name, found) for name in self.inner),
            *(stream for block in found.blocks for stream in block if stream is not None),
        )

    def output_names(self) -> list[str]:
        streams = [
            name
            for block in block_outputs(self.model)
            for name in (block.hidden, block.residual)
            if name is not None
        ]
        return [*self.outputs, *self.kept, *self.pairs, *self.inner, *streams]


def _refuse(model: VisionModel, opset: int, labels: Sequence[str] | None) -> None:
    refuse_wrapper(model)
    if not isinstance(model, VisionModel):
        raise TypeError(
            f"model={type(model).__name__} is not a model of this package; make it with "
            "vssm.create_model"
        )
    check_opset(opset)
    if model.schedule is not None and model.schedule.alignment == "masked":
        raise UnsupportedError(
            "alignment='masked' keeps every token and is a PyTorch reference only; export with "
            "alignment='gap', 'constant' or 'none'"
        )
    _refuse_merging(model.schedule)
    check_several(labels=labels)
    if labels is not None and len(labels) != model.num_classes:
        raise ValueError(
            f"labels={len(labels)} for {model.num_classes} classes; give one label a class"
        )
    if foreign := [label for label in labels or () if not is_plain(label)]:
        raise ValueError(
            f"labels hold {shown(repr(foreign[0]), limit=80)}, with control or invisible "
            "characters; take them out"
        )


def _refuse_merging(schedule: Schedule | None) -> None:
    if not isinstance(schedule, MergeSchedule):
        return
    if schedule.mode not in {"sum", "drop"} or not schedule.order:
        raise UnsupportedError(
            f"mode={schedule.mode!r}, order={schedule.order}: switches of the published code that "
            "no published model has, and a PyTorch reference only; export with mode='sum' or "
            "'drop', and order=True"
        )


def _initial_weights(model: VisionModel) -> bool:
    """Whether the weights are the seeded ones of `create_model`; they must fit its configuration.

    A model whose head was replaced, say, would be exported under a configuration that is not its.
    """
    refuse_packed(model)
    state = model.state_dict()
    if meta := [key for key, value in state.items() if value.is_meta]:
        raise ValueError(
            f"model: {len(meta)} weights, {meta[0]} the first, are on device meta, which holds no "
            "values; create the model on a real device and load its weights"
        )
    with torch.device("cpu"):
        seeded = model_from_config(model.name, asdict(model.config), model.schedule).state_dict()
    refuse_replaced(model, seeded)
    shapes, wanted = ({k: tuple(v.shape) for k, v in s.items()} for s in (state, seeded))
    for key in sorted({*shapes, *wanted}):
        if shapes.get(key) != wanted.get(key):
            raise ValueError(
                f"model: {key} has shape {shapes.get(key)}, but {model.name} with its "
                f"configuration {wanted.get(key)}; create the model with the options that fit, "
                "such as num_classes, and load the weights into it"
            )
    return all(torch.equal(value.to(state[k].dtype), state[k].cpu()) for k, value in seeded.items())


def _cast_copy(model: VisionModel, dtype: torch.dtype) -> VisionModel:
    """A copy on the CPU in eval mode, its projections in `dtype`, its islands in float32.

    ONNX has no bfloat16 convolution before opset 22: there they are islands too.

    Raises:
        ValueError: a weight is NaN, infinite, or beyond the range of its dtype.
    """
    twin = copy.deepcopy(model).cpu().eval().float().use_backend("auto")
    for owner, module in twin.named_modules():
        if dtype == torch.bfloat16 and isinstance(module, _CONVOLUTIONS):
            continue
        for name, parameter in module.named_parameters(owner, recurse=False):
            if not twin.stays_wide(name):
                parameter.data = parameter.data.to(dtype)
    bad = [key for key, value in twin.state_dict().items() if not bool(value.isfinite().all())]
    if bad:
        raise ValueError(
            f"model: NaN, infinity, or values beyond {dtype} in {', '.join(bad[:6])} ({len(bad)} "
            "in all); mend them, or export float32 if they are only too large"
        )
    return twin


def _trace(traced: _Traced, image_size: tuple[int, int]) -> ExportedProgram:
    # A batch that may have any size must not be traced with 1, which is a size of its own.
    batch = 1 if traced.whole else 2
    example = torch.zeros(batch, 3, *image_size, dtype=torch.float32, device="cpu")
    with torch.no_grad(), quiet(), quick_traces():
        if traced.whole:
            return torch.export.export(traced, (example, torch.tensor([image_size])))
        batches = {INPUT: {0: torch.export.Dim(BATCH)}}
        return torch.export.export(traced, (example,), dynamic_shapes=batches)


def _finish_detector(proto: onnx.ModelProto, image_size: tuple[int, int]) -> None:
    """Call the open size of what is found "detections", and give the second input a default.

    An initialiser of an input's name is what it holds where it is not fed: a whole image.
    """
    found = proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == found:
                dim.dim_param = DETECTIONS
    default = np.array([image_size], np.int64)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(default, SIZES))
