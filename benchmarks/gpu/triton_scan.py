"""A baseline in Triton: a simple kernel, one program for 32 channels of an image.

The directions of a layer run one after the other; the sum so far is read back from y, in y's
type. Everything else is the operator's contract. Needs the triton package.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 32


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(x)))


@triton.jit
def _kernel(  # noqa: PLR0913, PLR0917 - Triton takes no struct
    u,
    delta,
    A,
    B,
    C,
    D,
    delta_bias,
    order,
    gap,
    z,
    y,
    d_inner,
    d_state,
    Ku,
    Kd,
    Ka,
    Kb,
    Kc,
    Ks,
    gap_images,
    scale,
    SEQLEN: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    BY_STEP: tl.constexpr,
    GATED: tl.constexpr,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    state = tl.arange(0, STATES)
    here = channel < d_inner
    real = state < d_state
    for k in range(DIRECTIONS):
        row = (k % Ka) * d_inner + channel
        inside = here[:, None] & real[None, :]
        decay = tl.load(A + row[:, None] * d_state + state[None, :], mask=inside, other=0.0)
        decay = decay * 1.4426950408889634
        bias = tl.load(delta_bias + (k % Kd) * d_inner + channel, mask=here, other=0.0)
        skip = tl.load(D + (k % Ks) * d_inner + channel, mask=here, other=0.0)
        h = tl.zeros((BLOCK, STATES), tl.float32)
        walk = ((image % gap_images) * DIRECTIONS + k) * SEQLEN
        for t in range(SEQLEN):
            q = tl.load(order + k * SEQLEN + t)
            s = t if BY_STEP else q
            places = tl.where(t > 0, tl.load(gap + walk + t), 1).to(tl.float32)
            at = image * SEQLEN
            x = tl.load(u + ((at + q) * Ku + k % Ku) * d_inner + channel, mask=here, other=0.0)
            dt = tl.load(delta + ((at + s) * Kd + k % Kd) * d_inner + channel, mask=here, other=0.0)
            b = tl.load(B + ((at + s) * Kb + k % Kb) * d_state + state, mask=real, other=0.0)
            c = tl.load(C + ((at + s) * Kc + k % Kc) * d_state + state, mask=real, other=0.0)
            x = x.to(tl.float32)
            dt = _softplus(dt.to(tl.float32) + bias)
            h = tl.exp2((places * dt)[:, None] * decay) * h
            h += (dt * x)[:, None] * b.to(tl.float32)[None, :]
            found = scale * (tl.sum(h * c.to(tl.float32)[None, :], axis=1) + skip * x)
            target = y + (at + q) * d_inner + channel
            if k > 0:
                found += tl.load(target, mask=here, other=0.0).to(tl.float32)
            if GATED:  # noqa: SIM102 - known when compiled, the other is not
                if k == DIRECTIONS - 1:
                    gate = tl.load(z + (at + q) * d_inner + channel, mask=here, other=0.0)
                    gate = gate.to(tl.float32)
                    found = found * gate / (1.0 + tl.exp(-gate))
            tl.store(target, found.to(y.dtype.element_ty), mask=here)
        tl.debug_barrier()


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
    params_by_step: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Arguments and result of `operators.selective_scan`; contiguous, `order` for all images."""
    if order.shape[0] != 1:
        raise ValueError(
            f"order.shape={tuple(order.shape)}: this baseline takes one for all images"
        )
    batch, seqlen, _, d_inner = u.shape
    d_state, directions = A.shape[2], order.shape[1]
    y = u.new_empty(batch, seqlen, d_inner)
    grid = (triton.cdiv(d_inner, _BLOCK), batch)
    streams = (t.shape[2] for t in (u, delta))
    _kernel[grid](
        *(u, delta, A, B, C, D, delta_bias, order, gap, u if z is None else z, y),
        *(d_inner, d_state, *streams, A.shape[0], B.shape[2], C.shape[2], D.shape[0], gap.shape[0]),
        scale,
        SEQLEN=seqlen,
        DIRECTIONS=directions,
        BY_STEP=params_by_step,
        GATED=z is not None,
        STATES=triton.next_power_of_2(d_state),
        BLOCK=_BLOCK,
        num_warps=1,
    )
    return y
