"""Options of a command that would change nothing, or say something twice: meant otherwise."""

from __future__ import annotations

from collections.abc import Collection


def refuse_idle_options(
    *,
    schedule: object,
    checkpoint: object,
    source: str,
    model_options: Collection[str] = (),
    **rules: object,
) -> None:
    """Refuse what has no effect without its counterpart.

    Args:
        schedule: what prunes; None for a dense model.
        checkpoint: where weights come from; None for none.
        source: which weights of the checkpoint, "model" by default.
        model_options: keys of --set.
        rules: options that only a schedule has a use for, None where they are not given.

    Raises:
        ValueError: one of them is given without what it belongs to, or by a wrong name.
    """
    for option, value in rules.items():
        if value is not None and schedule is None:
            raise ValueError(
                f"{option}={value!r} without a schedule prunes nothing; give --schedule "
                "BLOCK:RATIO,... too, or leave it out"
            )
    if source != "model" and checkpoint is None:
        raise ValueError(f"source={source!r} without a checkpoint; give --checkpoint FILE")
    if "num_classes" in model_options:
        raise ValueError("--set num_classes: this option has a name of its own; --num-classes N")
