"""What mamba_ssm puts around its mixers: the residual block and the gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Layer = Callable[..., nn.Module]


class Block(nn.Module):
    """The residual block of mamba_ssm 1: add, norm, mix; hidden and residual in and out.

    Args:
        dim: width in and out.
        mixer_cls: makes the mixer of the width.
        norm_cls: makes the norm of the width.
        fused_add_norm: inert: both of upstream's ways compute the same.
        residual_in_fp32: keep the sum in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Layer,
        norm_cls: Layer = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm, self.mixer = norm_cls(dim), mixer_cls(dim)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **further: Any,
    ) -> tuple[Tensor, Tensor]:
        """What the mixer makes of the normed sum, and the sum."""
        hidden, total = self._add(self.norm, hidden_states, residual)
        return self.mixer(hidden, inference_params=inference_params, **further), total

    def _add(self, norm: Any, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = hidden if residual is None else hidden + residual
        normed = norm(total.to(norm.weight.dtype))
        return normed, total.float() if self.residual_in_fp32 else total


class BlockWithMlp(Block):
    """The residual block of mamba_ssm 2, with an MLP behind the mixer.

    Args:
        dim: width in and out.
        mixer_cls: makes the mixer of the width.
        mlp_cls: makes the MLP; `nn.Identity` for none.
        norm_cls: makes the norms.
        fused_add_norm: as for `Block`.
        residual_in_fp32: as for `Block`.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Layer,
        mlp_cls: Layer,
        norm_cls: Layer = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(dim, mixer_cls, norm_cls, fused_add_norm, residual_in_fp32)
        self.mlp = None if mlp_cls is nn.Identity else mlp_cls(dim)
        if self.mlp is not None:
            self.norm2 = norm_cls(dim)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **further: Any,
    ) -> tuple[Tensor, Tensor]:
        """As `Block`, and the same again with the MLP."""
        hidden, total = super().forward(hidden_states, residual, inference_params, **further)
        if self.mlp is not None:
            hidden, total = self._add(self.norm2, hidden, total)
            hidden = self.mlp(hidden)
        return hidden, total


class GatedMLP(nn.Module):
    """mamba_ssm's MLP: half of what fc1 makes is multiplied by the other half's activation.

    Args:
        in_features: width in.
        hidden_features: width between; None for 8/3 of the width in, rounded up.
        out_features: width out; None for the width in.
        activation: of the gate.
        bias: whether the layers have one.
        multiple_of: what the width between is rounded up to.
        device: of the weights.
        dtype: of the weights.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = functional.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        wanted = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-wanted // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, **kind)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=bias, **kind)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width out) of (..., width in)."""
        y, gate = torch.chunk(self.fc1(x), 2, dim=-1)
        found: Tensor = self.fc2(y * self.activation(gate))
        return found
