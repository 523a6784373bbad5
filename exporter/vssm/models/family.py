"""What a family of models says of itself, without torch: its classes, models and figures."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from vssm.errors import check_choice
from vssm.extras import explain_missing
from vssm.pruning.schedule import MergeSchedule

if TYPE_CHECKING:
    from vssm.models.base import VisionModel

TASKS: Final = ("classification", "segmentation", "detection")


@dataclass(frozen=True)
class Figures:
    """What is counted of a model at its standard configuration.

    Attributes:
        parameters: numbers that are trained.
        stage_tokens: tokens of the blocks in order, repeats left out.
        flops_published: multiply-adds of one image by the published rule.
        flops_true: with every scan direction counted.
        image_size: (height, width) in pixels.
    """

    parameters: int
    stage_tokens: tuple[int, ...]
    flops_published: int
    flops_true: int
    image_size: tuple[int, int] = (224, 224)


@dataclass(frozen=True)
class Published:
    """Figures that a paper prints: GFLOPs and top-1 in percent, None where it prints none."""

    gflops: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class OfficialCheckpoint:
    """Where the authors of a model publish its weights.

    Attributes:
        address: hf://OWNER/REPO/FILE, which `vssm.load_checkpoint` takes, or an https:// address to
            download from. Without /FILE the hub's repository holds one file of weights.
        megabytes: its size in units of 10^6 bytes, as the hub prints it; None where none is known.
        sha256: of the file, as the hub prints it; None where none is known.
    """

    address: str
    megabytes: float | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class ModelCard:
    """One name of a family.

    Attributes:
        changes: what the name changes in the family's configuration.
        figures: what `vssm models` shows; None to count it when it is asked for, which takes torch.
        task: "classification", "segmentation" or "detection".
        num_classes: width of the logits, unless another is asked for.
        schedule: its default schedule, such as "5:0.8,10:0.8"; None for none.
        published: figures to show beside an ablation's, by variant: "dense", "none", "gap", ...
            Those of a pruning are of `schedule`.
        merged: what the published figures of merging are of.
        checkpoint: the official weights; None where none are published.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    figures: Figures | None = None
    task: str = "classification"
    num_classes: int = 1000
    schedule: str | None = None
    published: Mapping[str, Published] = field(default_factory=dict)
    merged: MergeSchedule | None = None
    checkpoint: OfficialCheckpoint | None = None

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)


@dataclass(frozen=True)
class ModelFamily:
    """A family of models; `vssm.register_family` adds one to those that every function takes.

    Attributes:
        name: of the family, for errors.
        model: its class, a `VisionModel` that is made by (config, schedule, name=...), or
            "module:Class", which is imported when the first model is made.
        config: the class of its configuration, a frozen dataclass, or "module:Class".
        cards: its models by their names.
        options: fields of the configuration and their types; None to read them from the class.
        magnifies: how much more the family magnifies rounding than Vim; `vssm check` multiplies
            its tolerances with it.
    """

    name: str
    model: type[VisionModel] | str
    config: type[Any] | str
    cards: Mapping[str, ModelCard]
    options: Mapping[str, Any] | None = None
    magnifies: float = 1.0

    def __post_init__(self) -> None:
        for what in ("model", "config"):
            value = getattr(self, what)
            if isinstance(value, str) and not all(value.partition(":")):
                raise ValueError(
                    f"{what}={value!r} is not module:Class; write for example my_models:MyModel, "
                    "or give the class itself"
                )

    def classes(self) -> tuple[Callable[..., VisionModel], Any]:
        """The class of the models and that of their configuration.

        Raises:
            MissingPackageError: torch is not installed.
        """
        return _load(self.model), _load(self.config)

    def fields(self) -> Mapping[str, Any]:
        """Fields of the configuration and their types."""
        return typing.get_type_hints(_load(self.config)) if self.options is None else self.options


def _load(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    module, _, name = given.partition(":")
    with explain_missing():
        return getattr(importlib.import_module(module), name)
