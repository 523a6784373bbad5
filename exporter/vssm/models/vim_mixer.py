"""Vim's mixer: projections, direction-aware convolutions and one scan node for all directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.models.layers import initial_a_log, initial_dt_proj, wide
from vssm.ops import operators as ops
from vssm.pruning.select import ScanOutputs, ScoreRule, Tokens

BIMAMBA = ("v2", "v1", "none")


@dataclass(frozen=True)
class VimMixerConfig:
    """Sizes of one mixer.

    `bimamba` is "v2" (own weights for the backward direction), "v1" (an own A only) or "none".
    """

    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    bimamba: str
    divide_out: bool
    layer_scale: float | None

    def __post_init__(self) -> None:
        if self.bimamba not in BIMAMBA:
            raise ValueError(
                f"bimamba={self.bimamba!r} is not one of {', '.join(BIMAMBA)}; choose one of these"
            )

    @property
    def scale(self) -> float:
        """What the sum of the directions is multiplied by; only v2 knows if_divide_out."""
        return 0.5 if self.bimamba == "v2" and self.divide_out else 1.0


@dataclass(frozen=True)
class ScanOperands:
    """Inputs of the scan nodes in operator layout: (batch, seqlen, Kx, width) and (Kx, ...)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    delta_bias: Tensor

    def direction(self, k: int) -> ScanOperands:
        """The operands of direction k alone; shared ones stay as they are."""

        def pick(x: Tensor, axis: int) -> Tensor:
            return x if x.shape[axis] == 1 else x.narrow(axis, k, 1)

        streams = {n: pick(getattr(self, n), 2) for n in ("u", "delta", "B", "C")}
        weights = {n: pick(getattr(self, n), 0) for n in ("A", "D", "delta_bias")}
        return ScanOperands(**streams, **weights)


class VimMixer(nn.Module):
    """in_proj, one causal depthwise convolution a direction, x_proj, dt_proj, scan, gate, out_proj.

    Keys are the official ones: `conv1d`, `x_proj`, `dt_proj`, `A_log`, `D`, and for the backward
    direction `conv1d_b`, `x_proj_b`, `dt_proj_b`, `A_b_log`, `D_b` (v1: `A_b_log` only).
    """

    conv1d: nn.Conv1d
    A_log: nn.Parameter
    A_b_log: nn.Parameter
    D: nn.Parameter
    D_b: nn.Parameter

    operators = "auto"  # see VisionModel.use_operators

    def __init__(self, config: VimMixerConfig) -> None:
        super().__init__()
        self.config = config
        width, inner = config.d_model, config.d_inner
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        for suffix in self._branches():
            self._add_branch(suffix)
        if config.bimamba == "v1":
            self.A_b_log = nn.Parameter(initial_a_log(config.d_inner, config.d_state))
        self.out_proj = nn.Linear(inner, width, bias=False)
        if config.layer_scale is not None:
            self.gamma = nn.Parameter(config.layer_scale * torch.ones(width))

    def _branches(self) -> tuple[str, ...]:
        """Key suffixes of the branches that have weights of their own."""
        return ("", "_b") if self.config.bimamba == "v2" else ("",)

    def _add_branch(self, suffix: str) -> None:
        c = self.config
        conv = nn.Conv1d(c.d_inner, c.d_inner, c.d_conv, groups=c.d_inner)
        self.add_module(f"conv1d{suffix}", conv)
        x_proj = nn.Linear(c.d_inner, c.dt_rank + 2 * c.d_state, bias=False)
        self.add_module(f"x_proj{suffix}", x_proj)
        self.add_module(f"dt_proj{suffix}", initial_dt_proj(c.dt_rank, c.d_inner))
        log, skip = ("A_log", "D") if not suffix else ("A_b_log", "D_b")
        self.register_parameter(log, nn.Parameter(initial_a_log(c.d_inner, c.d_state)))
        self.register_parameter(skip, nn.Parameter(torch.ones(c.d_inner)))

    def _stack(self, name: str) -> Tensor:
        """A parameter of every branch, stacked: (branches, ...)."""
        return torch.stack([self.get_parameter(name.format(b=b)) for b in self._branches()])

    def forward(
        self, x: Tensor, tokens: Tokens, rule: ScoreRule | None
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed (batch, seqlen, d_model), and the (batch, seqlen) score if there is a rule."""
        inner = self.config.d_inner
        x_weight, z_weight = self.in_proj.weight[:inner], self.in_proj.weight[inner:]
        # Channel-major for the convolution: weight @ x^T, which needs no transpose of its result.
        operands = self._operands(self._convolve(x_weight @ x.transpose(1, 2), tokens))
        z = functional.linear(x, z_weight)
        y, score = self._scan(operands, z, tokens, rule)
        out = functional.linear(y, self.out_proj.weight)
        if self.config.layer_scale is not None:
            out = out * self.gamma
        return out, score

    def _convolve(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Each branch's convolution and silu of x (batch, d_inner, seqlen).

        The backward branch is causal in reversed order: its weight flipped, padded behind.

        Returns:
            (batch, branches, d_inner, seqlen).
        """
        index = tokens.position.long()[:, None].expand_as(x) if tokens.conv_on_grid else None
        if index is not None:
            x = x.new_zeros(*x.shape[:2], tokens.full_seqlen).scatter(2, index, x)
        dtype = x.dtype
        # Two-dimensional with height 1: runtimes have faster depthwise kernels for it.
        x = x[:, :, None].to(self.conv1d.weight.dtype)
        pad = self.config.d_conv - 1
        outputs = []
        for suffix in self._branches():
            conv: nn.Conv1d = getattr(self, f"conv1d{suffix}")
            weight = conv.weight.flip(-1) if suffix else conv.weight
            padded = functional.pad(x, (0, pad) if suffix else (pad, 0))
            outputs.append(
                functional.conv2d(padded, weight[:, :, None], conv.bias, groups=self.config.d_inner)
            )
        y = functional.silu(torch.cat(outputs, dim=1).to(dtype))
        y = y.reshape(y.shape[0], len(outputs), self.config.d_inner, y.shape[-1])
        return y if index is None else y.gather(3, index[:, None].expand(-1, len(outputs), -1, -1))

    def _operands(self, u: Tensor) -> ScanOperands:
        """The scan's inputs from u (batch, branches, d_inner, seqlen)."""
        c = self.config
        q = self._stack("x_proj{b}.weight") @ u
        dt, B, C = q.split([c.dt_rank, c.d_state, c.d_state], dim=2)
        delta = dt.transpose(2, 3) @ self._stack("dt_proj{b}.weight").transpose(1, 2)
        A_log: list[Tensor] = [self.A_log] if c.bimamba == "none" else [self.A_log, self.A_b_log]
        D: list[Tensor] = [self.D] if c.bimamba != "v2" else [self.D, self.D_b]
        return ScanOperands(
            u=u.permute(0, 3, 1, 2),
            delta=delta.transpose(1, 2),
            A=-torch.exp(wide(torch.stack(A_log))),
            B=B.permute(0, 3, 1, 2),
            C=C.permute(0, 3, 1, 2),
            D=wide(torch.stack(D)),
            delta_bias=wide(self._stack("dt_proj{b}.bias")),
        )

    def _scan(
        self, operands: ScanOperands, z: Tensor, tokens: Tokens, rule: ScoreRule | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gated y (batch, seqlen, d_inner), and the score where one is asked for."""
        if rule is None and not tokens.constant_gap:
            return self._node(operands, tokens.steps.order, tokens.steps.gap, z=z), None
        delta0 = self._delta0() if tokens.constant_gap else None
        scored = y = self._node(operands, tokens.steps.order, tokens.steps.gap, delta0=delta0)
        if rule is not None and rule.by_direction and tokens.steps.order.shape[1] > 1:
            # Once more by itself: the layer's own result stays bit for bit the dense model's.
            k = 0 if rule.source == "forward" else 1
            scored = self._direction(operands, k, tokens, delta0)
        score = None if rule is None else rule.score(ScanOutputs(scored, z))
        return y * functional.silu(z), score

    def _direction(
        self, operands: ScanOperands, k: int, tokens: Tokens, delta0: Tensor | None
    ) -> Tensor:
        """One direction of the scan alone, (batch, seqlen, d_inner)."""
        only = slice(k, k + 1)
        if delta0 is not None and delta0.shape[0] > 1:
            delta0 = delta0[only]
        order, gap = tokens.steps.order[:, only], tokens.steps.gap[:, only]
        return self._node(operands.direction(k), order, gap, delta0=delta0)

    def _node(
        self,
        operands: ScanOperands,
        order: Tensor,
        gap: Tensor,
        *,
        z: Tensor | None = None,
        delta0: Tensor | None = None,
    ) -> Tensor:
        o = operands
        return ops.selective_scan(
            o.u,
            o.delta,
            o.A,
            o.B,
            o.C,
            D=o.D,
            delta_bias=o.delta_bias,
            order=order,
            gap=gap,
            z=z,
            delta0=delta0,
            scale=self.config.scale,
            operators=self.operators,
        )

    def _delta0(self) -> Tensor:
        """Step size (branches, d_inner) of an all-zero token: its convolution is the bias alone."""
        rank = self.config.dt_rank
        conv = functional.silu(wide(self._stack("conv1d{b}.bias")))
        low = wide(self._stack("x_proj{b}.weight"))[:, :rank] @ conv[..., None]
        step = (wide(self._stack("dt_proj{b}.weight")) @ low)[..., 0]
        return functional.softplus(step + wide(self._stack("dt_proj{b}.bias")))
