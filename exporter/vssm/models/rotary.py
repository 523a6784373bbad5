"""Vim's rotary position embedding: tables of a grid's angles, and what turns by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vssm.models.layers import to_dtype, wide
from vssm.pruning.select import Tokens


class RopeTables(nn.Module):
    """The official buffers `freqs_cos` and `freqs_sin`, (patches, d_model)."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, cos: Tensor, sin: Tensor, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("freqs_cos", cos, persistent=persistent)
        self.register_buffer("freqs_sin", sin, persistent=persistent)


def rope_tables(
    d_model: int, grid: tuple[int, int], pretrained: int, *, persistent: bool = True
) -> RopeTables:
    """Tables of a grid, its positions scaled to the `pretrained` side.

    f_j = 10000^(-2j / (d_model/2)); the first half of the channels turns by the row, the second by
    the column, every frequency on a pair of neighbours. Persistent, though they can be computed:
    the official state_dict has both, and keys must match.
    """
    half = d_model // 2
    freqs = 1.0 / 10000 ** (torch.arange(0, half, 2)[: half // 2].float() / half)

    def angles(side: int) -> Tensor:
        # A larger grid is squeezed into the trained range of angles instead of running beyond it.
        position = torch.arange(side).float() / side * pretrained
        return (position[:, None] * freqs).repeat_interleave(2, dim=1)

    rows, columns = (angles(side) for side in grid)
    both = torch.cat(
        [
            rows[:, None, :].expand(-1, grid[1], -1),
            columns[None, :, :].expand(grid[0], -1, -1),
        ],
        dim=-1,
    ).reshape(-1, d_model)
    return RopeTables(both.cos(), both.sin(), persistent=persistent)


def rotate(x: Tensor, tables: RopeTables, tokens: Tokens) -> Tensor:
    """X (batch, seqlen, d_model) turned by its tokens' positions.

    As in the official code the first token is left alone where a class token makes the length
    odd, even when that class token stands elsewhere.
    """
    cos, sin = wide(tables.freqs_cos), wide(tables.freqs_sin)
    # The unpruned length decides: a pruned sequence can have any length and keeps its old angles.
    if tokens.full_seqlen == cos.shape[0] + 1:
        cos = torch.cat([torch.ones_like(cos[:1]), cos])
        sin = torch.cat([torch.zeros_like(sin[:1]), sin])
    # By original position, so that pruning does not turn the tokens that are left differently.
    index = tokens.position.long()
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(2)
    return to_dtype(x * cos[index] + turned * sin[index], x.dtype)


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding before a block, on the streams that the official code rotates.

    `tables` is None where there is none; `with_residual` says whether it turns the residual too.
    """

    tables: RopeTables | None
    with_residual: bool

    def __call__(
        self, hidden: Tensor | None, residual: Tensor, tokens: Tokens
    ) -> tuple[Tensor | None, Tensor]:
        """The streams in front of a block; there is no hidden one before the first."""
        if self.tables is None:
            return hidden, residual
        if hidden is None:  # the first block: the tokens are the hidden stream, no residual yet
            return hidden, rotate(residual, self.tables, tokens)
        hidden = rotate(hidden, self.tables, tokens)
        if self.with_residual:
            residual = rotate(residual, self.tables, tokens)
        return hidden, residual
