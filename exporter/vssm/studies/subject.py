"""One set of weights that is pruned in several ways: by a model's name or from an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vssm.artifact.directory import open_artifact
from vssm.artifact.manifest import Preprocessing
from vssm.training.request import Subject

if TYPE_CHECKING:
    from vssm.models import VisionModel
    from vssm.pruning.schedule import PruneSchedule


@dataclass(frozen=True)
class OpenedSubject:
    """A `Subject` with its weights read, the configuration they belong to, and its schedule.

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
        from vssm.models import model_from_config

        model = model_from_config(self.name, self.config, schedule)
        model.load_state_dict(self.state, assign=True)
        return model.eval()


def open_subject(subject: Subject) -> OpenedSubject:
    """Find the weights and the schedule.

    Raises:
        ValueError: the name is neither, or an option does not belong to it.
        ArtifactError, CheckpointError: the export or the checkpoint cannot be used.
    """
    from vssm.models import list_models

    if subject.tokens != "gather":
        raise ValueError(
            f"tokens={subject.tokens!r} is a way to train; leave it out, and give it to finetune"
        )
    if subject.name in list_models():
        return _by_name(subject)
    if not Path(subject.name).is_dir():
        raise ValueError(
            f"source={subject.name!r} is neither a model nor the directory of an export; see "
            "`vssm models`, or write one with `vssm export`"
        )
    return _from_export(subject)


def _by_name(subject: Subject) -> OpenedSubject:
    from vssm.training.run import build_model

    model = build_model(subject, None)
    return OpenedSubject(
        subject.name,
        asdict(model.config),
        model.state_dict(),
        "seeded initial weights" if subject.checkpoint is None else str(subject.checkpoint),
        _schedule(subject, subject.name),
        Preprocessing.for_image_size(model.image_size),
        None,
    )


def _from_export(subject: Subject) -> OpenedSubject:
    from vssm.runtimes.torch import model_of, schedule_of

    given = {
        "checkpoint": subject.checkpoint,
        "num_classes": subject.num_classes,
        "set": subject.options or None,
    }
    if named := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            f"source={subject.name!r} is an export, which has its own weights and sizes; leave "
            f"--{named[0].replace('_', '-')} out, or give a model's name"
        )
    artifact = open_artifact(subject.name)
    manifest = artifact.manifest
    if manifest.preprocessing is None:
        raise ValueError(
            f"source={subject.name!r} has no preprocessing in its model.json, so image files "
            "cannot be turned into its input; export the model by its name"
        )
    model = model_of(artifact, dense=True)
    return OpenedSubject(
        manifest.name,
        dict(manifest.config),
        model.state_dict(),
        f"{subject.name}, {manifest.weights}",
        schedule_of(artifact) if subject.schedule is None else _schedule(subject, manifest.name),
        manifest.preprocessing,
        manifest.labels,
    )


def _schedule(subject: Subject, name: str) -> PruneSchedule | None:
    from vssm.models.schedules import named_schedule

    return named_schedule(name, subject.schedule, **subject.rules)
