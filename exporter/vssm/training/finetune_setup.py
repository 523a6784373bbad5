"""From a request to models and a run."""

from __future__ import annotations

import torch

from vssm._version import __version__
from vssm.checkpoints.load import load_checkpoint
from vssm.evaluation.data import fingerprint, open_pictures, worker_count
from vssm.models import create_model
from vssm.models.base import VisionModel
from vssm.models.fused_tokens import fuse_leftovers
from vssm.models.schedules import named_schedule
from vssm.pruning.schedule import PruneSchedule
from vssm.training.finetune_parallel import Group
from vssm.training.loop import Run
from vssm.training.request import FinetuneRequest, Subject


def build_models(request: FinetuneRequest, group: Group) -> tuple[VisionModel, VisionModel | None]:
    """The model to train, and the dense one to distil from where the recipe does."""
    if request.work.threads is not None:
        torch.set_num_threads(request.work.threads)
    subject = request.subject
    model = build_model(subject, _schedule(subject)).to(group.device)
    if subject.tokens == "fused":
        fuse_leftovers(model)
    if request.recipe.distil == 0:
        return model, None
    # The student trains on the kernels by itself; without gradients "auto" is the slow oracle.
    return model, build_model(subject, None).use_operators("kernel").to(group.device)


def plan_run(request: FinetuneRequest, model: VisionModel, group: Group) -> Run:
    """What to do, and what must be the same when it goes on.

    Raises:
        ValueError: the folders are not the classes, or the batch does not fit.
    """
    recipe, work = request.recipe, request.work
    pictures = open_pictures(request.data, model.num_classes, request.classes, name="data")
    recipe.steps(len(pictures))  # refuses a batch that is larger than the data set
    pairs = recipe.mixup > 0 or recipe.cutmix > 0
    if recipe.batch % (group.world * (2 if pairs else 1)):
        raise ValueError(
            f"batch={recipe.batch} does not give each of the {group.world} processes the same "
            "number of images, an even one for mixup and cutmix; give a multiple"
        )
    header = {
        "model": request.subject.name,
        "config": repr(model.config),
        "num_classes": str(model.num_classes),
        "image_size": "x".join(map(str, model.image_size)),
        "schedule": repr(model.schedule),
        "tokens": request.subject.tokens,
        "checkpoint": "none" if model.checkpoint is None else model.checkpoint.sha256,
        "source": request.subject.source,
        "images": fingerprint(request.data, pictures),
        "processes": str(group.world),
        "device": group.device.type,
        "threads": str(torch.get_num_threads()),
        "micro_batch": str(work.micro_batch),
        "torch": torch.__version__,
        "vssm": __version__,
        **recipe.named(),
    }
    return Run(
        recipe=recipe,
        root=request.data,
        pictures=pictures,
        directory=request.output,
        header=header,
        workers=worker_count(work.workers),
        micro_batch=work.micro_batch,
        save_every=work.save_every,
    )


def build_model(subject: Subject, schedule: PruneSchedule | None) -> VisionModel:
    """A model by its name with the weights of its checkpoint, or the seeded initial ones.

    Raises:
        ValueError: the name or an option is unknown, or the schedule does not fit.
        CheckpointError: the checkpoint cannot be used.
    """
    model = create_model(
        subject.name,
        schedule=schedule,
        num_classes=1000 if subject.num_classes is None else subject.num_classes,
        **subject.options,
    )
    if subject.checkpoint is not None:
        load_checkpoint(model, subject.checkpoint, source=subject.source)
    return model


def _schedule(subject: Subject) -> PruneSchedule | None:
    found = named_schedule(subject.name, subject.schedule, **subject.rules)
    forced = {"masked": "masked", "fused": "none"}.get(subject.tokens)
    if found is None or forced is None or isinstance(subject.schedule, PruneSchedule):
        return found  # one that is made already says itself how it aligns
    return found.changed(alignment=forced)
