"""What `vssm ablate` is asked for beside the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vssm.training.recipe import Recipe
from vssm.training.request import Work

TRAINED: Final = ("dense", "evit", "none", "gap")
DEVICES: Final = ("cpu", "cuda")


@dataclass(frozen=True)
class AblationTraining:
    """How `ablate` makes fine-tuned rows: `vssm.finetune`, once for each variant and seed.

    Attributes:
        data: folder of images, laid out as ImageNet's training set.
        variants: keys of the variants that are trained.
        seeds: trainings of each variant; seed i begins at checkpoint i modulo their number, and
            `seeds` is a multiple of it. None: one for each checkpoint.
        recipe: the numbers of every training; its seed is replaced.
        micro_batch: images of one pass, as `Work` has it.
        save_every: steps between states, likewise.

    Raises:
        ValueError: a number is out of its range, or a variant is named twice.
    """

    data: Path
    variants: Sequence[str] = TRAINED
    seeds: int | None = None
    recipe: Recipe = field(default_factory=Recipe)
    micro_batch: int | None = None
    save_every: int = Work.save_every

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"finetune_seeds={self.seeds} is below 1; train once at least")
        if twice := [key for key in self.variants if self.variants.count(key) > 1]:
            raise ValueError(f"finetune={twice[0]!r} is named twice; name each variant once")


@dataclass(frozen=True)
class AblationOptions:
    """What `ablate` was asked for beside the model; the fields are the command's options.

    Attributes:
        seeds: of the random choice.
        ratios: keep ratios in (0, 1] of the sweep, as text.
        batch: images of a run.
        workers: processes that load images; 0 for this one alone.
        classes: file that names the folder of each class, as `read_labels` takes it; None: sorted.
        operators: "auto", "oracle" or "kernel", as `VisionModel.use_operators` takes it.
        device: "cpu" or "cuda".
        checkpoints: further checkpoints of the same model, as from other seeds: every row runs
            with each.
        finetuned: by variant, files with weights trained for it, one a seed.
        training: train variants here; None for zero-shot rows and `finetuned` alone.
        restart: measure anew, whatever a stopped ablation has left; trained weights stay.

    Raises:
        ValueError: a number is out of its range.
    """

    seeds: int = 3
    ratios: Sequence[str] = ("0.9", "0.8", "0.7", "0.6", "0.5")
    batch: int = 32
    workers: int = 0
    classes: Path | None = None
    operators: str = "auto"
    device: str = "cpu"
    checkpoints: Sequence[Path] = ()
    finetuned: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    training: AblationTraining | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch={self.batch} is below 1; give the number of images of a run")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} is below 0; 0 loads images in this process")
        if self.device not in DEVICES:
            raise ValueError(
                f"device={self.device!r} is not one of {', '.join(DEVICES)}; choose one of these"
            )
