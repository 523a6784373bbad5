"""The models, by name."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, Final, get_args, get_origin, get_type_hints

import torch

from vssm.models.base import ForwardDetails as ForwardDetails
from vssm.models.base import VisionModel
from vssm.models.groupmamba import GroupMamba, GroupMambaConfig
from vssm.models.plain_mamba import PlainMamba, PlainMambaConfig
from vssm.models.vim import Vim, VimConfig
from vssm.models.vmamba import VMamba, VMambaConfig
from vssm.pruning.schedule import PruneSchedule

_SEED: Final = 0
_VANILLA: Final[dict[str, Any]] = {
    "d_state": 16,
    "expand": 2.0,
    "conv_bias": True,
    "gate": True,
    "mlp_ratio": 0.0,
    "patch_embed": "v1",
    "downsample": "v1",
}
# Family, constructor, configuration class, and what a name changes in it.
_Builder = Callable[..., VisionModel]
MODELS: Final[dict[str, tuple[_Builder, Any, dict[str, Any]]]] = {
    "vim_tiny": (Vim, VimConfig, {"d_model": 192}),
    "vim_small": (Vim, VimConfig, {"d_model": 384}),
    "vim_base": (Vim, VimConfig, {"d_model": 768}),
    "vim_tiny_stride8": (Vim, VimConfig, {"d_model": 192, "stride": 8}),
    "vim_small_stride8": (Vim, VimConfig, {"d_model": 384, "stride": 8}),
    "plain_mamba_l1": (
        PlainMamba,
        PlainMambaConfig,
        {"d_model": 192, "stem_convs": 1, "layers_with_dwconv": (0,)},
    ),
    "plain_mamba_l2": (PlainMamba, PlainMambaConfig, {"d_model": 384}),
    "plain_mamba_l3": (PlainMamba, PlainMambaConfig, {"d_model": 448, "depth": 36}),
    "vmamba_tiny_s1l8": (VMamba, VMambaConfig, {"depths": (2, 2, 8, 2)}),
    "vmamba_tiny_s2l5": (VMamba, VMambaConfig, {"depths": (2, 2, 5, 2), "expand": 2.0}),
    "vmamba_small_s2l15": (VMamba, VMambaConfig, {"depths": (2, 2, 15, 2), "expand": 2.0}),
    "vmamba_small_s1l20": (VMamba, VMambaConfig, {"depths": (2, 2, 20, 2)}),
    "vmamba_base_s2l15": (
        VMamba,
        VMambaConfig,
        {"depths": (2, 2, 15, 2), "d_model": 128, "expand": 2.0},
    ),
    "vmamba_base_s1l20": (VMamba, VMambaConfig, {"depths": (2, 2, 20, 2), "d_model": 128}),
    "vanilla_vmamba_tiny": (VMamba, VMambaConfig, {**_VANILLA, "depths": (2, 2, 9, 2)}),
    "vanilla_vmamba_small": (VMamba, VMambaConfig, {**_VANILLA, "depths": (2, 2, 27, 2)}),
    "vanilla_vmamba_base": (
        VMamba,
        VMambaConfig,
        {**_VANILLA, "depths": (2, 2, 27, 2), "d_model": 128},
    ),
    "groupmamba_tiny": (GroupMamba, GroupMambaConfig, {}),
    "groupmamba_small": (
        GroupMamba,
        GroupMambaConfig,
        {"stem_width": 64, "widths": (64, 128, 348, 512), "depths": (3, 4, 16, 3)},
    ),
    "groupmamba_base": (
        GroupMamba,
        GroupMambaConfig,
        {"stem_width": 64, "widths": (96, 192, 424, 512), "depths": (3, 6, 21, 3)},
    ),
}


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(MODELS)


def create_model(
    name: str,
    *,
    schedule: PruneSchedule | None = None,
    num_classes: int = 1000,
    backend: str = "auto",
    **overrides: Any,
) -> VisionModel:
    """A model in eval mode with the official state_dict keys and seeded initial weights.

    The weights depend on the configuration alone, not on torch's global generator, which is left
    as it was.

    Args:
        name: one of `list_models()`.
        schedule: token pruning; None for the dense model.
        num_classes: width of the classifier.
        backend: what computes the custom operators, as for `VisionModel.use_backend`.
        overrides: fields of the family's configuration, such as image_size.

    Raises:
        ValueError: the name, an override or the schedule does not fit.
        TypeError: an override has another type than its field.
        UnsupportedError: the configuration cannot be pruned.
    """
    _, _, changes = _entry(name)
    config = {**changes, "num_classes": num_classes, **overrides}
    return model_from_config(name, config, schedule).use_backend(backend)


def model_from_config(
    name: str, config: Mapping[str, Any], schedule: PruneSchedule | None = None
) -> VisionModel:
    """A model from its whole configuration, as model.json holds it; errors as `create_model`'s."""
    build, config_class, _ = _entry(name)
    fields = [f.name for f in dataclasses.fields(config_class)]
    unknown = sorted(set(config) - set(fields))
    if unknown:
        raise ValueError(
            f"overrides={unknown}: {name} has no such option; its options are {', '.join(fields)}"
        )
    _check_types(config_class, config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)  # torch.manual_seed would seed GPUs as well
        return build(config_class(**config), schedule, name=name).eval()


def _check_types(config_class: Any, config: Mapping[str, Any]) -> None:
    """Refuse a text for a number, or for true or false: any text counts as true."""
    hints = get_type_hints(config_class)
    for key, value in config.items():
        union = isinstance(hints[key], types.UnionType)
        allowed = get_args(hints[key]) if union else (hints[key],)
        kinds = tuple(tuple if get_origin(kind) is tuple else kind for kind in allowed)
        kinds += ((list,) if tuple in kinds else ()) + ((int,) if float in kinds else ())
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise TypeError(
                f"{key}={value!r} is not of type {names}; give one (true, 16, [32, 48])"
            )


def _entry(name: str) -> tuple[_Builder, Any, dict[str, Any]]:
    if name not in MODELS:
        raise ValueError(f"name={name!r} is not a model; choose one of {', '.join(MODELS)}")
    return MODELS[name]
