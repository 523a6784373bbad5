"""The mixer of VMamba and GroupMamba: walks over a map as orders of one scan node.

A walk visits every token of a row-major map once. Projecting a token and then walking is walking
and then projecting, so delta, B and C are made in token order and `order` alone tells the walks
apart: no direction copies, transposes or flips its input. Sources: Liu et al., "VMamba",
arXiv:2401.10166; Shaker et al., "GroupMamba", arXiv:2407.13772.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.models.base import BlockCost
from vssm.models.layers import (
    LayerNorm,
    initial_a_log,
    initial_step_bias,
    over_grid,
    to_dtype,
    wide,
)
from vssm.ops import operators as ops

WALKS: Final = ("rows", "columns", "rows_back", "columns_back")


def walk_order(grid: tuple[int, int], walks: Sequence[str]) -> Tensor:
    """The token of each step, (1, walks, height * width) int32, of a row-major map.

    Args:
        grid: (height, width) of the map.
        walks: each one of WALKS; "columns" goes down the columns from left to right.
    """
    rows = torch.arange(math.prod(grid), dtype=torch.int32)
    columns = rows.reshape(grid).T.reshape(-1)
    orders = {"rows": rows, "columns": columns}
    orders |= {f"{name}_back": order.flip(0) for name, order in orders.items()}
    return torch.stack([orders[walk] for walk in walks])[None]


class MapWalks(nn.Module):
    """A map's size and the walks over it, as the scan takes them; no part of the state_dict."""

    order: Tensor
    gap: Tensor

    def __init__(self, grid: tuple[int, int], walks: Sequence[str]) -> None:
        super().__init__()
        self.grid = grid
        order = walk_order(grid, walks)
        # The official state_dict has no tables of walks: they follow from the map's size.
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("gap", torch.ones_like(order), persistent=False)


@dataclass(frozen=True)
class CrossScanConfig:
    """Sizes of one mixer; `gate` multiplies by silu(z) after the norm of the scan's output."""

    d_model: int
    d_inner: int
    d_state: int
    dt_rank: int
    directions: int
    conv_bias: bool
    gate: bool

    def cost(self, *, extra: int) -> BlockCost:
        """Cost by token of a block with this mixer and `extra` multiply-adds beside it."""
        inner, low = self.d_inner, self.dt_rank
        projections = (3 if self.gate else 2) * self.d_model * inner
        return BlockCost(
            # The 3x3 convolution runs once, before the directions part, so it is not theirs.
            shared=projections + 9 * inner + extra,
            branch=inner * (low + 2 * self.d_state + low),
            convolution=0,
            branches=self.directions,
            directions=self.directions,
            states=inner * self.d_state,
            per_token=inner,
        )


class CrossScanMixer(nn.Module):
    """in_proj, 3x3 depthwise convolution, silu, one scan of all walks, norm, gate, out_proj."""

    backend = "auto"  # see VisionModel.use_backend

    def __init__(self, config: CrossScanConfig) -> None:
        super().__init__()
        self.config = c = config
        low = c.dt_rank + 2 * c.d_state
        bound = c.d_inner**-0.5
        self.x_proj_weight = nn.Parameter(
            torch.empty(c.directions, low, c.d_inner).uniform_(-bound, bound)
        )
        bound = c.dt_rank**-0.5
        self.dt_projs_weight = nn.Parameter(
            torch.empty(c.directions, c.d_inner, c.dt_rank).uniform_(-bound, bound)
        )
        self.dt_projs_bias = nn.Parameter(initial_step_bias(c.directions, c.d_inner))
        # Flat over directions and channels, as the official keys A_logs
        # and Ds are; reshaped for the scan.
        self.A_logs = nn.Parameter(initial_a_log(c.directions * c.d_inner, c.d_state))
        self.Ds = nn.Parameter(torch.ones(c.directions * c.d_inner))
        self.out_norm = LayerNorm(c.d_inner, eps=1e-5)
        width = 2 * c.d_inner if c.gate else c.d_inner
        self.in_proj = nn.Linear(c.d_model, width, bias=False)
        self.conv2d = nn.Conv2d(
            c.d_inner, c.d_inner, 3, padding=1, groups=c.d_inner, bias=c.conv_bias
        )
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=False)

    def forward(self, x: Tensor, walks: MapWalks) -> Tensor:
        """Mixed tokens (batch, seqlen, d_model) of x, the row-major map that is walked over."""
        inner = self.config.d_inner
        dtype = self.in_proj.weight.dtype
        x = to_dtype(x, dtype)
        conv = self.conv2d
        u = functional.linear(x, self.in_proj.weight[:inner])
        u = over_grid(u, conv.weight, conv.bias, walks.grid, backend=self.backend)
        y = to_dtype(self.out_norm(self._scan(u[:, :, None], walks)), dtype)
        if self.config.gate:
            # Behind out_norm, so that the gate cannot go into the scan node as Vim's does.
            y = y * functional.silu(functional.linear(x, self.in_proj.weight[inner:]))
        return functional.linear(y, self.out_proj.weight)

    def _scan(self, u: Tensor, walks: MapWalks) -> Tensor:
        """Sum of the walks (batch, seqlen, d_inner) of u (batch, seqlen, 1, d_inner)."""
        c = self.config
        k = c.directions
        sizes = [k * c.dt_rank, k * c.d_state, k * c.d_state]
        # Projected in token order: walking and projecting commute,
        # and one product serves all walks.
        dt, B, C = functional.linear(u, self._low_projection()).split(sizes, dim=3)
        return ops.selective_scan(
            u,
            self._by_direction(dt @ self._step_projection(), c.d_inner),
            -torch.exp(wide(self.A_logs)).reshape(k, c.d_inner, c.d_state),
            self._by_direction(B, c.d_state),
            self._by_direction(C, c.d_state),
            D=wide(self.Ds).reshape(k, c.d_inner),
            delta_bias=wide(self.dt_projs_bias),
            order=walks.order,
            gap=walks.gap,
            backend=self.backend,
        )

    def _low_projection(self) -> Tensor:
        """x_proj_weight as one matrix: the rows for dt of all directions, then B's, then C's."""
        rank, state = self.config.dt_rank, self.config.d_state
        weight = self.x_proj_weight
        if self.config.directions == 1:
            return weight[0]
        # Slices: the exporter folds no Split.
        parts = (weight[:, :rank], weight[:, rank : rank + state], weight[:, rank + state :])
        return torch.cat([part.flatten(0, 1) for part in parts])

    def _by_direction(self, x: Tensor, width: int) -> Tensor:
        """(batch, seqlen, 1, directions * width) to (batch, seqlen, directions, width)."""
        k = self.config.directions
        return x if k == 1 else x.reshape(-1, x.shape[1], k, width)

    def _step_projection(self) -> Tensor:
        """dt_projs_weight as one matrix (directions * dt_rank, directions * d_inner).

        Block-diagonal: one product gives delta in the operator's layout. A product a direction
        would have to be transposed or joined afterwards, a copy of the largest tensor of the
        block, to save the zeros of a matrix that is small beside the other projections.
        """
        k, _, rank = self.dt_projs_weight.shape
        weight = self.dt_projs_weight.transpose(1, 2)
        if k == 1:
            return weight[0]
        blocks = torch.eye(k, dtype=weight.dtype, device=weight.device)
        return (blocks[:, None, :, None] * weight[:, :, None]).reshape(k * rank, -1)
