"""One set of weights that is pruned in several ways: by a model's name or from an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact import open_artifact
from exporter.manifest_types import Preprocessing

if TYPE_CHECKING:
    from exporter.models import VisionModel
    from exporter.schedule import PruneSchedule


@dataclass(frozen=True)
class SubjectRequest:
    """What a command was asked for; the fields are its options.

    `source` is one of `vssm models`, or the directory of an export; a directory of a model's name
    is written ./NAME. `schedule` is BLOCK:RATIO,..., "default" or None: the export's own.
    """

    source: str
    checkpoint: Path | None = None
    ema: bool = False
    schedule: str | None = None
    num_classes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, str] = field(default_factory=dict)  # alignment and importance, where given


@dataclass(frozen=True)
class Subject:
    """Weights, the configuration they belong to, and how they are to be pruned.

    Attributes:
        name: the model's name.
        config: the family's configuration.
        state: its tensors, which every variant shares.
        weights: where they come from, for reports.
        schedule: how to prune; None for the dense model.
        preprocessing: how images are prepared.
        labels: class names, where the export has them.
    """

    name: str
    config: Mapping[str, Any]
    state: Mapping[str, Any]
    weights: str
    schedule: PruneSchedule | None
    preprocessing: Preprocessing
    labels: Sequence[str] | None

    def variant(self, schedule: PruneSchedule | None) -> VisionModel:
        """The model with these weights and another schedule; the tensors are shared.

        Raises:
            ValueError, UnsupportedError: the schedule does not fit the model.
        """
        from exporter.models import model_from_config

        model = model_from_config(self.name, self.config, schedule)
        model.load_state_dict(self.state, assign=True)
        return model.eval()


def open_subject(request: SubjectRequest) -> Subject:
    """Find the weights and the schedule.

    Raises:
        ValueError: the source is neither, or an option does not belong to it.
        ArtifactError, CheckpointError: the export or the checkpoint cannot be used.
    """
    from exporter.models import list_models

    if request.source in list_models():
        return _by_name(request)
    if not Path(request.source).is_dir():
        raise ValueError(
            f"source={request.source!r} is neither a model nor the directory of an export; see "
            "`vssm models`, or write one with `vssm export`"
        )
    return _from_export(request)


def _by_name(request: SubjectRequest) -> Subject:
    from exporter.checkpoint import load_checkpoint
    from exporter.models import create_model

    classes = 1000 if request.num_classes is None else request.num_classes
    model = create_model(request.source, num_classes=classes, **request.options)
    if request.checkpoint is not None:
        load_checkpoint(model, request.checkpoint, source="ema" if request.ema else "model")
    return Subject(
        request.source,
        asdict(model.config),
        model.state_dict(),
        "seeded initial weights" if request.checkpoint is None else str(request.checkpoint),
        _schedule(request, request.source),
        Preprocessing.for_image_size(model.image_size),
        None,
    )


def _from_export(request: SubjectRequest) -> Subject:
    from exporter.torch_session import model_of, schedule_of

    given = {
        "checkpoint": request.checkpoint,
        "num_classes": request.num_classes,
        "set": request.options or None,
        "ema": request.ema or None,
    }
    if named := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            f"source={request.source!r} is an export, which has its own weights and sizes; leave "
            f"--{named[0].replace('_', '-')} out, or give a model's name"
        )
    artifact = open_artifact(request.source)
    manifest = artifact.manifest
    if manifest.preprocessing is None:
        raise ValueError(
            f"source={request.source!r} has no preprocessing in its model.json, so image files "
            "cannot be turned into its input; export the model by its name"
        )
    model = model_of(artifact, dense=True)
    own = request.schedule is None and not request.rules
    return Subject(
        manifest.name,
        dict(manifest.config),
        model.state_dict(),
        f"{request.source}, {manifest.weights}",
        schedule_of(artifact) if own else _schedule(request, manifest.name),
        manifest.preprocessing,
        manifest.labels,
    )


def _schedule(request: SubjectRequest, name: str) -> PruneSchedule | None:
    from exporter.models.schedules import default_schedule
    from exporter.schedule import PruneSchedule

    rules: dict[str, Any] = dict(request.rules)
    if request.schedule == "default":
        return default_schedule(name, **rules)
    if request.schedule is not None:
        return PruneSchedule.parse(request.schedule, **rules)
    if rules:
        raise ValueError(
            f"{', '.join(rules)} without a schedule prunes nothing; give --schedule "
            "BLOCK:RATIO,... too, or leave it out"
        )
    return None
