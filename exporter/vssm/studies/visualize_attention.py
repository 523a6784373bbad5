"""Effective attention of a scan: what every token's input weighs in a readout of the output.

Given delta, B and C a scan is linear in its input u, so a weighted sum of its outputs is a weighted
sum of its inputs, and the weights follow from the recurrence alone. With D_t the decay step (the
gap times dt, or dt + (gap - 1) * delta0) and r_i the readout (1 at the class token, else 0):

    sum_i r_i y_i = sum_k sum_j w_kj * u_kj + scale * sum_k sum_i r_i D_k * u_ki
    w_kj = scale * dt_kj * sum_{i >= j} r_i * C_ki . (exp(A_k * (D_{j+1} + ... + D_i)) * B_kj)

i and j counted in the steps of direction k. Source of the view: Ali et al., "The Hidden Attention
of Mamba Models", arXiv:2403.01590; the gaps are those of Zhan et al., arXiv:2409.18962.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vssm.ops import operators as ops


@dataclass(frozen=True)
class Scan:
    """One scan node without its gate: the operands of `ops.selective_scan`, by the same names."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    delta_bias: Tensor
    order: Tensor
    gap: Tensor
    delta0: Tensor | None
    delta_softplus: int
    params_by_step: int
    scale: float

    def output(self) -> Tensor:
        """The ungated y (batch, seqlen, d_inner)."""
        flags = {n: bool(getattr(self, n)) for n in ("delta_softplus", "params_by_step")}
        return ops.selective_scan(**{**vars(self), **flags}, operators="oracle")

    @property
    def skip(self) -> Tensor:
        """What a token's own input weighs in its own output beside the state: (K or 1, d_inner)."""
        return self.D.double() * self.scale


def readout_weights(scan: Scan, readout: Tensor) -> Tensor:
    """The weights w of the module's formula, exact in float64.

    Args:
        scan: the node.
        readout: (batch, seqlen), the weight r of each token's output.

    Returns:
        (batch, K, seqlen, d_inner) float64, in token order; the skip is not in it.
    """
    directions = scan.order.shape[1]
    token = scan.order.long().expand(scan.u.shape[0], -1, -1).transpose(1, 2)
    dt = _by_step(scan, scan.delta, token) + scan.delta_bias.double()
    dt = functional.softplus(dt) if scan.delta_softplus else dt
    extra = scan.gap.transpose(1, 2)[..., None].double() - 1
    span = dt + extra * (dt if scan.delta0 is None else scan.delta0.double())
    asked = readout.double()[..., None].expand(-1, -1, directions).gather(1, token)
    B, C = (_by_step(scan, x, token) for x in (scan.B, scan.C))
    A = scan.A.double()
    reach = dt.new_zeros(dt.shape[0], directions, *A.shape[1:])  # (batch, K, d_inner, d_state)
    weights = torch.empty_like(span)
    for t in reversed(range(token.shape[1])):
        reach = reach + (asked[:, t, :, None] * C[:, t])[:, :, None]
        weights[:, t] = dt[:, t] * (reach * B[:, t, :, None]).sum(-1)
        reach = reach * torch.exp(span[:, t, ..., None] * A)  # of no use at t = 0: no state before
    index = token[..., None].expand_as(weights)
    in_tokens = torch.zeros_like(weights).scatter(1, index, weights)
    return in_tokens.transpose(1, 2) * scan.scale


def attention_maps(scan: Scan, readout: Tensor) -> Tensor:
    """Mean over channels of |w|, by direction: (batch, K, seqlen) float64."""
    return readout_weights(scan, readout).abs().mean(-1)


def _by_step(scan: Scan, x: Tensor, token: Tensor) -> Tensor:
    """X (batch, seqlen, 1 or K, width) by step: (batch, seqlen, K, width) float64."""
    spread = x.double().expand(-1, -1, token.shape[2], -1)
    if scan.params_by_step:
        return spread
    return spread.gather(1, token[..., None].expand(-1, -1, -1, x.shape[-1]))
