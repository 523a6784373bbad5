"""`vssm finetune` as a function: a model's name, a folder of images, trained weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from vssm._version import __version__
from vssm.artifact.data_sets import names_of
from vssm.checkpoints.load import load_checkpoint, save_safetensors
from vssm.errors import ArtifactError
from vssm.evaluation.data import open_images
from vssm.evaluation.scenes import check_class_count, open_scenes
from vssm.extras import is_installed
from vssm.files.atomic import check_apart, make_directory, sha256_of
from vssm.files.json import write_json
from vssm.files.progress import automatic, shows_progress
from vssm.models import create_model
from vssm.models.base import VisionModel
from vssm.models.fused_tokens import fuse_leftovers
from vssm.models.schedules import named_schedule
from vssm.pruning.schedule import MergeSchedule, Schedule
from vssm.runtimes.torch import torch_threads
from vssm.training.lessons import Pictures, Scenes
from vssm.training.log import RunLog, remove_leftovers
from vssm.training.loop import LOG_FILE, STATE_FILE, Group, Trained, TrainingRun, train
from vssm.training.recipe import Recipe
from vssm.training.request import FinetuneRequest, ModelSource
from vssm.training.scene_recipe import SceneRecipe
from vssm.training.state import State
from vssm.training.validate import BEST_FILE, best_of, open_validation
from vssm.types import Steps


def build_models(request: FinetuneRequest, group: Group) -> tuple[VisionModel, VisionModel | None]:
    """The model to train, and the dense one to distil from where the recipe does."""
    source = request.source
    model = build_model(source, _schedule(source)).to(group.device)
    if source.tokens == "fused":
        fuse_leftovers(model)
    if isinstance(request.recipe, SceneRecipe) or request.recipe.distil == 0:
        return model, None
    # The student trains on the kernels by itself; without gradients "auto" is the slow oracle.
    return model, build_model(source, None).use_backend("kernel").to(group.device)


def plan_run(
    request: FinetuneRequest, model: VisionModel, group: Group, workers: int
) -> TrainingRun:
    """What to do, by `workers` that load images, and what must be the same when it goes on.

    Raises:
        ValueError: it is not certain which folder is which class, or the batch does not fit.
    """
    # All that the numbers depend on is in the header, so that `--resume` can promise the same bits.
    # Workers are not: they load the same images in the same order.
    recipe, resources = request.recipe, request.resources
    lesson = _lesson(request, model)
    val = None
    if request.val is not None and isinstance(lesson, Pictures):
        val = open_validation(request.val, lesson.folder)
    recipe.steps(lesson.images)  # refuses a batch that is larger than the data set
    _check_batch(request, group)
    header = {
        "model": request.source.name,
        "config": asdict(model.config),
        "num_classes": model.num_classes,
        "image_size": list(model.image_size),
        "schedule": _plain(model.schedule),
        "tokens": request.source.tokens,
        "checkpoint": None if model.checkpoint is None else model.checkpoint.sha256,
        "weights": request.source.weights,
        "key": request.source.key,
        "new_head": request.source.new_head,
        "backbone": request.source.backbone,
        "images": lesson.folder.fingerprint(),
        "val": None if val is None else val.fingerprint(),
        "classes": lesson.rule,
        "processes": group.world,
        "device": group.device.type,
        "threads": torch.get_num_threads(),
        "micro_batch": resources.micro_batch,
        "torch": torch.__version__,
        "vssm": __version__,
        **asdict(recipe),
    }
    return TrainingRun(
        lesson=lesson,
        directory=request.output,
        # As the state has it when it is read again, tuples as lists.
        header=json.loads(json.dumps(header)),
        workers=workers,
        micro_batch=resources.micro_batch,
        save_every=resources.save_every,
        val=val,
    )


def _plain(schedule: Schedule | None) -> dict[str, Any] | None:
    """A schedule as JSON has it, its numbers as numbers."""
    if schedule is None:
        return None
    values: dict[str, Any] = {"kind": type(schedule).__name__, **vars(schedule)}
    if isinstance(schedule, MergeSchedule):
        values["prune"] = _plain(schedule.prune)
    else:
        values["ratios"] = {block: float(ratio) for block, ratio in schedule.ratios.items()}
    return values


def _lesson(request: FinetuneRequest, model: VisionModel) -> Pictures | Scenes:
    recipe = request.recipe
    if isinstance(recipe, Recipe):
        folder = open_images(
            request.data,
            model.num_classes,
            labels=model.labels,
            classes=request.classes,
            name="data",
        )
        return Pictures(recipe, folder, model.image_size)
    check_class_count(model.num_classes)
    scenes = open_scenes(request.data, request.split or _SPLIT, name="data")
    labels = names_of(model.name, model.num_classes)
    return Scenes(recipe, scenes, model.image_size, model.num_classes, labels)


def _check_batch(request: FinetuneRequest, group: Group) -> None:
    """Refuse a batch that the processes, or the passes of one, cannot share out."""
    recipe, passes = request.recipe, request.resources.micro_batch
    pairs = isinstance(recipe, Recipe) and (recipe.mixup > 0 or recipe.cutmix > 0)
    if recipe.batch % (group.world * (2 if pairs else 1)):
        raise ValueError(
            f"batch={recipe.batch} does not give each of the {group.world} processes the same "
            "number of images, an even one for mixup and cutmix; give a multiple"
        )
    share = recipe.batch // group.world
    last = share % passes if passes is not None and passes < share else share
    if isinstance(recipe, SceneRecipe) and 1 in {share, passes, last}:
        raise ValueError(
            f"batch={recipe.batch} with {group.world} processes and micro_batch={passes} leaves "
            "one image alone, of which a batch norm of one place knows no spread; give others"
        )


def build_model(source: ModelSource, schedule: Schedule | None) -> VisionModel:
    """A model by its name with the weights of its checkpoint, or the seeded initial ones.

    Raises:
        ValueError: the name or an option is unknown, or the schedule does not fit.
        CheckpointError: the checkpoint cannot be used.
    """
    model = create_model(
        source.name,
        schedule=schedule,
        num_classes=source.num_classes,
        **source.options,
    )
    if source.checkpoint is not None:
        load_checkpoint(
            model,
            source.checkpoint,
            weights=source.weights,
            key=source.key,
            new_head=source.new_head,
            backbone=source.backbone,
        )
    return model


def _schedule(source: ModelSource) -> Schedule | None:
    found = named_schedule(source.name, source.schedule, merge=source.merge, **source.rules)
    # Masked tokens keep their places, and the fused one is plain removal's: neither aligns.
    forced = {"masked": "masked", "fused": "none"}.get(source.tokens)
    if found is None or forced is None or isinstance(source.schedule, Schedule):
        return found  # one that is made already says itself how it aligns
    return found.changed(alignment=forced)


_SPLIT: Final = "training"  # ADE20K's name
WEIGHTS_FILE: Final = "finetuned.safetensors"
EMA_FILE: Final = "finetuned_ema.safetensors"
REPORT_FILE: Final = "finetune.json"


@dataclass(frozen=True)
class FinetuneReport:
    """What a training run left.

    Attributes:
        weights: file of the trained weights, under the model's official keys.
        sha256: of that file, as model.json names it once they are exported.
        ema: file of the averaged weights.
        ema_sha256: of that file.
        best: file of the weights that were best on the validation images; None without those.
        best_sha256: of that file.
        best_epoch: after so many epochs; 0 for the weights that training began with.
        trained: steps, loss and speed.
        run: what was trained from what on what: model, schedule, data, recipe, versions, and how
            folders were matched to classes.
        classes: by class, the folder that its images came from; of a segmenter the names of its
            data set, or none. The files of weights name their classes so, unless the checkpoint had
            names for them.
        loaded: what the training began with: the checkpoint's tensors, and what was done to them.
        notes: what one should know: empty classes, files that were passed over, and what makes the
            training loss larger than the loss on the images as they are.
        tensorboard: whether a TensorBoard log was written; the package is optional.
    """

    weights: str
    sha256: str
    ema: str
    ema_sha256: str
    best: str | None
    best_sha256: str | None
    best_epoch: int | None
    trained: Trained
    run: Mapping[str, Any]
    classes: tuple[str, ...]
    loaded: str
    notes: tuple[str, ...]
    tensorboard: bool


@shows_progress
def finetune(request: FinetuneRequest, *, progress: Steps = automatic) -> FinetuneReport | None:
    """Train a model, pruned or dense, on a folder that holds one folder of images a class.

    A segmenter is trained on a folder that is laid out as ADE20K, with images and annotations.

    Under torchrun every process calls this with the same arguments; when it starts them again, they
    go on from the last state. A run that was stopped, by
    kill -9 too, ends with the same weights and log once it is called again with `resume`.

    Args:
        request: what to do.
        progress: called with how far it is; a bar in a terminal or a notebook by default.

    Returns:
        The report, which is also written as finetune.json; None in processes that do not lead.

    Raises:
        ValueError, VssmError: a file, a number or the model does not fit; the message says which.
    """
    group = Group(request.resources.device)
    if group.world == 1:
        _check_output(request)  # before models are built, which takes seconds
    given = request.resources
    with torch_threads(given.threads, given.workers, processes=group.beside) as (_, workers):
        model, teacher = build_models(request, group)
        run = plan_run(request, model, group, workers)
        with group, _log(request, group) as log:
            state, trained = train(model, run, group, log=log, teacher=teacher, progress=progress)
            if log is None:
                return None
            board = is_installed("tensorboard")
            return _write(state, trained, run, request, tensorboard=board)


def has_run(output: Path) -> bool:
    """Whether a training run was begun in `output`; its log is the first file that it makes."""
    # A run that was killed before its first state has a log alone.
    return (output / STATE_FILE).exists() or (output / LOG_FILE).exists()


@contextmanager
def _log(request: FinetuneRequest, group: Group) -> Iterator[RunLog | None]:
    """The log of the process that writes, whose lock keeps a second run out of the directory."""
    if not group.leads:
        yield None
        return
    if group.world > 1 and not group.restarted:
        _check_output(request)
    make_directory(request.output)
    with RunLog(request.output / LOG_FILE) as log:
        remove_leftovers(request.output)  # under the lock: what is left is nobody's
        yield log


def _check_output(request: FinetuneRequest) -> None:
    """A run that is there goes on only if asked to; images are not written among."""
    check_apart(request.output, data=request.data, val=request.val)
    if not request.resume and (request.output / STATE_FILE).exists():
        raise ArtifactError(
            f"output={request.output} holds a training run; go on with it by --resume, or name "
            "another directory"
        )
    if request.resume and not has_run(request.output):
        raise ArtifactError(
            f"output={request.output} holds no training run to go on with; name the directory of "
            "the run, or leave --resume out to begin one"
        )


def _notes(run: TrainingRun, request: FinetuneRequest) -> tuple[str, ...]:
    notes, val = run.lesson.notes, request.val
    if val is not None and val.resolve() == request.data.resolve():
        return (
            *notes,
            "the validation images are those of the training, and say nothing of others",
        )
    return notes


def _write(
    state: State,
    trained: Trained,
    run: TrainingRun,
    request: FinetuneRequest,
    *,
    tensorboard: bool,
) -> FinetuneReport:
    """The weights under official keys, and the report beside them."""
    directory = request.output
    weights, ema = directory / WEIGHTS_FILE, directory / EMA_FILE
    # Whoever evaluates or trains on matches folders by these names, not by their order.
    labels = state.model.labels or run.lesson.labels
    save_safetensors(state.model.state_dict(), weights, labels=labels)
    save_safetensors(state.ema, ema, labels=labels)
    best = best_of(trained.validated)
    report = FinetuneReport(
        weights=str(weights),
        sha256=sha256_of(weights),
        ema=str(ema),
        ema_sha256=sha256_of(ema),
        best=None if best is None else str(directory / BEST_FILE),
        best_sha256=None if best is None else sha256_of(directory / BEST_FILE),
        best_epoch=None if best is None else best.epoch,
        trained=trained,
        run=run.header,
        classes=run.lesson.labels or (),
        loaded=state.model.loaded or "seeded initial weights",
        notes=_notes(run, request),
        tensorboard=tensorboard,
    )
    write_json(directory / REPORT_FILE, report)
    return report
