"""Rotary position embedding as Vim's early models have it (EVA-02's, by table over the grid)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vssm.models.layers import wide
from vssm.pruning.select import Tokens


class RopeTables(nn.Module):
    """The official persistent buffers `freqs_cos` and `freqs_sin`, (patches, d_model)."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.register_buffer("freqs_cos", cos)
        self.register_buffer("freqs_sin", sin)


def rope_tables(d_model: int, grid: tuple[int, int], pretrained: int) -> RopeTables:
    """Tables of a grid, its places scaled to the `pretrained` side.

    f_j = 10000^(-2j / (d_model/2)); the first half of the channels turns by the row, the second by
    the column, every frequency on a pair of neighbours.
    """
    half = d_model // 2
    freqs = 1.0 / 10000 ** (torch.arange(0, half, 2)[: half // 2].float() / half)

    def angles(side: int) -> Tensor:
        place = torch.arange(side).float() / side * pretrained
        return (place[:, None] * freqs).repeat_interleave(2, dim=1)

    rows, columns = (angles(side) for side in grid)
    both = torch.cat(
        [
            rows[:, None, :].expand(-1, grid[1], -1),
            columns[None, :, :].expand(grid[0], -1, -1),
        ],
        dim=-1,
    ).reshape(-1, d_model)
    return RopeTables(both.cos(), both.sin())


def rotate(x: Tensor, tables: RopeTables, tokens: Tokens) -> Tensor:
    """Turn x (batch, seqlen, d_model) turned by its tokens' places.

    As in the official code the first token is left alone where a class token makes the length
    odd, even when that class token stands elsewhere.
    """
    cos, sin = wide(tables.freqs_cos), wide(tables.freqs_sin)
    if tokens.full_seqlen == cos.shape[0] + 1:
        cos = torch.cat([torch.ones_like(cos[:1]), cos])
        sin = torch.cat([torch.zeros_like(sin[:1]), sin])
    index = tokens.position.long()
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(2)
    return (x * cos[index] + turned * sin[index]).to(x.dtype)
