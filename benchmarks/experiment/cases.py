"""What the experiment trains: models, schedules and recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from vssm import Recipe

CLASSES: Final = 10
# Keys of trained weights: the dense model trained further, and one a variant of the ablation.
DENSE, FURTHER = "dense", "further"
RATIOS: Final = ("0.9", "0.8", "0.7", "0.6", "0.5")

_SMALL: Final[dict[str, Any]] = {"depth": 6, "d_model": 48, "d_state": 8, "patch_size": 4}
_VIM: Final = {**_SMALL, "image_size": 32, "stride": 4}
_PLAIN: Final = {
    **{**_SMALL, "image_size": 32, "conv_size": 3, "stem_width": 16, "stem_convs": 0},
    "layers_with_dwconv": (),
}
_LIGHT: Final[dict[str, Any]] = {
    **{"batch": 32, "ema": 0.0, "smoothing": 0.1, "mixup": 0.0, "cutmix": 0.0},
    **{"rand_augment": False, "color_jitter": 0.0, "erasing": 0.0, "repeats": 1},
    **{"crop": 0.6, "flip": 0.0},
}
_FROM_SCRATCH: Final = Recipe(
    **_LIGHT, epochs=28, lr=2e-3, min_lr=1e-5, warm_up_epochs=3, warm_up_lr=2e-4, weight_decay=0.05
)
_FURTHER: Final = Recipe(
    **_LIGHT, epochs=6, lr=5e-4, min_lr=1e-5, warm_up_epochs=0, weight_decay=0.05
)


@dataclass(frozen=True)
class Case:
    """A model and what is done with it.

    Attributes:
        key: name in files and tables.
        model: as `create_model` takes it.
        options: overrides of its configuration.
        schedule: blocks and ratios.
        seeds: of initial weights, order and augmentation: 0, 1, ...
        tuned: what the dense weights are trained further as.
        scratch, further: the recipes.
        step_factor: what the initial step sizes (delta) are multiplied by: 10 forgets ten times
            sooner.
        ratios: of the sweep, zero-shot.
    """

    key: str
    model: str
    options: Mapping[str, Any]
    schedule: str = "2:0.7,3:0.7,4:0.7"
    seeds: int = 5
    tuned: tuple[str, ...] = ()
    scratch: Recipe = _FROM_SCRATCH
    further: Recipe = _FURTHER
    step_factor: float = 1.0
    ratios: tuple[str, ...] = RATIOS


_TUNED: Final = (FURTHER, "none", "gap", "constant", "random-0")
_GRID: Final = ("none+grid", "gap+grid")
CASES: Final = (
    Case("vim-digits", "vim_tiny", _VIM, tuned=(*_TUNED, "masked", *_GRID)),
    Case("plain_mamba-digits", "plain_mamba_l1", _PLAIN, tuned=_TUNED),
    # A convolution of one token has no neighbours: what pruning changes is the scan alone.
    Case(
        *("vim-digits-no-conv", "vim_tiny", {**_VIM, "d_conv": 1}),
        tuned=("none", "gap"),
        ratios=(),
    ),
    Case(
        *("vim-digits-no-conv-fast", "vim_tiny", {**_VIM, "d_conv": 1}),
        tuned=("none", "gap"),
        ratios=(),
        step_factor=10.0,
    ),
    Case("vim-digits-fast", "vim_tiny", _VIM, step_factor=10.0, ratios=()),
    Case("vim-digits-slow", "vim_tiny", _VIM, step_factor=0.1, ratios=()),
)


def quick_cases() -> tuple[Case, ...]:
    """Two seeds, small models and few steps: whether all of it runs, in less than a minute."""
    found = []
    for case in CASES[:2]:
        small = {**case.options, "depth": 3, "d_model": 32, "d_state": 4}
        found.append(
            replace(
                case,
                options=small,
                schedule="1:0.7,2:0.7",
                seeds=2,
                tuned=(FURTHER, "none", "gap"),
                scratch=replace(case.scratch, epochs=16),
                further=replace(case.further, epochs=1),
                ratios=("0.5",),
            )
        )
    return tuple(found)
