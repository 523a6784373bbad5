"""A baseline in plain PyTorch, for torch.compile: Vim's two scans by doubling.

A loop over 197 steps unrolls into a graph that takes torch.compile minutes, so the recurrence
h_t = a_t h_(t-1) + b_t is done in ceil(log2(seqlen)) rounds over all steps at once, each of which
joins every step with the one 1, 2, 4, ... before it. `associative` leaves the joining to PyTorch's
own prototype operator, which Inductor turns into one Triton kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Recurrence = Callable[[Tensor, Tensor], Tensor]


def doubled(decay: Tensor, source: Tensor) -> Tensor:
    """All states h of h_t = decay_t h_(t-1) + source_t along axis 1."""
    reach, seqlen = 1, decay.shape[1]
    while reach < seqlen:
        joined = source[:, reach:] + decay[:, reach:] * source[:, :-reach]
        source = torch.cat([source[:, :reach], joined], dim=1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], dim=1)
        reach *= 2
    return source


def associative(decay: Tensor, source: Tensor) -> Tensor:
    """The same through torch's associative_scan, a prototype."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def join(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], left[1] * right[0] + right[1]

    mode = "pointwise" if decay.is_cuda else "generic"
    states: Tensor = associative_scan(join, (decay, source), dim=1, combine_mode=mode)[1]
    return states


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    delta_bias: Tensor,
    order: Tensor,
    gap: Tensor,
    z: Tensor | None = None,
    delta0: Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
    recurrence: Recurrence = doubled,
) -> Tensor:
    """Arguments and result of `vssm.ops.operators.selective_scan`, for one or two directions.

    `order` is taken to be there and back; it is not looked at, nor is
    `backend`: what computes is this.
    """
    directions = order.shape[1]
    if directions > 2 or delta0 is not None:
        raise ValueError(
            f"directions={directions}, delta0={delta0 is not None}: this baseline knows one or two "
            "directions and no constant gap; use vssm.ops.operators.selective_scan"
        )

    def steps(x: Tensor) -> Tensor:
        x = x.float().expand(-1, -1, directions, -1)
        return torch.stack([x[:, :, k].flip(1) if k else x[:, :, k] for k in range(directions)], 2)

    u_step = steps(u)
    dt = functional.softplus(steps(delta) + delta_bias)
    span = torch.cat([torch.ones_like(gap[..., :1]), gap[..., 1:]], -1).transpose(1, 2)[..., None]
    decay = torch.exp((dt * span)[..., None] * A)
    source = (dt * u_step)[..., None] * steps(B)[:, :, :, None, :]
    h = recurrence(decay, source)
    y = (h * steps(C)[:, :, :, None, :]).sum(-1) + D * u_step
    total = sum(y[:, :, k].flip(1) if k else y[:, :, k] for k in range(directions)) * scale
    if z is not None:
        total = total * functional.silu(z.float())
    return total.to(u.dtype)
