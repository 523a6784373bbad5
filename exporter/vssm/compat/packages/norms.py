"""mamba_ssm's norms: the fused add-and-norm of Mamba-1, and Mamba-2's with a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.errors import UnsupportedError


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    **further: Any,
) -> Any:
    """RMSNorm of x + residual.

    Args:
        x: (..., width).
        weight: (width).
        bias: (width) or None.
        residual: as x, or None.
        eps: added to the mean square.
        prenorm: also return the sum.
        residual_in_fp32: keep the sum in float32 (or wider).
        further: arguments of newer releases, None, False or 0.

    Returns:
        The normed sum in x's dtype, or (it, the sum).

    Raises:
        UnsupportedError: dropout, a second input or weight, row scales, or a gate is asked for.
    """
    _refuse("rms_norm_fn", further)
    total, wide = _add(x, residual, residual_in_fp32)
    y = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
    # Rounded once, at the end, as upstream's Triton kernel does.
    y = (y if bias is None else y + bias).to(x.dtype)
    return (y, total) if prenorm else y


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    **further: Any,
) -> Any:
    """LayerNorm of x + residual; arguments and result as for `rms_norm_fn`."""
    # mamba_ssm 2 calls this one function for both norms.
    if is_rms_norm:
        return rms_norm_fn(
            x,
            weight,
            bias,
            residual,
            eps=eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            **further,
        )
    _refuse("layer_norm_fn", further)
    total, wide = _add(x, residual, residual_in_fp32)
    shift = None if bias is None else bias.to(wide.dtype)
    y = functional.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), shift, eps)
    return (y.to(x.dtype), total) if prenorm else y.to(x.dtype)


class RMSNorm(nn.Module):
    """mamba_ssm's RMSNorm: `weight` alone; called with a residual it adds first."""

    bias: None

    def __init__(
        self,
        hidden_size: int,
        # Upstream's own: 1e-6 in the functions, 1e-5 in the class.
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dropout_p:
            _refuse("RMSNorm", {"dropout_p": dropout_p})
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        # Blocks read `norm.bias` and pass it on, None included.
        self.register_parameter("bias", None)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """As `rms_norm_fn` with this module's weight."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def gated_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """norm(x) silu(z), or norm(x silu(z)): Mamba-2's norm behind its scan.

    Args:
        x: (..., width).
        weight: (width).
        bias: (width) or None.
        z: as x, or None for no gate.
        eps: added to the mean square.
        group_size: channels that are normed together; None for all of them.
        norm_before_gate: whether the gate comes behind the norm.
        is_rms_norm: whether no mean is taken off.

    Returns:
        As x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    gate = None if z is None else functional.silu(z.to(wide.dtype))
    if gate is not None and not norm_before_gate:
        wide = wide * gate
    # One group needs no axis of its own, which would be a reshape on either side.
    grouped = group_size is not None and group_size != x.shape[-1]
    y = wide.unflatten(-1, (-1, int(group_size or 1))) if grouped else wide
    y = y if is_rms_norm else y - y.mean(-1, keepdim=True)
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps)
    y = (y.flatten(-2) if grouped else y) * weight
    y = y if bias is None else y + bias
    if gate is not None and norm_before_gate:
        y = y * gate
    # Rounded once, at the end, as upstream's Triton kernel does.
    return y.to(x.dtype)


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """`gated_layer_norm` without a mean; `upcast` is inert: it computes in float32 or wider."""
    return gated_layer_norm(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


class GatedLayerNorm(nn.Module):
    """Mamba-2's LayerNorm with a gate: `weight` and `bias`."""

    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self._add_bias(torch.zeros(hidden_size, device=device, dtype=dtype))

    def _add_bias(self, zeros: Tensor) -> None:
        self.bias = nn.Parameter(zeros)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """As `gated_layer_norm` with this module's weights."""
        return gated_layer_norm(
            x,
            self.weight,
            self.bias,
            z,
            self.eps,
            self.group_size,
            self.norm_before_gate,
            is_rms_norm=self.bias is None,
        )


class GatedRMSNorm(GatedLayerNorm):
    """Mamba-2's RMSNorm with a gate: `weight` alone."""

    def _add_bias(self, zeros: Tensor) -> None:
        self.register_parameter("bias", None)


def _add(x: Tensor, residual: Tensor | None, in_fp32: bool) -> tuple[Tensor, Tensor]:
    """The residual stream as it goes on, and the same in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if residual is not None:
        wide = wide + residual
    # Once in float32, a residual stays so, whatever the flag says: upstream takes its dtype.
    kept = wide if in_fp32 or (residual is not None and _is_wide(residual)) else wide.to(x.dtype)
    return kept, wide


def _is_wide(x: Tensor) -> bool:
    return x.dtype in {torch.float32, torch.float64}


def _refuse(function: str, further: dict[str, Any]) -> None:
    # 0 and 0.0 equal False: `dropout_p=0.0` asks for nothing. The references have `upcast`, which
    # says to compute in float32, as ours always does.
    given = [f"{k}={v!r}" for k, v in further.items() if v not in {None, False} and k != "upcast"]
    if given:
        raise UnsupportedError(
            f"{function}: {', '.join(given)} is not supported; use the plain norm of an inference "
            "forward pass (weight, bias, residual, eps, prenorm, residual_in_fp32)"
        )
