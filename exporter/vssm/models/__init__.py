"""The models, by name. torch comes with the first that is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from vssm.extras import explain_missing
from vssm.models.catalogue import MODELS, check_name, check_options
from vssm.pruning.schedule import Schedule

if TYPE_CHECKING:
    from vssm.models.base import VisionModel

_SEED: Final = 0


def families() -> dict[str, tuple[Callable[..., VisionModel], Any]]:
    """The class of each family's models, and that of its configuration.

    Raises:
        MissingPackageError: torch is not installed.
    """
    with explain_missing():
        from vssm.models.dense import plain_mamba, vim, vmamba
        from vssm.models.groupmamba import GroupMamba, GroupMambaConfig
        from vssm.models.plain_mamba import PlainMamba, PlainMambaConfig
        from vssm.models.vim import Vim, VimConfig
        from vssm.models.vmamba import VMamba, VMambaConfig
    return {
        "vim": (Vim, VimConfig),
        "plain_mamba": (PlainMamba, PlainMambaConfig),
        "vmamba": (VMamba, VMambaConfig),
        "groupmamba": (GroupMamba, GroupMambaConfig),
        "vim_segmenter": (vim.VimSegmenter, vim.VimSegmenterConfig),
        "plain_mamba_segmenter": (
            plain_mamba.PlainMambaSegmenter,
            plain_mamba.PlainMambaSegmenterConfig,
        ),
        "vmamba_segmenter": (vmamba.VMambaSegmenter, vmamba.VMambaSegmenterConfig),
        "vim_detector": (vim.VimDetector, vim.VimDetectorConfig),
        "plain_mamba_detector": (
            plain_mamba.PlainMambaDetector,
            plain_mamba.PlainMambaDetectorConfig,
        ),
        "vmamba_detector": (vmamba.VMambaDetector, vmamba.VMambaDetectorConfig),
    }


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(MODELS)


def create_model(
    name: str,
    *,
    schedule: Schedule | None = None,
    num_classes: int | None = None,
    backend: str = "auto",
    **overrides: Any,
) -> VisionModel:
    """A model in eval mode with the official state_dict keys and seeded initial weights.

    The weights depend on the configuration alone, not on torch's global generator, which is left
    as it was.

    Args:
        name: one of `list_models()`.
        schedule: token pruning or merging; None for the dense model.
        num_classes: width of the logits; None for the model's own, 1000 or those of its data set.
        backend: what computes the custom operators, as for `VisionModel.use_backend`.
        overrides: fields of the family's configuration, such as image_size: 384, (224, 320) or
            "224x320", height first.

    Raises:
        ValueError: the name, an override or the schedule does not fit.
        TypeError: an override has another type than its field, or the schedule is none.
        UnsupportedError: the configuration can be neither pruned nor merged, or not so.
    """
    card = check_name(name)
    classes = card.num_classes if num_classes is None else num_classes
    config = {**card.changes, "num_classes": classes, **overrides}
    return model_from_config(name, config, schedule).use_backend(backend)


def model_from_config(
    name: str, config: Mapping[str, Any], schedule: Schedule | None = None
) -> VisionModel:
    """A model from its whole configuration, as model.json holds it; errors as `create_model`'s."""
    checked = check_options(name, config)
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule={schedule!r} is no schedule; write for example "
            "vssm.PruneSchedule({5: 0.8, 10: 0.8}) or vssm.MergeSchedule(r=5)"
        )
    build, config_class = families()[MODELS[name].family]
    import torch

    # Without the empty list torch would save and restore the generator of every GPU as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)  # torch.manual_seed would seed GPUs as well
        return build(config_class(**checked), schedule, name=name).eval()


def standard_config(name: str) -> dict[str, Any]:
    """The configuration of a model without overrides, as `asdict` gives it."""
    _, config_class = families()[check_name(name).family]
    return asdict(config_class(**MODELS[name].changes))
