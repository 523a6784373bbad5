"""PlainMamba's continuous walks over the grid of patches, dense and among kept tokens.

Source: Yang et al., "PlainMamba", arXiv:2403.17695, and the tables of its public code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.pruning.walks import Steps

DIRECTIONS = 4
MOVES = 5  # start, right, left, up, down


def grid_walks(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four walks over a grid of row-major places, and the move that leads to each step.

    A snake over the rows from the top left corner, its reverse, a snake over the columns from
    there, its reverse.

    Returns:
        order (4, places), the place of each step; move (4, places): 0 at the start, else 1 right,
        2 left, 3 up, 4 down. Both int64.
    """
    places = torch.arange(height * width).reshape(height, width)
    over_rows, over_columns = (_snake(lines) for lines in (places, places.T))
    order = torch.stack([over_rows, over_rows.flip(0), over_columns, over_columns.flip(0)])
    down, right = (order // width).diff(), (order % width).diff()
    move = (right > 0) * 1 + (right < 0) * 2 + (down < 0) * 3 + (down > 0) * 4
    return order, functional.pad(move, (1, 0))


def _snake(lines: Tensor) -> Tensor:
    """The places of all lines, every other line backwards."""
    lines = lines.clone()
    lines[1::2] = lines[1::2].flip(1)
    return lines.flatten()


class GridWalks(nn.Module):
    """The walks as tables that are no part of a checkpoint.

    Steps are numbered through all walks (those of walk k begin at k * places), so that one table
    holds the moves of all.
    """

    order: Tensor
    move: Tensor
    entry: Tensor

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        order, move = grid_walks(*grid)
        self.places = order.shape[1]
        entry = order.argsort(1) + self._first_steps(order.device)[:, None]
        for name, table in (
            ("order", order[None]),  # (1, 4, places): the place of each step
            ("move", move.flatten()),  # (4 * places,): the move that leads to each step
            ("entry", entry.T.contiguous()),  # (places, 4): the step that enters each place
        ):
            self.register_buffer(name, table.int(), persistent=False)

    def dense(self) -> Steps:
        """The steps over every place."""
        code = self.move.reshape(1, DIRECTIONS, self.places).transpose(1, 2)
        return Steps(self.order, torch.ones_like(self.order), code)

    def among(self, position: Tensor) -> Steps:
        """The steps over the tokens at `position`: each walk's own, in its own order."""
        entry = self.entry[position.long()]  # (batch, seqlen, 4)
        step, slot = entry.topk(entry.shape[1], dim=1, largest=False, sorted=True)
        last = torch.arange(entry.shape[1], device=step.device) - 1
        gap = step - step.index_select(1, last.clamp(min=0))
        return Steps(
            order=slot.int().transpose(1, 2),
            gap=gap.transpose(1, 2),
            code=self.move[step.long()],
            walked=step - self._first_steps(step.device),
        )

    def _first_steps(self, device: torch.device) -> Tensor:
        """(4,) int32: the number of each walk's first step."""
        return torch.arange(DIRECTIONS, dtype=torch.int32, device=device) * self.places
