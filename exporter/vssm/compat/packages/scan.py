"""Upstream's selective scans, channels first as their callers have them, over our operators.

One node a group of channels: the operator's B and C belong to all channels of a node. The layouts
are put token-major around the node, and the graph passes cancel what can be cancelled.
Sources of the signatures: the repositories state-spaces/mamba and MzeroMiko/VMamba.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from vssm.errors import UnsupportedError
from vssm.ops import operators as ops
from vssm.ops.record import unrecorded

# exp(-1e4) is 0 in every type: a step of this size leaves the state as it is.
NO_STEP: Final = -1e4


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool | None = False,
) -> Any:
    """mamba_ssm's selective scan.

    Args:
        u: (batch, d_inner, seqlen).
        delta: (batch, d_inner, seqlen), before bias and softplus.
        A: (d_inner, d_state), real and negative.
        B: (batch, d_state, seqlen) or (batch, groups, d_state, seqlen).
        C: likewise.
        D: (d_inner) skip; None for none.
        z: (batch, d_inner, seqlen) gate; None for none.
        delta_bias: (d_inner); None for none.
        delta_softplus: whether delta goes through softplus.
        return_last_state: also return the state (batch, d_inner, d_state) after the last step.

    Returns:
        y (batch, d_inner, seqlen) in u's dtype, or (y, last_state).

    Raises:
        UnsupportedError: A is complex, or B or C is the same for all tokens (d_inner, d_state).
        ValueError: a shape does not fit.
    """
    _refuse("selective_scan_fn", A, {"B": B, "C": C})
    B, C = (x[:, None] if x.dim() == 3 else x for x in (B, C))
    y = _scan_groups(u, delta, A, B, C, D, delta_bias, z=z, delta_softplus=delta_softplus)
    if not return_last_state:
        return y
    # A scan of its own, which is gone from a file that does not use the state.
    with unrecorded():
        return y, _last_state(u, delta, A, B, delta_bias, delta_softplus=delta_softplus)


def ungated_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,
) -> Any:
    """The scan of VMamba's first package `selective_scan`, which has no gate between D and bias.

    Args:
        u: this and the others as for `selective_scan_fn`.
        delta: likewise.
        A: likewise.
        B: likewise.
        C: likewise.
        D: likewise.
        delta_bias: likewise.
        delta_softplus: likewise.
        nrows: inert: a kernel's tuning.
    """
    return selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


def selective_scan_tokens(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> Tensor:
    """The scan of mamba-minimal's blocks: tokens first, delta already positive.

    Args:
        u: (batch, seqlen, d_inner).
        delta: (batch, seqlen, d_inner), after bias and softplus.
        A: (d_inner, d_state), real and negative.
        B: (batch, seqlen, d_state).
        C: (batch, seqlen, d_state).
        D: (d_inner) skip.

    Returns:
        y (batch, seqlen, d_inner).
    """
    return scan_node(u, delta, A, B, C, D, None, delta_softplus=False)


def _refuse(function: str, A: Tensor, operands: dict[str, Tensor]) -> None:
    if A.is_complex():
        raise UnsupportedError(
            f"{function}: A.dtype={A.dtype} is complex, which no operator here has; use a model "
            "with real A (every vision model and Mamba release)"
        )
    for name, x in operands.items():
        if x.dim() == 2:
            raise UnsupportedError(
                f"{function}: {name}.shape={tuple(x.shape)} is one {name} for all tokens and its "
                "own for each channel, which the operator does not have; use a model whose B and C "
                "depend on the token: (batch, d_state, seqlen)"
            )
        if x.dim() not in {3, 4}:
            raise ValueError(
                f"{function}: {name}.shape={tuple(x.shape)} has {x.dim()} axes; give (batch, "
                "d_state, seqlen) or (batch, groups, d_state, seqlen)"
            )


def _scan_groups(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    *,
    z: Tensor | None = None,
    delta_softplus: bool,
) -> Tensor:
    """The y of B and C (batch, groups, d_state, seqlen): one node a group."""
    B, C = (shared(x, 1) for x in (B, C))
    groups, channels = max(B.shape[1], C.shape[1]), u.shape[1]
    for name, x in (("B", B), ("C", C)):
        if x.shape[1] not in {1, groups} or channels % groups:
            raise ValueError(
                f"selective scan: {name} has {x.shape[1]} groups for {channels} channels of u; "
                "consecutive channels share a group, so their number must divide the channels"
            )
    # Upstream's kernels give consecutive channels to a group.
    width = channels // groups

    def own(x: Tensor | None, axis: int, g: int) -> Tensor | None:
        # Without groups no narrow to the whole, which would be a node between the scan and its
        # layout.
        return x if x is None or groups == 1 else x.narrow(axis, g * width, width)

    pieces = []
    for g in range(groups):
        gate = own(z, 1, g)
        y = scan_node(
            _token_major(own(u, 1, g)),
            _token_major(own(delta, 1, g)),
            own(A, 0, g),
            _token_major(B[:, g if B.shape[1] > 1 else 0]),
            _token_major(C[:, g if C.shape[1] > 1 else 0]),
            own(D, 0, g),
            own(delta_bias, 0, g),
            z=None if gate is None else _token_major(gate),
            delta_softplus=delta_softplus,
        )
        pieces.append(y.transpose(1, 2))
    return pieces[0] if groups == 1 else torch.cat(pieces, dim=1)


def _last_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    delta_bias: Tensor | None,
    *,
    delta_softplus: bool,
) -> Tensor:
    """The last state: d_state more steps that leave the state and read it out.

    Their C is one row of the unit matrix each, their u zero and their step size zero.
    """
    states, seqlen = B.shape[2], u.shape[-1]
    bias = None if delta_bias is None else delta_bias.to(delta.dtype)[:, None]
    # With softplus, -1e4 swallows the bias. Without it nothing does, so there the bias goes into
    # delta first, and the added steps stay zero.
    stop = delta.new_full((1, 1, states), NO_STEP if delta_softplus else 0.0)
    if not delta_softplus and bias is not None:
        delta, delta_bias = delta + bias, None
    unit = torch.eye(states, dtype=B.dtype, device=B.device)
    read = functional.pad(unit, (seqlen, 0)).expand(*B.shape[:2], -1, -1)
    y = _scan_groups(
        functional.pad(u, (0, states)),
        torch.cat([delta, stop.expand(*delta.shape[:2], -1)], dim=-1),
        A,
        functional.pad(B, (0, states)),
        read,
        None,
        delta_bias,
        delta_softplus=delta_softplus,
    )
    return y[..., seqlen:]


def scan_node(
    u: Tensor,
    delta: Tensor,
    A: Any,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    *,
    z: Tensor | None = None,
    delta_softplus: bool,
) -> Tensor:
    """One scan node over token-major operands (batch, seqlen, width)."""
    channels, seqlen = u.shape[2], u.shape[1]
    wide = wide_type(u)
    zeros = torch.zeros(channels, dtype=wide, device=u.device)
    # Upstream flips or gathers the sequence instead; the passes turn that into an order.
    order = torch.arange(seqlen, dtype=torch.int32, device=u.device)[None, None]
    return ops.selective_scan(
        u[:, :, None],
        delta[:, :, None],
        # Weights are float32 in the operator, whatever the streams are.
        A.to(wide)[None],
        B[:, :, None],
        C[:, :, None],
        # The operator has no optional skip or bias, and zeros are the same function.
        D=(zeros if D is None else D.to(wide))[None],
        delta_bias=(zeros if delta_bias is None else delta_bias.to(wide))[None],
        order=order,
        gap=torch.ones_like(order),
        z=z,
        delta_softplus=delta_softplus,
    )


def _token_major(x: Any) -> Tensor:
    """(batch, width, seqlen) to (batch, seqlen, width)."""
    swapped: Tensor = x.transpose(1, 2)
    return swapped


def shared(x: Tensor, axis: int) -> Tensor:
    """One group of B or C where all are one that was expanded."""
    stride = x.stride(axis)
    # A stride that is a symbol is not zero, and comparing it would be a condition on sizes.
    return x.narrow(axis, 0, 1) if isinstance(stride, int) and stride == 0 else x


def wide_type(x: Tensor) -> torch.dtype:
    """float32, or float64 where x is."""
    # float64 stays float64: the reference of an export runs through here.
    return torch.promote_types(x.dtype, torch.float32)
