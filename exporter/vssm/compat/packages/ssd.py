"""Mamba-2 over our scans: mamba_ssm's chunked functions (SSD) and its Mamba2 module.

Mamba-2's recurrence is Mamba-1's with less freedom: the channels of a head share the step size and
one decay, and consecutive heads share B and C. Upstream computes it in chunks of the sequence,
which changes the rounding and nothing else, so here it is a selective scan, one node a group.
Source: Dao & Gu, arXiv:2405.21060; the signatures are those of state-spaces/mamba.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.compat.packages.blocks import causal_conv1d_fn, initial_steps, undecayed
from vssm.compat.packages.norms import GatedRMSNorm, gated_rms_norm
from vssm.compat.packages.scan import NO_STEP, scan_node, shared, wide_type
from vssm.errors import UnsupportedError
from vssm.ops.record import unrecorded

_NO_LIMIT: Final = (0.0, math.inf)


@dataclass(frozen=True)
class _Scan:
    """A scan of heads; the channels of a head lie together.

    Attributes:
        u: (batch, seqlen, nheads * headdim).
        dt: (batch, seqlen, nheads).
        A: (nheads).
        B: (batch, seqlen, ngroups, d_state).
        C: (batch, seqlen, ngroups, d_state).
        D: (nheads), (nheads, headdim) or None.
        z: (batch, seqlen, nheads * headdim) or None.
        dt_bias: (nheads) or None.
        softplus: whether dt goes through softplus.
    """

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    softplus: bool


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: Any = None,
) -> Any:
    """mamba_ssm's scan of Mamba-2.

    Args:
        x: (batch, seqlen, nheads, headdim).
        dt: (batch, seqlen, nheads), before bias and softplus.
        A: (nheads), negative.
        B: (batch, seqlen, ngroups, d_state); consecutive heads share a group.
        C: (batch, seqlen, ngroups, d_state).
        chunk_size: inert: how upstream divides its work.
        D: (nheads) or (nheads, headdim) skip; None for none.
        z: (batch, seqlen, nheads, headdim) gate; None for none.
        dt_bias: (nheads); None for none.
        initial_states: refused.
        seq_idx: refused.
        cu_seqlens: refused.
        dt_softplus: whether dt goes through softplus.
        dt_limit: what the step sizes are clamped to, after softplus.
        return_final_states: also return the states (batch, nheads, headdim, d_state) after the last
            step.
        return_varlen_states: refused.
        state_dtype: inert: states here are float32 or wider.

    Returns:
        y (batch, seqlen, nheads, headdim) in x's dtype, or (y, final_states).

    Raises:
        UnsupportedError: the scan is to begin with given states, or several sequences are packed
            into one.
        ValueError: a shape does not fit.
    """
    _refuse_states("mamba_chunk_scan_combined", initial_states, seq_idx, cu_seqlens)
    _refuse_varlen("mamba_chunk_scan_combined", return_varlen_states)
    heads = x.shape[2:]
    _check("mamba_chunk_scan_combined", x.shape[1:], dt, A, B, C)
    gate = None if z is None else z.flatten(2)
    scan = _Scan(x.flatten(2), dt, A, B, C, D, gate, dt_bias, dt_softplus)
    scan = _limited(scan, dt_limit)
    y = _run(scan).unflatten(2, heads)
    return (y, _final_states(scan).unflatten(1, heads)) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: Any = None,
) -> Any:
    """mamba_ssm's whole Mamba-2 block behind its input projection.

    Args:
        zxbcdt: (batch, seqlen, 2 * d_mlp + 2 * d_inner + 2 * ngroups * d_state + nheads): the gated
            MLP, if there is one; z; x, B and C, which go through the convolution; dt.
        conv1d_weight: (d_inner + 2 * ngroups * d_state, d_conv).
        conv1d_bias: as wide, or None.
        dt_bias: (nheads).
        A: (nheads), negative.
        D: (nheads) or (nheads, headdim) skip.
        chunk_size: inert: how upstream divides its work.
        initial_states: refused.
        seq_idx: refused.
        dt_limit: what the step sizes are clamped to, after softplus.
        return_final_states: also return the states (batch, nheads, headdim, d_state) after the last
            step.
        activation: of the convolution: None, "silu" or "swish".
        rmsnorm_weight: (d_inner) of the norm behind the scan; None for none.
        rmsnorm_eps: of that norm.
        outproj_weight: (d_model, d_inner) of the output projection; None for none.
        outproj_bias: (d_model) or None.
        headdim: channels of a head; needed where D is one number a head.
        ngroups: groups of heads that share B and C.
        norm_before_gate: whether the gate comes behind the norm.
        state_dtype: inert: states here are float32 or wider.

    Returns:
        (batch, seqlen, d_inner or d_model), or (it, final_states).

    Raises:
        UnsupportedError: as for `mamba_chunk_scan_combined`.
        ValueError: a shape does not fit, or `headdim` is missing.
    """
    function = "mamba_split_conv1d_scan_combined"
    _refuse_states(function, initial_states, seq_idx, None)
    if D.dim() == 1 and headdim is None:
        raise ValueError(f"{function}: D is (nheads), which does not tell headdim; give headdim=")
    nheads, width = D.shape[0], headdim if D.dim() == 1 else D.shape[1]
    inner = nheads * int(width or 0)
    rows = conv1d_weight.shape[0] - inner
    mlp = zxbcdt.shape[-1] - inner - conv1d_weight.shape[0] - nheads
    if rows <= 0 or rows % (2 * ngroups) or mlp < 0 or mlp % 2:
        raise ValueError(
            f"{function}: zxbcdt.shape={tuple(zxbcdt.shape)} and conv1d_weight.shape="
            f"{tuple(conv1d_weight.shape)} do not fit {nheads} heads of {width} channels and "
            f"ngroups={ngroups}; their last and first axes are [MLP, z, x, B, C, dt] and [x, B, C]"
        )
    gated_mlp, z, xbc, dt = torch.split(zxbcdt, [mlp, inner, inner + rows, nheads], dim=-1)
    xbc = causal_conv1d_fn(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation)
    x, B, C = torch.split(xbc.transpose(1, 2), [inner, rows // 2, rows // 2], dim=-1)
    B, C = (t.unflatten(2, (ngroups, -1)) for t in (B, C))
    _check(function, (zxbcdt.shape[1], nheads, inner // nheads), dt, A, B, C)
    # Without a norm, or in front of it, the gate is the operator's own.
    gate_first = rmsnorm_weight is None or not norm_before_gate
    scan = _Scan(x, dt, A, B, C, D, z if gate_first else None, dt_bias, softplus=True)
    scan = _limited(scan, dt_limit)
    y, states = _run(scan), _final_states(scan) if return_final_states else None
    if rmsnorm_weight is not None:
        y = gated_rms_norm(
            y,
            rmsnorm_weight,
            None,
            z=None if gate_first else z,
            eps=rmsnorm_eps,
            group_size=inner // ngroups,
        )
    if mlp:
        gate, value = gated_mlp.chunk(2, dim=-1)
        y = torch.cat([functional.silu(gate) * value, y], dim=-1)
    if outproj_weight is not None:
        y = functional.linear(y, outproj_weight, outproj_bias)
    return y if states is None else (y, states.unflatten(1, (nheads, -1)))


def _refuse_states(
    function: str,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if initial_states is not None:
        raise UnsupportedError(
            f"{function}: initial_states continue a sequence that was begun before, and the "
            "operator's states begin at zero; call the model on the whole sequence, without "
            "initial_states (learnable_init_states=False)"
        )
    for name, given in (("seq_idx", seq_idx), ("cu_seqlens", cu_seqlens)):
        if given is not None:
            raise UnsupportedError(
                f"{function}: {name} packs several sequences into one, and the operator keeps one "
                "state a sequence; give each sequence its own row of the batch"
            )


def _refuse_varlen(function: str, return_varlen_states: bool) -> None:
    if return_varlen_states:
        raise UnsupportedError(
            f"{function}: return_varlen_states=True returns a state for each packed sequence, "
            "which is not supported; use return_final_states"
        )


def _check(function: str, sizes: Any, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    """Shapes against (seqlen, nheads, headdim)."""
    seqlen, nheads, _ = sizes
    groups = B.shape[2] if B.dim() == 4 else 0
    fits = {
        "dt": dt.dim() == 3 and tuple(dt.shape[1:]) == (seqlen, nheads),
        "A": tuple(A.shape) == (nheads,),
        "B": B.dim() == 4 and B.shape[1] == seqlen and nheads % groups == 0,
        "C": C.dim() == 4 and tuple(C.shape[1:]) == tuple(B.shape[1:]),
    }
    for name, x in (("dt", dt), ("A", A), ("B", B), ("C", C)):
        if not fits[name]:
            raise ValueError(
                f"{function}: {name}.shape={tuple(x.shape)} does not fit seqlen={seqlen} and "
                f"nheads={nheads}; dt is (batch, seqlen, nheads), A (nheads), B and C (batch, "
                "seqlen, ngroups, d_state), and ngroups divides nheads"
            )


def _limited(scan: _Scan, limit: tuple[float, float]) -> _Scan:
    """The scan whose step sizes need no clamp any more."""
    low, high = limit
    if not low <= high:
        raise ValueError(f"dt_limit={limit} has its bounds in the wrong order; give (low, high)")
    # Softplus is never negative: by default there is nothing to clamp.
    if scan.softplus and low <= 0 and math.isinf(high):
        return scan
    dt = scan.dt.to(wide_type(scan.dt))
    dt = dt if scan.dt_bias is None else dt + scan.dt_bias
    dt = functional.softplus(dt) if scan.softplus else dt
    dt = dt.clamp(min=low, max=None if math.isinf(high) else high)
    return replace(scan, dt=dt, dt_bias=None, softplus=False)


def _final_states(scan: _Scan) -> Tensor:
    """The states (batch, nheads * headdim, d_state) behind the last step.

    d_state more steps, of size zero, leave the states as they are and read them out: their C is one
    row of the unit matrix each. A scan of its own, which is gone from a file that does not use it.
    """
    states, seqlen, batch = scan.B.shape[-1], scan.u.shape[1], scan.u.shape[0]
    stop = scan.dt.new_full((1, states, 1), NO_STEP if scan.softplus else 0.0)
    unit = torch.eye(states, dtype=scan.C.dtype, device=scan.C.device)[None, :, None]
    longer = replace(
        scan,
        u=functional.pad(scan.u, (0, 0, 0, states)),
        dt=torch.cat([scan.dt, stop.expand(batch, -1, scan.dt.shape[2])], dim=1),
        B=functional.pad(scan.B, (0, 0, 0, 0, 0, states)),
        C=torch.cat([scan.C, unit.expand(batch, -1, scan.C.shape[2], -1)], dim=1),
        D=None,
        z=None,
    )
    with unrecorded():
        return _run(longer)[:, seqlen:].transpose(1, 2)


def _run(scan: _Scan) -> Tensor:
    """The y (batch, seqlen, nheads * headdim): one node a group."""
    scan = replace(scan, B=shared(scan.B, 2), C=shared(scan.C, 2))
    groups, nheads = max(scan.B.shape[2], scan.C.shape[2]), scan.A.shape[0]
    width, own_heads = scan.u.shape[2] // nheads, nheads // groups
    # One type for the node; a dt that was computed in float32 keeps its digits.
    kind = torch.promote_types(scan.u.dtype, scan.dt.dtype)
    u, dt, B, C = (x.to(kind) for x in (scan.u, scan.dt, scan.B, scan.C))
    z = None if scan.z is None else scan.z.to(kind)
    skip = scan.D

    def own(x: Tensor, axis: int, size: int, g: int) -> Tensor:
        # Without groups no narrow to the whole, which would be a node in front of the scan.
        return x if groups == 1 else x.narrow(axis, g * size, size)

    pieces = []
    for g in range(groups):
        D = None if skip is None else own(skip, 0, own_heads, g)
        D = D if D is None or D.dim() == 2 else D[:, None].expand(-1, width)
        bias = None if scan.dt_bias is None else own(scan.dt_bias, 0, own_heads, g)
        A = _to_channels(own(scan.A, 0, own_heads, g), width)
        pieces.append(
            scan_node(
                own(u, 2, own_heads * width, g),
                _to_channels(own(dt, 2, own_heads, g), width),
                A[:, None],  # one decay for all states
                B[:, :, g if B.shape[2] > 1 else 0],
                C[:, :, g if C.shape[2] > 1 else 0],
                None if D is None else D.flatten(),
                None if bias is None else _to_channels(bias, width),
                z=None if z is None else own(z, 2, own_heads * width, g),
                delta_softplus=scan.softplus,
            )
        )
    y = pieces[0] if groups == 1 else torch.cat(pieces, dim=2)
    return y.to(scan.u.dtype)


def _to_channels(x: Tensor, width: int) -> Tensor:
    """(..., nheads) to (..., nheads * width): each head's number for each of its channels."""
    return x[..., None].expand(*(-1,) * x.dim(), width).flatten(-2)


class Mamba2(nn.Module):
    """in_proj, causal depthwise convolution, scan of heads, gated norm, out_proj.

    Args:
        d_model: width in and out.
        d_state: states a channel.
        d_conv: taps of the convolution.
        conv_init: bound of its initial weights; None for PyTorch's.
        expand: d_inner / d_model.
        headdim: channels of a head.
        d_ssm: channels that are scanned; the others are a gated MLP. None for all.
        ngroups: groups of heads that share B and C.
        A_init_range: of the initial -A.
        D_has_hdim: whether the skip has a number for each channel instead of each head.
        rmsnorm: whether there is a norm behind the scan.
        norm_before_gate: whether the gate comes behind the norm.
        dt_min: smallest initial step.
        dt_max: largest initial step.
        dt_init_floor: lower bound of the initial steps.
        dt_limit: what the step sizes are clamped to.
        bias: whether in_proj and out_proj have one.
        conv_bias: whether the convolution has one.
        chunk_size: inert: how upstream divides its work.
        use_mem_eff_path: inert: both of upstream's paths compute the same.
        layer_idx: kept as upstream does.
        process_group: refused: one device alone.
        sequence_parallel: inert without a process group.
        device: of the weights.
        dtype: of the weights.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = _NO_LIMIT,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            raise UnsupportedError(
                "Mamba2: process_group divides the layer between devices, and an export is one "
                "file for one device; build the model with process_group=None"
            )
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner, self.headdim, self.ngroups = expand * d_model, headdim, ngroups
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if self.d_ssm % headdim or (self.d_ssm // headdim) % ngroups:
            raise ValueError(
                f"Mamba2: {self.d_ssm} scanned channels are no whole number of heads of headdim="
                f"{headdim} for each of ngroups={ngroups}; choose sizes that divide"
            )
        self.nheads, self.D_has_hdim, self.dt_limit = self.d_ssm // headdim, D_has_hdim, dt_limit
        self.rmsnorm, self.norm_before_gate = rmsnorm, norm_before_gate
        self.conv_init, self.layer_idx, self.chunk_size = conv_init, layer_idx, chunk_size
        self.activation, self.act = "silu", nn.SiLU()
        kind = {"device": device, "dtype": dtype}
        rows = self.d_ssm + 2 * ngroups * d_state
        wide = 2 * self.d_inner + 2 * ngroups * d_state + self.nheads
        self.in_proj = nn.Linear(d_model, wide, bias=bias, **kind)
        # Never called: it holds the weights under upstream's keys, for `causal_conv1d_fn`.
        self.conv1d = nn.Conv1d(
            rows, rows, d_conv, groups=rows, padding=d_conv - 1, bias=conv_bias, **kind
        )
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        steps = initial_steps(self.nheads, dt_min, dt_max, dt_init_floor)
        # The inverse of softplus, so that training starts from these steps.
        inverse = steps + torch.log(-torch.expm1(-steps))
        self.dt_bias = undecayed(nn.Parameter(inverse.to(**kind)))
        decay = torch.empty(self.nheads).uniform_(*A_init_range)
        self.A_log = undecayed(nn.Parameter(decay.log().to(**kind)))
        skips = self.d_ssm if D_has_hdim else self.nheads
        self.D = undecayed(nn.Parameter(torch.ones(skips, device=device)))
        if rmsnorm:
            self.norm = GatedRMSNorm(
                self.d_ssm, 1e-5, self.d_ssm // ngroups, norm_before_gate, **kind
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **kind)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Mixed (batch, seqlen, d_model), or (batch * seqlen, d_model) where `seqlen` is given.

        Raises:
            UnsupportedError: `inference_params` asks for a cache, or sequences are packed.
        """
        if inference_params is not None:
            raise UnsupportedError(
                "Mamba2.forward: inference_params is a cache for decoding token by token; call the "
                "model on the whole sequence (prefill), with inference_params=None"
            )
        _refuse_states("Mamba2.forward", None, seq_idx, cu_seqlens)
        zxbcdt = self.in_proj(u)
        if seqlen is not None:
            zxbcdt = zxbcdt.unflatten(0, (-1, seqlen))
        y: Tensor = mamba_split_conv1d_scan_combined(
            zxbcdt,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(self.A_log.to(wide_type(self.A_log))),
            self.D.unflatten(0, (-1, self.headdim)) if self.D_has_hdim else self.D,
            self.chunk_size,
            dt_limit=self.dt_limit,
            activation=self.activation,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
        )
        return y if seqlen is None else y.flatten(0, 1)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: decoding token by token has no exported form.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "Mamba2.step decodes token by token, which is not supported; call the model on the "
            "whole sequence (prefill)"
        )
