"""`model.json` of an export: what the model and its graph say of themselves."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

import onnx

from vssm._version import __version__
from vssm.artifact.manifest import (
    BlockOutput,
    Manifest,
    MergeInfo,
    Preprocessing,
    ScheduleInfo,
    TensorInfo,
)
from vssm.models.base import VisionModel
from vssm.ops.spec import DOMAIN, OPERATOR_VERSION, SCAN_OPERATORS
from vssm.pruning.schedule import MergeSchedule, MergeStage, Schedule, Stage, TokenLayout


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
        merge=describe_merges(model),
        block_outputs=block_outputs(model),
        preprocessing=preprocessing or model.preprocessing(),
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

    @property
    def schedule(self) -> Schedule | None:
        """What prunes or merges; None for a dense model."""

    @property
    def layout(self) -> TokenLayout | None:
        """The tokens before that; None for models that cannot prune."""

    @property
    def stages(self) -> Mapping[int, Stage | MergeStage]:
        """The schedule's stages by block."""


def describe_schedule(model: Scheduled) -> ScheduleInfo | None:
    """What was pruned where, as model.json has it; None where nothing is."""
    schedule = model.schedule.prune if isinstance(model.schedule, MergeSchedule) else model.schedule
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
        restore=schedule.restore,
        num_keep=tuple(s.num_keep for s in model.stages.values() if isinstance(s, Stage)),
        cls_position=model.layout.cls_index,
        seed=schedule.seed if schedule.importance == "random" else None,
    )


def describe_merges(model: Scheduled) -> MergeInfo | None:
    """What was merged where, as model.json has it; None where nothing is."""
    if not isinstance(model.schedule, MergeSchedule):
        return None
    rules = {f.name: getattr(model.schedule, f.name) for f in fields(model.schedule)}
    del rules["prune"]  # has a description of its own
    merges = {block: s for block, s in model.stages.items() if isinstance(s, MergeStage)}
    return MergeInfo(
        blocks=tuple(merges), num_keep=tuple(s.num_keep for s in merges.values()), **rules
    )


@dataclass(frozen=True)
class NodeCount:
    """How many scans of this package a file has, in how many modules, and all its nodes.

    Attributes:
        scans: scan nodes.
        mixers: modules that those are in.
        blocks: entries of lists and sequences that those are in, the innermost around each; a
            module that is in none counts for itself.
        nodes: all nodes.
    """

    scans: int
    mixers: int
    blocks: int
    nodes: int


def count_by_module(path: Path) -> NodeCount:
    """Count a file's nodes by the modules that their names say."""
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    names = {op.name for op in SCAN_OPERATORS}
    scans = [node.name for node in nodes if node.domain == DOMAIN and node.op_type in names]
    # A node is called after the module that ran it.
    mixers = {name.rpartition("/")[0] for name in scans}
    return NodeCount(len(scans), len(mixers), len(set(map(_block, mixers))), len(nodes))


def _block(mixer: str) -> str:
    """`/stages.1/blocks.0` of `/stages.1/blocks.0/mixer`."""
    parts = mixer.split("/")
    while parts and not parts[-1].rpartition(".")[2].isdecimal():
        parts.pop()
    return "/".join(parts) or mixer
