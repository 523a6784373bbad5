"""The models, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

from exporter.models.base import ForwardDetails, VisionModel
from exporter.models.vim import Vim, VimConfig
from exporter.schedule import PruneSchedule

__all__ = ["MODELS", "ForwardDetails", "VisionModel", "create_model", "list_models"]

# Family, constructor, configuration class, and what a name changes in it.
_Builder = Callable[..., VisionModel]
MODELS: Final[dict[str, tuple[_Builder, Any, dict[str, Any]]]] = {
    "vim_tiny": (Vim, VimConfig, {"d_model": 192}),
    "vim_small": (Vim, VimConfig, {"d_model": 384}),
    "vim_base": (Vim, VimConfig, {"d_model": 768}),
    "vim_tiny_stride8": (Vim, VimConfig, {"d_model": 192, "stride": 8}),
    "vim_small_stride8": (Vim, VimConfig, {"d_model": 384, "stride": 8}),
}


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(MODELS)


def create_model(
    name: str,
    *,
    schedule: PruneSchedule | None = None,
    num_classes: int = 1000,
    **overrides: Any,
) -> VisionModel:
    """A model in eval mode with the official state_dict keys and seeded-by-torch initial weights.

    Args:
        name: one of `list_models()`.
        schedule: token pruning; None for the dense model.
        num_classes: width of the classifier.
        overrides: fields of the family's configuration, such as image_size.

    Raises:
        ValueError: the name, an override or the schedule does not fit.
        UnsupportedError: the configuration cannot be pruned.
    """
    if name not in MODELS:
        raise ValueError(f"name={name!r} is not a model; choose one of {', '.join(MODELS)}")
    build, config_class, changes = MODELS[name]
    fields = [f.name for f in dataclasses.fields(config_class)]
    unknown = sorted(set(overrides) - set(fields))
    if unknown:
        raise ValueError(
            f"overrides={unknown}: {name} has no such option; its options are {', '.join(fields)}"
        )
    config = config_class(**{**changes, "num_classes": num_classes, **overrides})
    return build(config, schedule, name=name).eval()
