"""The gradients of a selective scan by hand, in plain PyTorch: short enough to check on paper.

The native kernel computes the same (plugins/kernels/selective_scan_backward.h) and is compared with
it; it runs on any device and in any type, a step at a time. Autograd through the oracle is the
judge of both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def selective_scan_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    order: Tensor,
    gap: Tensor,
    z: Tensor | None = None,
    delta0: Tensor | None = None,
    delta_softplus: bool = True,
    params_by_step: bool = False,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """The gradients of a loss by every floating-point input of `reference.selective_scan`.

    Args:
        dy: (batch, seqlen, d_inner), its gradient by the output.
        u: as in `reference.selective_scan`, which says it of all others too.
        delta: likewise.
        A: likewise.
        B: likewise.
        C: likewise.
        D: likewise.
        delta_bias: likewise.
        order: likewise.
        gap: likewise.
        z: likewise.
        delta0: likewise.
        delta_softplus: likewise.
        params_by_step: likewise.
        scale: likewise.

    Returns:
        By the name of the input its gradient, of its shape, in float32 or wider.
    """
    compute = torch.promote_types(u.dtype, torch.float32)
    directions = order.shape[1]
    token = order.long().expand(u.shape[0], -1, -1).transpose(1, 2)[..., None]
    steps = torch.arange(order.shape[2], device=order.device).view(1, -1, 1, 1).expand_as(token)
    owner = steps if params_by_step else token  # of delta, B and C

    def take(x: Tensor, rows: Tensor) -> Tensor:
        x = x.to(compute).expand(-1, -1, directions, -1)
        return x.gather(1, rows.expand(-1, -1, -1, x.shape[-1]))

    def put(x: Tensor, rows: Tensor, like: Tensor) -> Tensor:
        """Back to tokens; summed over the directions that share the axis."""
        x = torch.zeros_like(x).scatter(1, rows.expand_as(x), x)
        return x.sum(2, keepdim=True) if like.shape[2] == 1 else x

    def shared(x: Tensor, like: Tensor) -> Tensor:
        """Summed over images, steps, and directions that share the axis."""
        x = x.flatten(0, 1).sum(0)
        return x.sum(0, keepdim=True) if like.shape[0] == 1 else x

    x, b, c = take(u, token), take(B, owner), take(C, owner)
    before = take(delta, owner) + delta_bias.to(compute)
    dt = functional.softplus(before) if delta_softplus else before
    more = gap.transpose(1, 2)[..., None].to(compute) - 1
    more = torch.cat([torch.zeros_like(more[:, :1]), more[:, 1:]], dim=1)  # h = 0 before it
    span = dt + more * (dt if delta0 is None else delta0.to(compute))
    decay = torch.exp(span[..., None] * A.to(compute))  # (batch, seqlen, K, d_inner, d_state)
    h = _states(decay, (dt * x)[..., None] * b[..., None, :])

    upstream = dy.to(compute)[:, :, None]
    gradients: dict[str, Tensor] = {}
    if z is not None:
        gate = torch.sigmoid(z.to(compute))
        y_step = (h * c[..., None, :]).sum(-1) + D.to(compute) * x
        y = put(y_step, token, u[:, :, :1])[:, :, 0] * scale
        gradients["z"] = dy.to(compute) * y * gate * (1 + z.to(compute) * (1 - gate))
        upstream = upstream * (z.to(compute) * gate)[:, :, None]
    g = take(upstream, token) * scale
    d = _carried(decay, g[..., None] * c[..., None, :])
    e = d * decay * torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
    w, f = (d * b[..., None, :]).sum(-1), (e * A.to(compute)).sum(-1)
    v = w * x + f * ((1 + more) if delta0 is None else 1)
    if delta_softplus:
        v = v * torch.sigmoid(before)
    gradients["u"] = put(w * dt + g * D.to(compute), token, u)
    gradients["delta"] = put(v, owner, delta)
    gradients["A"] = shared(e * span[..., None], A)
    gradients["B"] = put((d * (dt * x)[..., None]).sum(-2), owner, B)
    gradients["C"] = put((g[..., None] * h).sum(-2), owner, C)
    gradients["D"] = shared(g * x, D)
    gradients["delta_bias"] = shared(v, delta_bias)
    if delta0 is not None:
        gradients["delta0"] = shared(f * more, delta0)
    return gradients


def _states(decay: Tensor, source: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + source_t along axis 1, from zero."""
    h = torch.zeros_like(source[:, 0])
    found = []
    for a, s in zip(decay.unbind(1), source.unbind(1), strict=True):
        h = torch.addcmul(s, a, h)
        found.append(h)
    return torch.stack(found, 1)


def _carried(decay: Tensor, source: Tensor) -> Tensor:
    """d_t = decay_{t+1} d_{t+1} + source_t along axis 1, from zero behind the end."""
    return _states(torch.roll(decay, -1, 1).flip(1), source.flip(1)).flip(1)
