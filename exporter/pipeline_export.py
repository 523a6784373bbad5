"""`vssm export` as a function: a name and options to an exported directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.artifact import Artifact
from exporter.benchmark import Progress
from exporter.preprocessing import read_labels


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
    from exporter.checkpoint import load_checkpoint
    from exporter.models import create_model
    from exporter.models.schedules import named_schedule
    from exporter.onnx_export import export

    _refuse_idle_options(request)
    schedule = named_schedule(
        request.name,
        request.schedule,
        alignment=request.alignment,
        importance=request.importance,
        conv=request.conv,
    )
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


def _refuse_idle_options(request: ExportRequest) -> None:
    """What would change nothing, or be said twice, was meant otherwise."""
    for option in ("alignment", "importance", "conv"):
        if getattr(request, option) is not None and request.schedule is None:
            raise ValueError(
                f"{option}={getattr(request, option)!r} without a schedule prunes nothing; give "
                "--schedule BLOCK:RATIO,... too, or leave it out"
            )
    if request.source != "model" and request.checkpoint is None:
        raise ValueError(f"source={request.source!r} without a checkpoint; give --checkpoint FILE")
    if "num_classes" in request.options:
        raise ValueError("--set num_classes: this option has a name of its own; --num-classes N")
