"""What a command's schedule means for a model, and the models' default schedules."""

from __future__ import annotations

from typing import Any

from vssm.models.registry import cards
from vssm.pruning.schedule import MergeSchedule, PruneSchedule, Schedule


def named_schedule(
    name: str, schedule: str | Schedule | None, *, merge: str | None = None, **rules: Any
) -> Schedule | None:
    """What a command's --schedule and --merge mean for a model.

    Args:
        name: the model's name.
        schedule: BLOCK:RATIO,..., "default", or None where nothing is pruned; one that is made
            already comes back.
        merge: what `MergeSchedule.parse` takes; None where nothing is merged.
        rules: alignment, importance, conv, restore and seed where given, for a text; None for their
            defaults.

    Raises:
        ValueError: the text is none, a rule does not fit, or the model has no default.
    """
    given: dict[str, Any] = {rule: value for rule, value in rules.items() if value is not None}
    if merge is not None:
        pruned = named_pruning(name, schedule, **rules)
        own = {rule: given[rule] for rule in ("alignment", "restore") if rule in given}
        return MergeSchedule.parse(merge, **own, prune=pruned)
    if isinstance(schedule, MergeSchedule):
        return schedule
    return named_pruning(name, schedule, **rules)


def named_pruning(name: str, schedule: str | Schedule | None, **rules: Any) -> PruneSchedule | None:
    """What a command's --schedule means where nothing merges; the same arguments and errors."""
    if isinstance(schedule, MergeSchedule):
        raise TypeError(f"schedule={schedule!r} does not prune; give a PruneSchedule")
    if schedule is None or isinstance(schedule, PruneSchedule):
        return schedule
    given: dict[str, Any] = {rule: value for rule, value in rules.items() if value is not None}
    if schedule == "default":
        return default_schedule(name, **given)
    if schedule.isalpha():
        raise ValueError(
            f"schedule={schedule!r} is neither BLOCK:RATIO pairs nor 'default'; write "
            "5:0.8,10:0.8, or default"
        )
    return PruneSchedule.parse(schedule, **given)


def default_schedules() -> dict[str, str]:
    """The default schedules of the models that have one, as text."""
    return {name: card.schedule for name, card in cards().items() if card.schedule is not None}


def default_schedule(name: str, **rules: Any) -> PruneSchedule:
    """The schedule of a model that `vssm export NAME --schedule default` takes.

    Args:
        name: a model's name.
        rules: alignment, importance and the other rules of `PruneSchedule`.

    Raises:
        ValueError: the model has none, or a rule does not fit.
    """
    known = default_schedules()
    if name not in known:
        raise ValueError(
            f"name={name!r} has no default schedule, only {', '.join(known)} have; "
            "name the blocks and ratios, such as 5:0.8,10:0.8, of a vim_* or plain_mamba_* model; "
            "the others cannot be pruned"
        )
    return PruneSchedule.parse(known[name], **rules)
