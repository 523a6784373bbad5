"""`vssm export` as a function: a name and options to an exported directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vssm.artifact.directory import Artifact
from vssm.artifact.preprocessing import read_labels
from vssm.bench.measure import Progress
from vssm.training.idle_options import refuse_idle_options


@dataclass(frozen=True)
class ExportRequest:
    """What `vssm export` was asked for; the fields are its options."""

    name: str
    checkpoint: Path | None = None
    source: str = "model"
    schedule: str | None = None
    alignment: str | None = None
    importance: str | None = None
    conv: str | None = None
    dtype: str = "float32"
    opset: int = 18
    num_classes: int = 1000
    options: Mapping[str, Any] = field(default_factory=dict)
    labels: Path | None = None
    inline: bool = False
    weights: bool = True
    force: bool = False


def export_model(
    request: ExportRequest, directory: Path, *, progress: Progress = lambda _: None
) -> Artifact:
    """Build, load, export; nothing is written unless all of it succeeds.

    Raises:
        ValueError, VssmError: as `create_model`, `load_checkpoint` and `export` do.
    """
    from vssm.checkpoints.load import load_checkpoint
    from vssm.models import create_model
    from vssm.models.schedules import named_schedule
    from vssm.onnx.export import export

    rules = {name: getattr(request, name) for name in ("alignment", "importance", "conv")}
    refuse_idle_options(
        schedule=request.schedule,
        checkpoint=request.checkpoint,
        source=request.source,
        model_options=request.options,
        **rules,
    )
    schedule = named_schedule(request.name, request.schedule, **rules)
    progress(f"building {request.name}")
    model = create_model(
        request.name, schedule=schedule, num_classes=request.num_classes, **request.options
    )
    labels = None if request.labels is None else read_labels(request.labels, request.num_classes)
    if request.checkpoint is not None:
        progress(f"loading {request.checkpoint}")
        load_checkpoint(model, request.checkpoint, source=request.source)
    progress("tracing and writing")
    return export(
        model,
        directory,
        dtype=request.dtype,
        opset=request.opset,
        inline=request.inline,
        weights=request.weights,
        labels=labels,
        force=request.force,
    )
