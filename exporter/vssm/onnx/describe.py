"""`model.json` of an export: what the model and its graph say of themselves."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict
from typing import Protocol

import onnx

from vssm._version import __version__
from vssm.artifact.manifest import BlockOutput, Manifest, Preprocessing, ScheduleInfo, TensorInfo
from vssm.models.base import VisionModel
from vssm.ops.spec import DOMAIN, OPERATOR_VERSION
from vssm.pruning.schedule import PruneSchedule, Stage, TokenLayout


def used_operators(proto: onnx.ModelProto) -> list[str]:
    """Names of our operators in the graph, sorted."""
    return sorted({node.op_type for node in proto.graph.node if node.domain == DOMAIN})


def block_outputs(model: VisionModel) -> tuple[BlockOutput, ...]:
    """Value names of what each block returns, as the graph and model.json have them."""
    return tuple(
        BlockOutput(
            block,
            f"block_{block}.hidden",
            f"block_{block}.residual" if model.residual_stream else None,
        )
        for block in range(1, model.traced_blocks + 1)
    )


def describe_export(
    model: VisionModel,
    proto: onnx.ModelProto,
    *,
    dtype: str,
    preprocessing: Preprocessing | None,
    labels: Sequence[str] | None,
    files: dict[str, str],
    initial: bool,
) -> Manifest:
    """The manifest of an export: `files` maps the names written beside it to their hashes.

    `initial` says whether the weights are the seeded ones of `create_model`.
    """
    origin = "initial" if initial else "custom"
    packages = ("torch", "onnx", "onnxscript", "numpy")
    return Manifest(
        name=model.name,
        config=asdict(model.config),
        inputs=tuple(map(describe_tensor, proto.graph.input)),
        outputs=tuple(map(describe_tensor, proto.graph.output)),
        dtype=dtype,
        opset=proto.opset_import[0].version,
        files=files,
        operators=dict.fromkeys(used_operators(proto), OPERATOR_VERSION),
        versions={
            "vssm": __version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
        weights=origin if model.checkpoint is None else "checkpoint",
        schedule=describe_schedule(model),
        block_outputs=block_outputs(model),
        preprocessing=preprocessing or Preprocessing.for_image_size(model.image_size),
        checkpoint=model.checkpoint,
        labels=None if labels is None else tuple(labels),
    )


def describe_tensor(value: onnx.ValueInfoProto) -> TensorInfo:
    """A graph input or output as model.json has it."""
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return TensorInfo(value.name, str(dtype), shape)


class Scheduled(Protocol):
    """What has a schedule: a model of this package, or a pruned module of the user's."""

    schedule: PruneSchedule | None
    layout: TokenLayout | None
    stages: dict[int, Stage]


def describe_schedule(model: Scheduled) -> ScheduleInfo | None:
    """What was pruned where, as model.json has it; None for a dense model."""
    schedule: PruneSchedule | None = model.schedule
    if schedule is None or model.layout is None:
        return None
    return ScheduleInfo(
        blocks={b: f"{ratio.normalize():f}" for b, ratio in schedule.ratios.items()},
        alignment=schedule.alignment,
        importance=schedule.importance,
        score_direction=schedule.score_direction,
        gated=schedule.gated,
        conv=schedule.conv,
        step_parameters=schedule.step_parameters,
        num_keep=tuple(stage.num_keep for stage in model.stages.values()),
        cls_position=model.layout.cls_index,
        seed=schedule.seed if schedule.importance == "random" else None,
    )
