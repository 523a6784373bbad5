"""One set of weights that is pruned in several ways: by a model's name or from an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from vssm.artifact.directory import open_artifact
from vssm.artifact.manifest import Preprocessing
from vssm.artifact.preprocessing import preprocessing_of
from vssm.checkpoints.hub import hub_file
from vssm.models import list_models, model_from_config
from vssm.models.base import VisionModel
from vssm.models.registry import check_task
from vssm.models.schedules import named_schedule
from vssm.pruning.schedule import Schedule
from vssm.runtimes.torch import model_of, schedule_of
from vssm.training.request import ModelSource
from vssm.training.run import build_model

_WHAT: Final = "this comparison of prunings"
_IMAGES: Final = ("classification",)


@dataclass(frozen=True)
class LoadedSource:
    """A `ModelSource` with its weights read, the configuration they belong to, and its schedule.

    Attributes:
        name: the model's name.
        config: the family's configuration.
        state: its tensors, which every variant shares.
        weights: where they come from, for reports.
        schedule: how to prune or merge; None for the dense model.
        preprocessing: how images are prepared.
        labels: class names, where the export or the checkpoint has them.
        loaded: what was read from a checkpoint and done to it; None without one.
    """

    name: str
    config: Mapping[str, Any]
    state: Mapping[str, Any]
    weights: str
    schedule: Schedule | None
    preprocessing: Preprocessing
    labels: Sequence[str] | None
    loaded: str | None = None

    def variant(self, schedule: Schedule | None) -> VisionModel:
        """The model with these weights and another schedule; the tensors are shared.

        Raises:
            ValueError, UnsupportedError: the schedule does not fit the model.
        """
        model = model_from_config(self.name, self.config, schedule)
        # `assign`: the tensors themselves, so that all variants take the memory of one.
        model.load_state_dict(self.state, assign=True)
        return model.eval()


def load_source(source: ModelSource, tasks: Sequence[str] = _IMAGES) -> LoadedSource:
    """Find the weights and the schedule of a model of one of these tasks.

    Raises:
        ValueError: the name is neither, or an option does not belong to it.
        ArtifactError, CheckpointError: the export or the checkpoint cannot be used.
    """
    if source.tokens != "gather":
        raise ValueError(
            f"tokens={source.tokens!r} is a way to train; leave it out, and give it to finetune"
        )
    source.checked(exports=True)
    check_task(source.name, tasks, _WHAT)
    return _by_name(source) if source.name in list_models() else _from_export(source, tasks)


def _by_name(source: ModelSource) -> LoadedSource:
    # Dense, as each variant brings its own schedule.
    model = build_model(source, None)
    return LoadedSource(
        source.name,
        asdict(model.config),
        model.state_dict(),
        _weights(source.checkpoint),
        _schedule(source, source.name),
        model.preprocessing() or Preprocessing.for_image_size(model.image_size),
        model.labels,
        model.loaded,
    )


def _weights(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "seeded initial weights"
    return str(hub_file(checkpoint) or checkpoint)  # a Path has one slash of hf://


def _from_export(source: ModelSource, tasks: Sequence[str]) -> LoadedSource:
    given = {
        "checkpoint": source.checkpoint,
        "num_classes": source.num_classes,
        "set": source.options or None,
    }
    # Refused, not ignored: the figures would be of other weights than were asked for.
    if named := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            f"model={source.name!r} is an export, which has its own weights and sizes; leave "
            f"--{named[0].replace('_', '-')} out, or give a model's name"
        )
    artifact = open_artifact(source.name)
    manifest = artifact.manifest
    preprocessing = preprocessing_of(manifest)  # refused now if it says nothing
    check_task(manifest.name, tasks, _WHAT)
    model = model_of(artifact, dense=True)
    return LoadedSource(
        manifest.name,
        dict(manifest.config),
        model.state_dict(),
        f"{source.name}, {manifest.weights}",
        _schedule(source, manifest.name) or schedule_of(artifact),
        preprocessing,
        manifest.labels,
    )


def _schedule(source: ModelSource, name: str) -> Schedule | None:
    return named_schedule(name, source.schedule, merge=source.merge, **source.rules)
