"""The gradients of a selective scan by hand, in plain PyTorch: short enough to check on paper.

The native kernel computes the same (plugins/kernels/selective_scan_backward.h) and is compared with
it; it runs on any device and in any type, a step at a time. Autograd through the oracle is the
judge of both.
"""

from __future__ import annotations

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
    dy, u, delta, A, B, C, D = (x.to(compute) for x in (dy, u, delta, A, B, C, D))
    token = order.long().expand(u.shape[0], -1, -1).transpose(1, 2)[..., None]
    owner = _steps(token) if params_by_step else token  # of delta, B and C
    x, b, c = _take(u, token), _take(B, owner), _take(C, owner)
    before = _take(delta, owner) + delta_bias.to(compute)
    dt = functional.softplus(before) if delta_softplus else before
    more = torch.where(_steps(token) > 0, gap.transpose(1, 2)[..., None] - 1, 0)  # h = 0 before
    span = dt + more * (dt if delta0 is None else delta0.to(compute))
    decay = torch.exp(span[..., None] * A)  # (batch, seqlen, K, d_inner, d_state)
    h = _states(decay, (dt * x)[..., None] * b[..., None, :])

    gradients: dict[str, Tensor] = {}
    if z is not None:
        y = _put((h * c[..., None, :]).sum(-1) + D * x, token, shared=True)[:, :, 0] * scale
        gradients["z"], dy = _through_gate(dy, y, z.to(compute))
    g = _take(dy[:, :, None], token) * scale
    d = _carried(decay, g[..., None] * c[..., None, :])
    e = d * decay * torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
    w, f = (d * b[..., None, :]).sum(-1), (e * A).sum(-1)
    slope = torch.sigmoid(before) if delta_softplus else 1
    v = (w * x + f * (1 + more if delta0 is None else 1)) * slope
    gradients["u"] = _put(w * dt + g * D, token, shared=u.shape[2] == 1)
    gradients["delta"] = _put(v, owner, shared=delta.shape[2] == 1)
    gradients["A"] = _total(e * span[..., None], A)
    gradients["B"] = _put((d * (dt * x)[..., None]).sum(-2), owner, shared=B.shape[2] == 1)
    gradients["C"] = _put((g[..., None] * h).sum(-2), owner, shared=C.shape[2] == 1)
    gradients["D"] = _total(g * x, D)
    gradients["delta_bias"] = _total(v, delta_bias)
    if delta0 is not None:
        gradients["delta0"] = _total(f * more, delta0)
    return gradients


def _through_gate(dy: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by z and by y, from that by y silu(z)."""
    gate = torch.sigmoid(z)
    return dy * y * gate * (1 + z * (1 - gate)), dy * z * gate


def _steps(token: Tensor) -> Tensor:
    """The number of each step, as `token` (batch, seqlen, K, 1) lies."""
    return torch.arange(token.shape[1], device=token.device).view(1, -1, 1, 1).expand_as(token)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of x (batch, seqlen, 1 or K, width) in the order of rows (batch, seqlen, K, 1)."""
    x = x.expand(-1, -1, rows.shape[2], -1)
    return x.gather(1, rows.expand(-1, -1, -1, x.shape[-1]))


def _put(x: Tensor, rows: Tensor, *, shared: bool) -> Tensor:
    """Back from steps to tokens; summed over directions that share the axis."""
    x = torch.zeros_like(x).scatter(1, rows.expand_as(x), x)
    return x.sum(2, keepdim=True) if shared else x


def _total(x: Tensor, like: Tensor) -> Tensor:
    """Summed over images and steps, and over directions that share the axis."""
    x = x.flatten(0, 1).sum(0)
    return x.sum(0, keepdim=True) if like.shape[0] == 1 else x


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
