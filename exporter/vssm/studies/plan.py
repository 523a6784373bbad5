"""Which variants an ablation compares, the tables they stand in, and the published figures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vssm.errors import check_choice, check_least, check_most, check_several
from vssm.models.family import Published
from vssm.models.registry import check_name
from vssm.pruning.schedule import (
    ALIGNMENTS,
    CONVS,
    MergeSchedule,
    PruneSchedule,
    Schedule,
    checked_ratio,
)
from vssm.training.recipe import Recipe
from vssm.training.request import Resources

TRAINED: Final = ("dense", "evit", "none", "gap", "merge")
DEVICES: Final = ("cpu", "cuda")
_MOST_SEEDS: Final = 1000  # a model is built for each before anything is measured


@dataclass(frozen=True)
class AblationTraining:
    """How `ablate` makes fine-tuned rows: `vssm.finetune`, once for each variant and seed.

    Attributes:
        data: folder of images, laid out as ImageNet's training set.
        variants: keys of the variants that are trained.
        seeds: trainings of each variant; number i begins at checkpoint i modulo their number, and
            `seeds` is a multiple of it. None: one for each checkpoint.
        recipe: the numbers of every training; its seed is replaced.
        micro_batch: images of one pass, as `Resources` has it.
        save_every: steps between states, likewise.

    Raises:
        ValueError: a number is out of its range, or a variant is named twice.
    """

    data: Path
    variants: Sequence[str] = TRAINED
    seeds: int | None = None
    recipe: Recipe = field(default_factory=Recipe)
    micro_batch: int | None = None
    save_every: int = Resources.save_every

    def __post_init__(self) -> None:
        check_least(1, finetune_seeds=self.seeds)
        check_most(_MOST_SEEDS, finetune_seeds=self.seeds)
        check_several(variants=self.variants)
        if twice := [key for key in self.variants if self.variants.count(key) > 1]:
            raise ValueError(f"finetune={twice[0]!r} is named twice; name each variant once")


@dataclass(frozen=True)
class AblationOptions:
    """What `ablate` was asked for beside the model; the fields are the command's options.

    Attributes:
        seeds: of the random choice.
        ratios: keep ratios in (0, 1] of the sweep, as text.
        batch: images of a run.
        workers: processes that load images; 0 for this one alone; None for up to four, as many as
            `threads` leave cores.
        classes: which folder is which class, as for `evaluate`; None: by the model's labels, else
            by name, where that is certain.
        backend: "auto", "reference" or "kernel", as `VisionModel.use_backend` takes it.
        device: "cpu" or "cuda".
        threads: of torch on the CPU; None for as many as `workers` leave cores, and torch has.
        seed: the first of the random choice and of the trainings; the others follow it.
        checkpoints: further checkpoints of the same model: every variant runs with each.
        average: show the mean over the checkpoints, as over seeds of one training, in place of a
            row for each.
        finetuned: by variant, files with weights trained for it, one a seed.
        training: train variants here; None for zero-shot rows and `finetuned` alone.
        restart: measure anew, whatever a stopped ablation has left; trained weights stay.

    Raises:
        TypeError: one text or path stands where several are taken.
        ValueError: a number is out of its range, or a ratio or a file is named twice.
    """

    seeds: int = 3
    ratios: Sequence[str] = ("0.9", "0.8", "0.7", "0.6", "0.5")
    batch: int = 32
    workers: int | None = None
    classes: str | os.PathLike[str] | None = None
    backend: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    checkpoints: Sequence[Path] = ()
    average: bool = False
    finetuned: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    training: AblationTraining | None = None
    restart: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(0, seed=self.seed)
        check_least(1, seeds=self.seeds, batch=self.batch)
        check_most(_MOST_SEEDS, seeds=self.seeds)
        from vssm.runtimes.session import share_cores  # needs numpy, which --help does not wait for

        share_cores(self.threads, self.workers)  # which checks both
        check_choice("device", self.device, DEVICES)
        check_several(ratios=self.ratios, checkpoints=self.checkpoints)
        # Twice the same would be shown as two runs that agree, without any deviation.
        exact = [checked_ratio(ratio) for ratio in self.ratios]
        if twice := [str(ratio) for ratio in exact if exact.count(ratio) > 1]:
            raise ValueError(f"ratios={twice[0]} is named twice; name each keep ratio once")
        for key, files in self.finetuned.items():
            check_several(**{f"finetuned[{key!r}]": files})
            places = [Path(file).resolve() for file in files]
            if again := [str(place) for place in places if places.count(place) > 1]:
                raise ValueError(
                    f"finetuned={key}={again[0]} is named twice; several files of a variant are "
                    "trainings with several seeds, so name each once"
                )


METRICS: Final = ("clip", "sum", "l1", "l2")
METHODS, ALIGNMENT, IMPORTANCE, RATIO = "methods", "alignment", "importance", "keep ratio"
CONV: Final = "convolution"

_CONVS: Final = {"position": "by position", "compact": "along the list"}
_NAMES: Final = {"none": "plain removal", "gap": "aligned (gap)"}
_MERGED: Final = {"merge": "merged (R-MeeTo)", "merge+size": "merged, aligned (size)"}


@dataclass(frozen=True)
class Variant:
    """One model of the ablation: its schedule, and whether leftovers are fused (EViT-style)."""

    key: str
    schedule: Schedule | None
    fused: bool = False

    @property
    def tokens(self) -> str:
        """What training does with its pruned tokens, as `ModelSource.tokens` names it."""
        return "fused" if self.fused else "gather"  # a masked schedule says so itself

    @property
    def baseline(self) -> str:
        """Key of the plain removal of the same ratio, which it is compared with."""
        # "gap@0.7" stands beside "none@0.7", what has no ratio beside "none".
        _, at, ratio = self.key.partition("@")
        return f"none{at}{ratio}"


@dataclass(frozen=True)
class Run:
    """One model that is measured: a variant with some weights.

    Attributes:
        key: its name in the journal and in reports.
        variant: what runs.
        tuned: whether the weights were trained with that variant.
        number: of the checkpoint, from 0, or of the fine-tuning; equal numbers are compared.
        weights: their file; None for those of the checkpoint.
        checkpoint: which one it has or began with, from 0; None where nobody knows.
    """

    key: str
    variant: Variant
    tuned: bool
    number: int
    weights: Path | None = None
    checkpoint: int | None = None

    @property
    def name(self) -> str:
        """The variant and whether it is trained, without the number."""
        return f"fine-tuned {self.variant.key}" if self.tuned else self.variant.key


@dataclass(frozen=True)
class Line:
    """A row of a table: one variant, or several seeds of one."""

    table: str
    label: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Variants, and the rows that show them, in the tables' order."""

    variants: tuple[Variant, ...]
    lines: tuple[Line, ...]


def published(name: str, key: str, schedule: Schedule | None) -> Published:
    """What the papers print for a variant of a model of its size; nothing for other schedules."""
    card = check_name(name)
    if isinstance(schedule, MergeSchedule) and schedule != card.merged:
        return Published()
    # The dense figures are true whatever the schedule.
    if isinstance(schedule, PruneSchedule) and key != "dense":
        default = card.schedule
        if default is None or PruneSchedule.parse(default).ratios != schedule.ratios:
            return Published()
    return card.published.get(key, Published())


def make_plan(
    schedule: PruneSchedule,
    *,
    seeds: int,
    ratios: Sequence[str],
    seed: int = 0,
    other_conv: bool = False,
    merging: MergeSchedule | None = None,
) -> Plan:
    """The paper's comparisons on one schedule.

    Args:
        schedule: its blocks and ratios; alignment "gap" and importance "clip" are the reference.
        seeds: of the random choice.
        ratios: keep ratios that replace every stage's own, one after the other.
        seed: the first of the random choice.
        other_conv: compare with the convolution that the schedule does not have, too.
        merging: compare with it too, and with its sizes as gaps.

    Raises:
        ValueError: a ratio is not in (0, 1].
    """
    # One reference for all rows: of the given schedule, only blocks and ratios count.
    base = schedule.changed(alignment="gap", importance="clip", score_direction="sum", gated=False)
    plain = base.changed(alignment="none")
    aligned = [Variant(a, base.changed(alignment=a)) for a in ALIGNMENTS]
    scored = [Variant(m, base.changed(importance=m)) for m in METRICS[1:]]
    drawn = [
        Variant(f"random-{s}", base.changed(importance="random", seed=s))
        for s in range(seed, seed + seeds)
    ]
    conv = next(c for c in CONVS if c != base.conv)
    convolved = [
        Variant(f"{v.alignment}+{conv}", v.changed(conv=conv)) for v in (plain, base) if other_conv
    ]
    merged = (
        []
        if merging is None
        else [
            Variant(key, merging.changed(alignment=alignment))
            for key, alignment in zip(_MERGED, ("none", "size"), strict=True)
        ]
    )
    swept = [v for ratio in ratios for v in _at_ratio(ratio, base, plain)]
    lines = [
        Line(METHODS, "dense", ("dense",)),
        Line(METHODS, "EViT-style, one fused leftover", ("evit",)),
        *(Line(METHODS, label, (key,)) for key, label in _NAMES.items()),
        *(Line(METHODS, _MERGED[v.key], (v.key,)) for v in merged),
        *(Line(ALIGNMENT, a, (a,)) for a in ALIGNMENTS),
        # clip is the reference, which runs under the key "gap".
        *(Line(IMPORTANCE, m, ("gap" if m == "clip" else m,)) for m in METRICS),
        Line(IMPORTANCE, f"random, {seeds} seed{'s' * (seeds > 1)}", tuple(v.key for v in drawn)),
        *(
            Line(CONV, f"{_NAMES[v.key.removesuffix(f'+{conv}')]}, {_CONVS[conv]}", (v.key,))
            for v in convolved
        ),
        *(Line(RATIO, _ratio_label(v.key), (v.key,)) for v in swept),
    ]
    first = [Variant("dense", None), Variant("evit", plain, fused=True)]
    return Plan((*first, *merged, *aligned, *scored, *drawn, *convolved, *swept), tuple(lines))


def _at_ratio(ratio: str, base: PruneSchedule, plain: PruneSchedule) -> list[Variant]:
    return [
        Variant(f"{key}@{ratio}", s.changed(ratios=dict.fromkeys(s.ratios, ratio)))
        for key, s in (("none", plain), ("gap", base))
    ]


def _ratio_label(key: str) -> str:
    name, _, ratio = key.partition("@")
    return f"{ratio}, {_NAMES[name]}"
