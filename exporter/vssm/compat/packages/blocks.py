"""mamba_ssm's fused blocks and causal_conv1d's convolution, taken apart over our operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vssm.compat.packages.scan import selective_scan_fn
from vssm.errors import UnsupportedError

_ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *older: Any,
    activation: str | None = None,
    **states: Any,
) -> Tensor:
    """Depthwise convolution that sees no later token.

    Args:
        x: (batch, d_inner, seqlen).
        weight: (d_inner, d_conv).
        bias: (d_inner) or None.
        older: further positional arguments; their meaning changed between releases: refused.
        activation: None, "silu" or "swish", by keyword.
        states: seq_idx, initial_states, return_final_states, final_states_out: None or False.

    Returns:
        (batch, d_inner, seqlen).

    Raises:
        UnsupportedError: an argument that this form has not is given.
    """
    given = [repr(value) for value in older if value is not None and value is not False]
    given += [f"{k}={v!r}" for k, v in states.items() if v is not None and v is not False]
    if given:
        raise UnsupportedError(
            f"causal_conv1d_fn: {', '.join(given)} (states between calls, packed sequences, or "
            "activation by position) has no exported form; call it with x, weight, bias and "
            "activation= alone, without a cache"
        )
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of None, 'silu', 'swish'")
    # Two-dimensional with height 1: runtimes have faster depthwise kernels for it.
    padded = functional.pad(x[:, :, None], (weight.shape[1] - 1, 0))
    y = functional.conv2d(padded, weight[:, None, None], bias, groups=x.shape[1]).squeeze(2)
    return y if activation is None else functional.silu(y)


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Vim's fork: convolution, projections and gated scan of xz (batch, 2 * d_inner, seqlen).

    Args:
        xz: scan input and gate, one behind the other.
        conv1d_weight: (d_inner, 1, d_conv).
        conv1d_bias: (d_inner) or None.
        x_proj_weight: (dt_rank + 2 * d_state, d_inner); rows of a B or C that is given may lack.
        delta_proj_weight: (d_inner, dt_rank).
        A: (d_inner, d_state).
        B: None: from x_proj.
        C: None: from x_proj.
        D: (d_inner) or None.
        delta_bias: (d_inner) or None.
        B_proj_bias: (d_state) or None, added to the B of x_proj; a B that is given has none.
        C_proj_bias: likewise for C.
        delta_softplus: whether delta goes through softplus.

    Returns:
        (batch, d_inner, seqlen), before the output projection.
    """
    x, z = xz.chunk(2, dim=1)
    u = causal_conv1d_fn(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    weights, biases = (x_proj_weight, delta_proj_weight), (B_proj_bias, C_proj_bias)
    delta, B, C = _project(u, weights, A, (B, C), biases)
    y: Tensor = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return y


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A plain Mamba block: as `mamba_inner_fn_no_out_proj`, then the output projection.

    Returns:
        (batch, seqlen, d_model).

    Raises:
        UnsupportedError: B, C or dt is to be normalised.
    """
    norms = {"b": b_rms_weight, "c": c_rms_weight, "dt": dt_rms_weight}
    if given := [f"{name}_rms_weight" for name, weight in norms.items() if weight is not None]:
        raise UnsupportedError(
            f"mamba_inner_fn: {', '.join(given)} normalises what x_proj gives, which is not "
            "supported; set use_fast_path=False, so that the module does it itself"
        )
    y = mamba_inner_fn_no_out_proj(
        xz,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A,
        B,
        C,
        D,
        delta_bias,
        B_proj_bias,
        C_proj_bias,
        delta_softplus,
    )
    return functional.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Vim's bimamba v1: one convolution and projection, scanned there with A and back with A_b.

    Returns:
        (batch, seqlen, d_model), the sum of both after the output projection.
    """
    x, z = xz.chunk(2, dim=1)
    u = causal_conv1d_fn(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    weights, biases = (x_proj_weight, delta_proj_weight), (B_proj_bias, C_proj_bias)
    delta, B, C = _project(u, weights, A, (B, C), biases)
    ahead = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    turned = (t.flip(-1) for t in (u, delta, B, C, z))
    u_b, delta_b, B_b, C_b, z_b = turned
    back = selective_scan_fn(u_b, delta_b, A_b, B_b, C_b, D, z_b, delta_bias, delta_softplus)
    y = ahead + back.flip(-1)
    return functional.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _project(
    u: Tensor,
    weights: tuple[Tensor, Tensor],
    A: Tensor,
    given: tuple[Tensor | None, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """The delta (batch, d_inner, seqlen), B and C of u (batch, d_inner, seqlen)."""
    x_proj, delta_proj = weights
    rank, states = delta_proj.shape[1], A.shape[1]
    wide = x_proj @ u
    if given == (None, None):
        low, *found = torch.split(wide, [rank, states, states], dim=1)
    else:  # as upstream reads them, whether or not there are rows for the B or C that is given
        low, found = wide[:, :rank], [wide[:, rank : rank + states], wide[:, -states:]]
    delta = functional.linear(low.transpose(1, 2), delta_proj).transpose(1, 2)
    rows = []
    for x, bias, row in zip(given, biases, found, strict=True):
        own = row if bias is None else row + bias.to(row.dtype)[:, None]
        rows.append(own if x is None else x)
    return delta, rows[0], rows[1]
