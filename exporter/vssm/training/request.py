"""Which model with which weights, and what `vssm finetune` is asked for. No torch.

What contradicts itself is refused here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vssm.checkpoints.hub import check_checkpoint
from vssm.errors import check_choice, check_least, did_you_mean
from vssm.models.registry import cards, check_options, check_task
from vssm.models.schedules import named_schedule
from vssm.pruning.schedule import MergeSchedule, PruneSchedule, Schedule
from vssm.training.recipe import Recipe
from vssm.training.scene_recipe import SceneRecipe


def refuse_unused_options(
    *,
    schedule: object,
    checkpoint: object,
    merge: str | None = None,
    weights: str,
    key: str | None = None,
    new_head: bool = False,
    backbone: bool = False,
    model_options: Collection[str] = (),
    **rules: object,
) -> None:
    """Refuse what has no effect without its counterpart.

    Args:
        schedule: what prunes; None for a dense model.
        checkpoint: where weights come from; None for none.
        merge: what merges; None for nothing.
        weights: which weights of the checkpoint, "model" by default.
        key: where in the checkpoint they are; None for the usual places.
        new_head: whether the checkpoint's head may be left out.
        backbone: whether the checkpoint is a classifier's, for the backbone alone.
        model_options: keys of --set.
        rules: options that only a schedule has a use for, None where they are not given.

    Raises:
        ValueError: one of them is given without what it belongs to, or by a wrong name.
    """
    for option, value in rules.items():
        if option in {"alignment", "restore"} and merge is not None:
            continue  # merging has its own
        # Refused, not ignored: the model would be dense, and whoever asked would not notice.
        if value is not None and schedule is None:
            raise ValueError(
                f"{option}={value!r} without a schedule prunes nothing; give --schedule "
                "BLOCK:RATIO,... too, or leave it out"
            )
    if (seed := rules.get("seed")) is not None and rules.get("importance") != "random":
        raise ValueError(
            f"seed={seed} with importance={rules.get('importance') or 'clip'!r}, which draws "
            "nothing; give --importance random too, or leave it out"
        )
    of_file = {
        **{"weights": weights != "model", "key": key is not None},
        **{"new_head": new_head, "backbone": backbone},
    }
    if checkpoint is None and any(of_file.values()):
        option = next(name for name, given in of_file.items() if given)
        value = {"weights": weights, "key": key}.get(option, True)
        raise ValueError(f"{option}={value!r} without a checkpoint; give --checkpoint FILE")
    if new_head and backbone:
        raise ValueError(
            "new_head=True with backbone=True, after which the heads are untrained in any case; "
            "leave new_head out"
        )
    if key is not None and weights != "model":
        raise ValueError(f"key={key!r} with weights={weights!r}: a key says which; leave one out")
    if "num_classes" in model_options:
        raise ValueError("--set num_classes: this option has a name of its own; --num-classes N")


TOKENS: Final = ("gather", "masked", "fused")
RULES: Final = ("alignment", "importance", "conv", "restore", "seed")


@dataclass(frozen=True)
class ModelSource:
    """The model that `finetune`, `visualize` and `ablate` take: weights, and how to prune them.

    Attributes:
        name: as `create_model` takes it; for `visualize` and `ablate` also the directory of an
            export (one of a model's name is written ./NAME), which has its own weights and sizes.
        checkpoint: weights; None for the seeded initial ones.
        weights: "model", or "ema" for the averaged weights of the checkpoint.
        key: where the weights are in the checkpoint, if under no usual name, as for
            `load_checkpoint`.
        new_head: keep the model's own head, untrained, where the checkpoint's has another width.
        backbone: for `finetune` of a segmenter, the checkpoint is a classifier's: the backbone is
            begun from it, and the heads are untrained.
        schedule: "BLOCK:RATIO,...", "default", a `PruneSchedule` or a `MergeSchedule`; None for the
            dense model, or the export's own.
        merge: what merges, as `MergeSchedule.parse` takes it, alone or beside a text.
        alignment: as for `PruneSchedule`, beside a text; None for "gap", or without a schedule as
            for `MergeSchedule`.
        importance: as for `PruneSchedule`, beside a text; None for "clip".
        conv: as for `PruneSchedule`, beside a text; None for its default.
        restore: as for `PruneSchedule`, beside a text, or for `MergeSchedule`; None for "frozen",
            or "group" where tokens merge.
        seed: of importance "random", beside a text; None for 0.
        tokens: what training does with pruned tokens. "gather": as deployed; "masked": they stay
            as zeros in their places (Vim only), whatever alignment the weights are deployed with;
            "fused": plain removal with one fused leftover token, the EViT-style baseline.
        num_classes: width of the logits; None for the model's own, or the export's.
        options: overrides of the model's configuration.

    Raises:
        ValueError: two of them contradict each other.
    """

    name: str
    checkpoint: Path | None = None
    weights: str = "model"
    schedule: str | Schedule | None = None
    merge: str | None = None
    alignment: str | None = None
    importance: str | None = None
    conv: str | None = None
    restore: str | None = None
    tokens: str = "gather"
    num_classes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    new_head: bool = False
    backbone: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        refuse_unused_options(
            schedule=self.schedule,
            merge=self.merge,
            checkpoint=self.checkpoint,
            weights=self.weights,
            key=self.key,
            new_head=self.new_head,
            backbone=self.backbone,
            model_options=self.options,
            **self.rules,
        )
        for option, value in self.rules.items():
            # A text leaves the rules open for options to set; a schedule that is made has them.
            if value is not None and isinstance(self.schedule, Schedule):
                raise ValueError(
                    f"{option}={value!r} beside a {type(self.schedule).__name__}, which has its "
                    f"own; leave it out, or pass schedule.changed({option}={value!r})"
                )
        if self.merge is not None and isinstance(self.schedule, Schedule):
            raise ValueError(
                f"merge={self.merge!r} beside a {type(self.schedule).__name__}; pass one "
                "MergeSchedule, with prune=PruneSchedule(...) where it prunes too"
            )
        self._check_tokens()

    @property
    def rules(self) -> dict[str, Any]:
        """What is asked for beside a schedule's text; None for a default."""
        return {name: getattr(self, name) for name in RULES}

    def checked(self, *, exports: bool = False) -> Schedule | None:
        """The schedule of a model given by its name, after all that can be checked without torch.

        Args:
            exports: whether the name may be the directory of an export; nothing is checked then.

        Raises:
            ValueError, TypeError: the name, an option or the schedule does not fit.
        """
        # A model's name wins over a directory of that name; ./NAME is the directory.
        if exports and self.name not in (known := cards()):
            if not Path(self.name).is_dir():
                hint = did_you_mean(self.name, known)
                raise ValueError(
                    f"model={self.name!r} is neither a model nor the directory of an export{hint}; "
                    "see `vssm models`, or write one with `vssm export`"
                )
            return None
        check_options(self.name, self.options)
        check_checkpoint(self.checkpoint)
        return named_schedule(self.name, self.schedule, merge=self.merge, **self.rules)

    def _check_tokens(self) -> None:
        check_choice("tokens", self.tokens, TOKENS)
        if self.tokens == "gather":
            return
        if self.merge is not None or isinstance(self.schedule, MergeSchedule):
            raise ValueError(
                f"tokens={self.tokens!r} with merged tokens, which none of the others masks or "
                "fuses; use tokens='gather', or prune with a schedule alone"
            )
        if self.schedule is None:
            raise ValueError(
                f"tokens={self.tokens!r} without a schedule prunes nothing; give --schedule "
                "BLOCK:RATIO,..."
            )
        if self.tokens == "masked" and isinstance(self.schedule, PruneSchedule):
            raise ValueError(
                "tokens='masked' beside a PruneSchedule, which says so itself; leave it out, and "
                "pass schedule.changed(alignment='masked')"
            )
        if self.alignment is not None:
            raise ValueError(
                f"alignment={self.alignment!r} with tokens={self.tokens!r}: masked tokens stay in "
                "their places and fused ones are plain removal's, so training aligns nothing; "
                "leave it out, and give it to vssm export"
            )
        if self.conv is not None and self.tokens == "masked":
            raise ValueError(
                f"conv={self.conv!r} with tokens='masked', whose convolution sees every place; "
                "leave it out, and give it to vssm export"
            )


@dataclass(frozen=True)
class Resources:
    """How the work is laid out; only the last bits of sums depend on it.

    Attributes:
        workers: processes that load images, for each process that trains; None for up to four,
            as many as `threads` leave cores.
        micro_batch: images of one pass, whose gradients are added up; None for all of a step.
        save_every: steps between states, beside the one at the end of each epoch.
        device: "cpu" or "cuda".
        threads: of torch on the CPU; None for as many as `workers` leave cores, and torch has.

    Raises:
        ValueError: a number is out of its range.
    """

    workers: int | None = None
    micro_batch: int | None = None
    save_every: int = 100
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_least(0, workers=self.workers)
        check_least(1, micro_batch=self.micro_batch, save_every=self.save_every)
        check_least(1, threads=self.threads)


@dataclass(frozen=True)
class FinetuneRequest:
    """A whole training run.

    Attributes:
        source: the model.
        data: folder of images, laid out as ImageNet's training set; for a segmenter as ADE20K.
        output: directory for the weights, the state and the log.
        recipe: the numbers; for a segmenter a `SceneRecipe`.
        classes: which folder is which class, as for `evaluate`; None: by the labels that the
            checkpoint has, else by name, where that is certain. Not for a segmenter.
        resume: go on where the stopped run in `output` ended; refused where there is none.
        resources: how it is laid out.
        split: for a segmenter alone, the folder in images and annotations; None for "training".
        val: folder of images with the same class folders, on which the weights are measured before
            the first step and after each epoch; None for none. Not for a segmenter.

    Raises:
        TypeError: the recipe is not of the model's task.
        ValueError: something is given that the task has no use for, or the recipe distils, but
            there is no dense model with weights to distil from.
    """

    source: ModelSource
    data: Path
    output: Path
    recipe: Recipe | SceneRecipe = field(default_factory=Recipe)
    classes: str | os.PathLike[str] | None = None
    resume: bool = False
    resources: Resources = field(default_factory=Resources)
    split: str | None = None
    val: Path | None = None

    def __post_init__(self) -> None:
        if names_segmenter(self.source.name):
            self._check_scenes()
            return
        check_task(self.source.name, "classification", "training on folders of classes")
        if not isinstance(self.recipe, Recipe):
            raise TypeError(
                f"recipe={type(self.recipe).__name__} for {self.source.name!r}, which gives an "
                "image one class; give a Recipe"
            )
        if self.split is not None:
            raise ValueError(f"split={self.split!r}: a classifier's folder has none; leave it out")
        if self.source.backbone:
            raise ValueError(
                f"backbone=True for {self.source.name!r}: a segmenter's backbone alone is begun "
                "from a classifier's checkpoint; leave it out"
            )
        thinned = self.source.schedule is not None or self.source.merge is not None
        missing = not thinned or self.source.checkpoint is None
        if self.recipe.distil > 0 and missing:
            raise ValueError(
                f"distil={self.recipe.distil} needs a schedule and a checkpoint: the teacher is "
                "the dense model with its weights; give both, or distil=0"
            )
        # A teacher that knows nothing of the classes would teach noise.
        if self.recipe.distil > 0 and self.source.new_head:
            raise ValueError(
                f"distil={self.recipe.distil} with new_head=True: the teacher's head would be "
                "untrained too; give distil=0"
            )

    def _check_scenes(self) -> None:
        """A segmenter's run: what belongs to classifiers is refused."""
        name = self.source.name
        if not isinstance(self.recipe, SceneRecipe):
            raise TypeError(
                f"recipe={type(self.recipe).__name__} for {name!r}, which gives every pixel a "
                f"class; give SceneRecipe.published({name!r})"
            )
        if self.classes is not None:
            raise ValueError(
                f"classes={self.classes} for {name!r}: annotations have numbers, and no folders; "
                "leave it out"
            )
        if self.val is not None:
            raise ValueError(
                f"val={self.val} for {name!r}: top-1 is a classifier's; leave it out, and measure "
                "the mIoU of an export with `vssm evaluate`"
            )
        if self.source.tokens != "gather":
            raise ValueError(
                f"tokens={self.source.tokens!r} for {name!r}: a dense head needs what stands at "
                "pruned positions; use tokens='gather'"
            )


def names_segmenter(name: str) -> bool:
    """Whether a model's name is that of a segmenter."""
    card = cards().get(name)
    return card is not None and card.task == "segmentation"
