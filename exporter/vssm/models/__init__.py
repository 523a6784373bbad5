"""The models, by name. torch comes with the first that is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from vssm.extras import explain_missing
from vssm.models.family import Figures
from vssm.models.registry import cards, check_name, check_options, family_of
from vssm.pruning.schedule import Schedule

if TYPE_CHECKING:
    from vssm.models.base import VisionModel

_SEED: Final = 0


def list_models() -> list[str]:
    """Names that `create_model` takes."""
    return list(cards())


def describe_models() -> list[dict[str, Any]]:
    """Name, task, parameters, image size, tokens, cost and official checkpoint of every model.

    "tokens" are those of the first block, "stage_tokens" those of all, repeats left out.
    """
    rows = []
    for name, card in cards().items():
        figures = card.figures or _counted(name)
        rows.append(
            {
                "name": name,
                "task": card.task,
                "parameters": figures.parameters,
                "image_size": figures.image_size,
                "tokens": figures.stage_tokens[0],
                "stage_tokens": figures.stage_tokens,
                "flops_published": figures.flops_published,
                "flops_true": figures.flops_true,
                "checkpoint": card.checkpoint,
            }
        )
    return rows


def _counted(name: str) -> Figures:
    with explain_missing():
        from vssm.models.cost import figures_of
    return figures_of(name)


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
            f"schedule={schedule!r} is not a schedule; write for example "
            "vssm.PruneSchedule({5: 0.8, 10: 0.8}) or vssm.MergeSchedule(r=5)"
        )
    build, config_class = family_of(name).classes()
    with explain_missing():
        import torch

    # Without the empty list torch would save and restore the generator of every GPU as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)  # torch.manual_seed would seed GPUs as well
        return build(config_class(**checked), schedule, name=name).eval()


def standard_config(name: str) -> dict[str, Any]:
    """The configuration of a model without overrides, as `asdict` gives it."""
    _, config_class = family_of(name).classes()
    return asdict(config_class(**check_name(name).changes))
