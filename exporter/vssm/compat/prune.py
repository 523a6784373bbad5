"""`prune`: a pruned twin of a model that the user has."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from vssm.compat.exact import evaluating
from vssm.compat.pruned import PrunedModule
from vssm.errors import UnsupportedError
from vssm.pruning.schedule import PruneSchedule, TokenLayout

_SAME: Final = 1e-4  # of the largest value, float32


def prune(
    model: nn.Module,
    schedule: PruneSchedule,
    example_input: Tensor,
    *,
    blocks: str = "layers",
    cls_index: int | None = None,
) -> PrunedModule:
    """A copy of `model` that prunes tokens between its blocks, with hidden-state alignment.

    For models whose blocks form a plain stack: `model.blocks[i](hidden, residual)` returns both,
    every block once and in order with nothing between, the mixer being mamba_ssm's Mamba version 1
    or Vim's bidirectional one. That is tried, not believed: our blocks must give the numbers of the
    model's. Behind the last block the kept tokens are back in their places, the pruned ones zero.

    Args:
        model: left as it was; float32, evaluated as in eval mode.
        schedule: which blocks prune, and how much.
        example_input: one input that the model takes; two for a batch axis that is not 1.
        blocks: attribute that holds the blocks, with dots.
        cls_index: place of the class token in the sequence, which is kept and read; None: as Vim's
            attributes say.

    Returns:
        A module for `export_module`; called, it returns what the model does.

    Raises:
        UnsupportedError: the model is no such stack, has no class token, or this schedule cannot be
            applied to it.
        ValueError: a block of the schedule, or `cls_index`, lies outside the model.
    """
    if schedule.step_parameters != "rank":
        raise UnsupportedError(
            f"step_parameters={schedule.step_parameters!r} is PlainMamba's choice; leave it out"
        )
    place = _class_place(model) if cls_index is None else cls_index
    dense = PrunedModule(model, blocks, None, TokenLayout(1, None, keep_odd=True))
    with torch.inference_mode():
        seqlen = _check_same(model, dense, example_input, place)
    _check_directions(schedule, dense)
    return PrunedModule(model, blocks, schedule, TokenLayout(seqlen, place, keep_odd=True))


def _class_place(model: Any) -> int:
    """Where Vim puts its class token."""
    remedy = "give cls_index=PLACE if the model reads one token, its class token, and no other"
    if not getattr(model, "if_cls_token", False):
        raise UnsupportedError(
            f"{type(model).__name__} has no if_cls_token that says that it reads a class token; "
            f"pooling over all places would count the pruned ones: {remedy}"
        )
    if getattr(model, "use_double_cls_token", False):
        raise UnsupportedError("two class tokens cannot be pruned around; use the dense model")
    patches = int(model.patch_embed.num_patches)
    return patches // 2 if getattr(model, "use_middle_cls_token", False) else 0


def _check_directions(schedule: PruneSchedule, dense: PrunedModule) -> None:
    backward = schedule.source == "backward" or schedule.importance == "as_released"
    if backward and dense.state.directions == 1:
        raise UnsupportedError(
            "source='backward' and importance='as_released' score by a backward scan, which this "
            "model has not; use source='sum' and another importance"
        )


def _check_same(model: nn.Module, dense: PrunedModule, example: Tensor, place: int) -> int:
    """The unpruned twin must be the model, and read the class token alone; its tokens."""
    with evaluating(model):
        want = model(example)
    name = type(model).__name__
    if not isinstance(want, Tensor):
        raise UnsupportedError(f"{name} returns {type(want).__name__}, not its logits; wrap it")
    if not _close(dense(example), want):
        raise UnsupportedError(
            f"{name} with this package's blocks gives other numbers; its stack does something "
            "that is not known here, and is not pruned as if it were"
        )
    seqlen = dense.state.seqlen
    if not 0 <= place < seqlen:
        raise ValueError(f"cls_index={place} is outside [0, {seqlen}), the model's tokens")
    dense.state.only_place = place
    if not _close(dense(example), want):
        raise UnsupportedError(
            f"{name} reads more than the token at cls_index={place} behind its blocks; a mean over "
            "all places would count the pruned ones: give the class token's place, or prune a "
            "model that classifies by one token"
        )
    return seqlen


def _close(got: Tensor, want: Tensor) -> bool:
    return float((want - got).abs().max()) <= _SAME * float(want.abs().max())
