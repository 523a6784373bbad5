"""`vssm export-module` as a function: a factory in the user's repository to an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vssm.artifact.directory import Artifact
from vssm.artifact.manifest import CheckpointInfo, Preprocessing
from vssm.artifact.preprocessing import read_labels
from vssm.bench.measure import Progress
from vssm.pruning.schedule import PruneSchedule
from vssm.training.idle_options import refuse_idle_options


@dataclass(frozen=True)
class ModuleRequest:
    """What `vssm export-module` was asked for; the fields are its options."""

    target: str
    input_shape: tuple[int, ...]
    integers: int | None = None
    checkpoint: Path | None = None
    source: str = "model"
    options: Mapping[str, Any] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()
    prefer: str = "ours"
    schedule: str | None = None
    alignment: str | None = None
    importance: str | None = None
    conv: str | None = None
    blocks: str = "layers"
    cls_index: int | None = None
    imagenet: bool = False
    labels: Path | None = None
    opset: int = 18
    inline: bool = False
    force: bool = False


@dataclass(frozen=True)
class ModuleExport:
    """The export, what stood in for upstream's packages, and what was loaded, in words."""

    artifact: Artifact
    upstream: str
    loaded: str | None


def export_user_module(
    request: ModuleRequest, directory: Path, *, progress: Progress = lambda _: None
) -> ModuleExport:
    """Import, build, load, prune, export. It runs the code that the target names.

    Raises:
        ValueError, VssmError: as `build_from`, `load_checkpoint`, `prune` and `export_module` do.
    """
    import torch

    from vssm.checkpoints.load import load_checkpoint
    from vssm.compat import upstream
    from vssm.compat.export import export_module
    from vssm.compat.factory import build_from, search_path
    from vssm.compat.prune import prune

    _check(request)
    loaded = None
    with search_path(request.target, request.paths), upstream(prefer=request.prefer) as report:
        progress(f"importing {request.target}")
        torch.manual_seed(0)
        model: Any = build_from(request.target, request.options)
        checkpoint = None
        if request.checkpoint is not None:
            progress(f"loading {request.checkpoint}")
            found = load_checkpoint(model, request.checkpoint, source=request.source)
            checkpoint, loaded = CheckpointInfo(request.checkpoint.name, found.sha256), str(found)
        example = _example(request)
        if request.schedule is not None:
            progress("pruning")
            schedule = PruneSchedule.parse(
                request.schedule,
                alignment=request.alignment or "gap",
                importance=request.importance or "clip",
                conv=request.conv or "compact",
            )
            model = prune(
                model, schedule, example, blocks=request.blocks, cls_index=request.cls_index
            )
        progress("tracing and writing")
        artifact = export_module(
            model,
            example,
            directory,
            name=request.target.rpartition(":")[2],
            opset=request.opset,
            inline=request.inline,
            preprocessing=_preprocessing(request),
            labels=None if request.labels is None else _labels(request.labels, model, example),
            checkpoint=checkpoint,
            force=request.force,
        )
    return ModuleExport(artifact, str(report), loaded)


def _check(request: ModuleRequest) -> None:
    refuse_idle_options(
        schedule=request.schedule,
        checkpoint=request.checkpoint,
        source=request.source,
        alignment=request.alignment,
        importance=request.importance,
        conv=request.conv,
        cls_index=request.cls_index,
    )


def _example(request: ModuleRequest) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    if request.integers is not None:
        return torch.randint(request.integers, request.input_shape, generator=generator)
    return torch.randn(request.input_shape, generator=generator)


def _labels(path: Path, model: Any, example: Any) -> tuple[str, ...]:
    """As many names as the model's first output is wide."""
    import torch

    from vssm.compat.outputs import public_outputs

    with torch.inference_mode():
        logits = public_outputs()(model, example)["logits"]
    return read_labels(path, int(logits.shape[-1]))


def _preprocessing(request: ModuleRequest) -> Preprocessing | None:
    if not request.imagenet:
        return None
    if len(request.input_shape) != 4 or request.input_shape[1] != 3:
        raise ValueError(
            f"--imagenet with input {request.input_shape}: images are batch x 3 x height x width"
        )
    return Preprocessing.for_image_size((request.input_shape[2], request.input_shape[3]))
