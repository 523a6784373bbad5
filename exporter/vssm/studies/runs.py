"""The runs of an ablation: variants with the checkpoints' weights and with trained ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from vssm.checkpoints.load import load_checkpoint, save_safetensors
from vssm.errors import UnsupportedError
from vssm.evaluation.data import ImageFolder, open_images
from vssm.models import model_from_config
from vssm.studies.plan import AblationOptions, AblationTraining, Plan, Run
from vssm.studies.source import LoadedSource, load_source
from vssm.training.request import FinetuneRequest, ModelSource, Resources
from vssm.training.run import finetune, has_run
from vssm.types import Steps

FOLDER: Final = "finetuned"
_TUNED = "fine-tuned "  # before the key of a variant with weights of its own
_START = "start.safetensors"  # an export's weights, to train from


def open_checkpoints(source: ModelSource, more: Sequence[Path]) -> list[LoadedSource]:
    """The model with each of its checkpoints, the first its own.

    Raises:
        ValueError: there are further checkpoints, but no first one, or two have equal weights.
        ValueError, VssmError: as `load_source`.
    """
    if more and source.checkpoint is None:
        raise ValueError(
            f"checkpoints={more[0]} and no checkpoint before them; give the first as the model's"
        )
    opened = [load_source(one) for one in _with_checkpoints(source, more)]
    _check_distinct(opened)
    for one in opened[1:]:
        if one.labels != opened[0].labels:
            raise ValueError(
                f"checkpoints={one.weights} and {opened[0].weights} name their classes "
                "differently, so that one folder would be two classes; give checkpoints that were "
                "trained on the same classes"
            )
    return opened


def _check_distinct(opened: Sequence[LoadedSource]) -> None:
    """Refuse equal weights: they would count as two trainings that agree in everything."""
    if len(opened) == 1:
        return  # and nothing to hash
    from vssm.checkpoints.load import state_digest

    first: dict[str, str] = {}
    for one in opened:
        digest = state_digest(one.state)
        if digest in first:
            raise ValueError(
                f"checkpoints={one.weights} has the weights of {first[digest]}, tensor by tensor, "
                "so it would add a run that agrees in everything; give each training once"
            )
        first[digest] = one.weights


def zero_shot_runs(plan: Plan, checkpoints: int) -> list[Run]:
    """Every variant with every checkpoint."""
    return [
        Run(v.key if checkpoints == 1 else f"{v.key}, checkpoint {c}", v, False, c, checkpoint=c)
        for v in plan.variants
        for c in range(checkpoints)
    ]


def given_runs(plan: Plan, files: Mapping[str, Sequence[Path]]) -> list[Run]:
    """Variants with the trained weights that were handed over, several files as several seeds.

    Raises:
        ValueError: there is no such variant.
    """
    _check_keys("finetuned", files, plan)
    named = {v.key: v for v in plan.variants}
    return [
        Run(f"{_TUNED}{key}" + (f", file {i}" if len(some) > 1 else ""), named[key], True, i, file)
        for key, some in files.items()
        for i, file in enumerate(some)
    ]


def check_training(
    training: AblationTraining,
    plan: Plan,
    subjects: Sequence[LoadedSource],
    options: AblationOptions,
    tested: ImageFolder,
) -> int:
    """Refuse before the first step what could only fail later; the number of images comes back.

    Raises:
        ValueError: an argument does not fit.
    """
    _check_keys("finetune", training.variants, plan)
    if both := [key for key in training.variants if key in options.finetuned]:
        raise ValueError(
            f"finetune={both[0]!r} is trained here and given by --finetuned; leave one of them out"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "train with several processes: ablate runs in one; train each variant by `torchrun ... "
            "-m vssm.commands.main finetune`, and give the weights by --finetuned VARIANT=FILE"
        )
    if training.seeds is not None and training.seeds % len(subjects):
        raise ValueError(
            f"finetune_seeds={training.seeds} is not a multiple of the {len(subjects)} "
            "checkpoints, each of which is trained from as often; give one"
        )
    num_classes = int(subjects[0].config["num_classes"])
    if training.recipe.distil > 0 and "dense" in training.variants:
        raise ValueError(
            f"recipe: distil={training.recipe.distil} makes the dense model the teacher, so it "
            "cannot be trained by it; leave dense out of --finetune"
        )
    folder = open_images(
        training.data,
        num_classes,
        labels=subjects[0].labels,
        classes=options.classes,
        name="train",
    )
    pairs = enumerate(zip(folder.classes, tested.classes, strict=True))  # i is one class in both
    odd = [(i, ours, theirs) for i, (ours, theirs) in pairs if ours != theirs]
    if odd:
        raise ValueError(
            f"train={training.data}: the folder of class {odd[0][0]} is {odd[0][1]!r} there and "
            f"{odd[0][2]!r} in images={tested.root}; give both the same folders, or name those of "
            "both in a file with --classes"
        )
    images = len(folder.pictures)
    if images < training.recipe.batch:
        raise ValueError(
            f"recipe: batch={training.recipe.batch} is more than the {images} images of train="
            f"{training.data}; give --recipe batch=N"
        )
    return images


@dataclass(frozen=True)
class Trainer:
    """Trains variants one after the other, each in its own folder of `output`.

    A call that was stopped goes on where it ended: each folder has its own state.
    """

    source: ModelSource
    opened: Sequence[LoadedSource]
    options: AblationOptions
    output: Path
    progress: Steps

    def runs(self, plan: Plan) -> tuple[list[Run], dict[str, str]]:
        """The trained variants, and of those that cannot be, the reason; nothing without training.

        Raises:
            ValueError, VssmError: as `finetune`.
        """
        found: list[Run] = []
        left_out: dict[str, str] = {}
        training = self.options.training
        if training is None:
            return found, left_out
        named = {v.key: v for v in plan.variants}
        starts = self._starts()
        for key in training.variants:
            try:
                # Built only to hear whether the family has it.
                self.opened[0].variant(named[key].schedule)
            except UnsupportedError as error:
                left_out[_TUNED + key] = str(error)
                continue
            for number in range(training.seeds or len(starts)):
                seed, begun = self.options.seed + number, number % len(starts)
                start = replace(
                    starts[begun],
                    schedule=named[key].schedule,
                    tokens=named[key].tokens,
                )
                weights = self._train(f"{key}-{seed}", start, seed, training)
                name = f"{_TUNED}{key}, seed {seed}"
                found.append(Run(name, named[key], True, number, weights, begun))
        return found, left_out

    def _starts(self) -> list[ModelSource]:
        """What each checkpoint's training begins with, by name; an export's weights as a file."""
        sizes = dict(self.opened[0].config)
        # `create_model` has a parameter of its own for it.
        classes = int(sizes.pop("num_classes"))
        plain = ModelSource(self.opened[0].name, num_classes=classes, options=sizes)
        if self.source.name != plain.name:  # else it is a model's, see load_source
            return [replace(plain, checkpoint=self._start_file())]
        return [
            replace(
                plain,
                checkpoint=one.checkpoint,
                weights=one.weights,
                key=one.key,
                new_head=one.new_head,
            )
            for one in _with_checkpoints(self.source, self.options.checkpoints)
        ]

    def _start_file(self) -> Path:
        file = self.output / FOLDER / _START
        file.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(self.opened[0].state, file, labels=self.opened[0].labels)
        return file

    def _train(
        self, folder: str, start: ModelSource, seed: int, training: AblationTraining
    ) -> Path:
        output = self.output / FOLDER / folder
        request = FinetuneRequest(
            start,
            training.data,
            output,
            replace(training.recipe, seed=seed),
            self.options.classes,
            # What was stopped goes on; what had ended has no step left to do.
            resume=has_run(output),
            resources=Resources(
                self.options.workers,
                training.micro_batch,
                training.save_every,
                self.options.device,
                self.options.threads,
            ),
        )
        report = finetune(
            request,
            progress=lambda phase, *rest: self.progress(f"{folder}: {phase}", *rest),
        )
        if report is None:
            raise AssertionError("check_training refuses several processes")
        # The last step's: with the published decay the average hardly moves in a short run.
        return Path(report.weights)


def model_of_run(run: Run, opened: Sequence[LoadedSource]) -> Any:
    """The model of a run with its weights.

    Raises:
        UnsupportedError: the family does not have the variant.
        ValueError, VssmError: the schedule or the weights do not fit.
    """
    if run.weights is None:
        return opened[run.number].variant(run.variant.schedule)
    model = model_from_config(opened[0].name, opened[0].config, run.variant.schedule)
    load_checkpoint(model, run.weights)
    return model


def _with_checkpoints(source: ModelSource, more: Sequence[Path]) -> list[ModelSource]:
    return [source, *(replace(source, checkpoint=file) for file in more)]


def _check_keys(option: str, keys: Any, plan: Plan) -> None:
    known = [v.key for v in plan.variants]
    if unknown := sorted(set(keys) - set(known)):
        raise ValueError(
            f"{option}={unknown[0]!r} is not a variant of this ablation; name one of "
            f"{', '.join(known)}"
        )
