"""What every dense model is: a backbone and a neck that give levels, and a head that reads them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vssm.errors import CheckpointError, UnsupportedError
from vssm.models.base import VisionModel, refuse_merging
from vssm.models.dense.heads import ConvNorm, Size
from vssm.models.layers import resize_grid
from vssm.pruning.schedule import MergeStage, PruneSchedule, Schedule, Stage
from vssm.pruning.select import StageResult


@dataclass(frozen=True)
class Levels:
    """What a backbone and its neck give.

    Attributes:
        tensors: every map (batch, channels, height, width) by its official name.
        chosen: what each stage of the schedule kept.
        blocks: the blocks' outputs, where asked for.
    """

    tensors: Mapping[str, Tensor]
    chosen: list[StageResult] = field(default_factory=list)
    blocks: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)


class DenseModel(VisionModel):
    """Base of the segmenters and detectors. A subclass makes `backbone` and fills `_levels`.

    Attributes:
        feature_names: the maps that the head reads, finest first.
        level_sizes: their (height, width).
    """

    stages: Mapping[int, Stage | MergeStage]
    feature_names: tuple[str, ...]
    level_sizes: tuple[Size, ...]

    @abstractmethod
    def _levels(self, images: Tensor, with_blocks: bool) -> Levels:
        """The levels under `feature_names`, and what else has a name."""

    def stays_wide(self, name: str) -> bool:
        """Norms, and convolutions that are folded with one; a subclass adds its backbone's."""
        owner, _, _ = name.rpartition(".")
        above = self.get_submodule(owner.rpartition(".")[0])
        return isinstance(above, ConvNorm) or isinstance(
            self.get_submodule(owner), nn.BatchNorm2d | nn.LayerNorm
        )


def check_taps(taps: tuple[int, ...], depth: int, name: str = "taps") -> None:
    """Refuse blocks that the four levels cannot be read after.

    Raises:
        ValueError: there are not four, in order, the last block the last of them.
    """
    if len(taps) != 4 or list(taps) != sorted({*taps}) or taps[0] < 1 or taps[-1] != depth:
        raise ValueError(
            f"{name}={list(taps)} are not four of the blocks 1 to {depth} in order, the last being "
            f"{depth}; give them, counted from 1"
        )


def check_restoring(schedule: Schedule | None) -> None:
    """Refuse a schedule after which a dense head would have nothing to read at some position.

    Raises:
        UnsupportedError: tokens stay in the sequence as zeros, or some of those that are gone have
            joined no other and are to show it.
        ValueError: two rules say what they show.
    """
    if schedule is None:
        return
    if schedule.alignment == "masked":
        raise UnsupportedError(
            "alignment='masked' keeps every token in its place, so there is nothing for a dense "
            "head to restore; use alignment='gap', 'constant' or 'none'"
        )
    if isinstance(schedule, PruneSchedule):
        return
    if schedule.restore == "group" and (schedule.prune is not None or schedule.mode == "drop"):
        raise UnsupportedError(
            "restore='group' with tokens that go and join no other, by prune or mode='drop'; use "
            "restore='frozen', 'zero' or 'nearest'"
        )
    if schedule.prune is not None and schedule.prune.restore != schedule.restore:
        raise ValueError(
            f"restore={schedule.restore!r} with prune.restore={schedule.prune.restore!r}: one "
            "head reads both; give the same to both"
        )


def only_pruning(schedule: Schedule | None) -> PruneSchedule | None:
    """The schedule of a PlainMamba with a dense head.

    Raises:
        UnsupportedError: its tokens merge, or stay in the sequence as zeros.
    """
    pruning = refuse_merging("PlainMamba needs the place of every token in its grid", schedule)
    check_restoring(pruning)
    return pruning


def classifier_positions(state: dict[str, Tensor], grid: Size) -> dict[str, Tensor]:
    """A classifier's tensors with the table of positions of its patches alone, for this grid.

    One row more than a square grid has is that of a class token in the middle, where all released
    models that have one have it; two are those of one at each end.

    Raises:
        CheckpointError: the table is of no square grid.
    """
    table = state.get("pos_embed")
    # What is not a table at all is left as it is: the loader compares
    # shapes and says what is wrong.
    if table is None or table.dim() != 3:
        return state
    side = math.isqrt(table.shape[1])
    patches = side * side
    # A larger square is further away than two rows.
    rows = {0: (), 1: (patches // 2,), 2: (0, patches + 1)}.get(table.shape[1] - patches)
    if rows is None:
        raise CheckpointError(
            f"pos_embed.shape={tuple(table.shape)} is not a square grid with at most two class "
            "tokens; give a classifier that was trained on square images"
        )
    is_patch = torch.ones(table.shape[1], dtype=torch.bool)
    is_patch[list(rows)] = False
    table = table[:, is_patch]
    if (side, side) != grid:
        table = resize_grid(table, (side, side), grid)
    return {**state, "pos_embed": table}
