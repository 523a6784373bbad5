"""PlainMamba's mixer: projections, a convolution over the grid, one scan node for four walks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.models.layers import initial_a_log, initial_dt_proj, over_grid, wide
from vssm.models.plain_mamba_config import PlainMambaConfig
from vssm.models.plain_mamba_walks import MOVES
from vssm.ops import operators as ops
from vssm.pruning.select import ScanOutputs, ScoreRule, Tokens


@dataclass(frozen=True)
class _Operands:
    """The scan's inputs in operator layout; the walks share all but B, or none of delta, B, C."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor


class PlainMambaMixer(nn.Module):
    """in_proj, depthwise convolution over the grid, x_proj, dt_proj, scan, gate, out_proj.

    Only u follows the walks: step t of a walk uses delta, B and C of the t-th token in row-major
    order, and B has a vector added for the move that led to the step. The bias of dt_proj counts
    twice: in dt_proj and again in the scan.
    """

    operators = "auto"  # see VisionModel.use_operators

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.config = config
        width, inner, states = config.d_model, config.d_inner, config.d_state
        self.in_proj = nn.Linear(width, 2 * inner)
        side = config.conv_size
        self.conv2d = nn.Conv2d(inner, inner, side, padding=side // 2, groups=inner)
        self.x_proj = nn.Linear(inner, config.rank + 2 * states, bias=False)
        self.dt_proj = initial_dt_proj(config.rank, inner)
        self.A_log = nn.Parameter(initial_a_log(inner, states))
        self.D = nn.Parameter(torch.ones(inner))
        self.direction_Bs = nn.Parameter(torch.zeros(MOVES, states))
        nn.init.trunc_normal_(self.direction_Bs, std=0.02)
        self.out_proj = nn.Linear(inner, width)

    def forward(
        self, x: Tensor, tokens: Tokens, rule: ScoreRule | None
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed (batch, seqlen, d_model), and the (batch, seqlen) score if there is a rule."""
        weight, bias, inner = self.in_proj.weight, self.in_proj.bias, self.config.d_inner
        z = functional.linear(x, weight[inner:], bias[inner:])
        x = functional.linear(x, weight[:inner], bias[:inner])
        y, score = self._scan(self._operands(self._convolve(x, tokens), tokens), z, tokens, rule)
        return self.out_proj(y), score

    def _convolve(self, x: Tensor, tokens: Tokens) -> Tensor:
        """The convolution of x (batch, seqlen, d_inner) over the grid, at every place of it."""
        places = tokens.to_places(x).to(self.conv2d.weight.dtype)
        return over_grid(places, self.config.grid, self.conv2d).to(x.dtype)

    def _operands(self, convolved: Tensor, tokens: Tokens) -> _Operands:
        """The scan's inputs from the convolution (batch, full_seqlen, d_inner)."""
        c = self.config
        u = functional.silu(tokens.from_places(convolved))
        if tokens.full_parameters:
            q = _rows(self.x_proj(functional.silu(convolved)), tokens)
        else:
            q = self.x_proj(u)[:, :, None]
        dt, B, C = q.split([c.rank, c.d_state, c.d_state], dim=-1)
        if tokens.steps.code is None:
            raise AssertionError("walks over a grid give the moves")
        moves = self.direction_Bs[tokens.steps.code.long()]
        delta = functional.linear(dt, self.dt_proj.weight)
        return _Operands(u[:, :, None], delta, B + moves, C)

    def _scan(
        self, operands: _Operands, z: Tensor, tokens: Tokens, rule: ScoreRule | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gated y (batch, seqlen, d_inner), and the score where one is asked for."""
        if rule is None and not tokens.constant_gap:
            return self._node(operands, tokens, z=z), None
        y = self._node(operands, tokens, constant=tokens.constant_gap)
        score = None if rule is None else rule.score(ScanOutputs(y, z))
        return y * functional.silu(z), score

    def _node(
        self, o: _Operands, tokens: Tokens, *, z: Tensor | None = None, constant: bool = False
    ) -> Tensor:
        directions = o.delta.shape[2]
        bias = 2 * wide(self.dt_proj.bias)
        return ops.selective_scan(
            o.u,
            o.delta,
            -torch.exp(wide(self.A_log))[None],
            o.B,
            o.C,
            D=wide(self.D)[None],
            delta_bias=bias.expand(directions, -1),
            order=tokens.steps.order,
            gap=tokens.steps.gap,
            z=z,
            delta0=self._delta0(bias).expand(directions, -1) if constant else None,
            params_by_step=True,
            operators=self.operators,
        )

    def _delta0(self, bias: Tensor) -> Tensor:
        """Step size (d_inner,) of an all-zero token: its convolution is the bias alone."""
        if self.conv2d.bias is None:
            raise AssertionError("the convolution over the grid has a bias")
        conv = functional.silu(wide(self.conv2d.bias))
        low = wide(self.x_proj.weight)[: self.config.rank] @ conv
        return functional.softplus(wide(self.dt_proj.weight) @ low + bias)


def _rows(table: Tensor, tokens: Tokens) -> Tensor:
    """Rows (batch, seqlen, 4, width) of a table (batch, full_seqlen, width), by walk and step."""
    walked = tokens.steps.walked
    if walked is None:
        raise AssertionError("walks over a grid number their steps")
    image = torch.arange(table.shape[0], device=table.device)[:, None, None]
    return table.reshape(-1, table.shape[2])[walked.long() + image * tokens.full_seqlen]
