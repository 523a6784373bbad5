"""mamba_ssm's fused blocks and causal_conv1d's convolution, taken apart over our operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.compat.packages.scan import selective_scan_fn
from vssm.errors import UnsupportedError
from vssm.models.layers import initial_a_log

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
        older: further positional arguments, whose meaning changed between releases: an activation
            as the first, as the older ones have it; else refused.
        activation: None, "silu" or "swish", by keyword.
        states: seq_idx, initial_states, return_final_states, final_states_out: None or False.

    Returns:
        (batch, d_inner, seqlen).

    Raises:
        UnsupportedError: an argument that this form has not is given.
    """
    # Only the older releases have a text there.
    if activation is None and older and isinstance(older[0], str):
        activation, *older = older  # type: ignore[assignment]
    # None and False ask for nothing, wherever they stand, so callers of either release get through.
    given = [repr(value) for value in older if value is not None and value is not False]
    given += [f"{k}={v!r}" for k, v in states.items() if v is not None and v is not False]
    if given:
        raise UnsupportedError(
            f"causal_conv1d_fn: {', '.join(given)} (states between calls, or packed "
            "sequences) has no exported form; call it with x, weight, bias and "
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
    # v1 looks back over what the forward convolution made; only A is the backward scan's own.
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
    if given == (None, None):  # and a split refuses weights whose rows are of other sizes
        low, *found = torch.split(wide, [rank, states, states], dim=1)
    else:  # as upstream reads them, whether or not there are rows for the B or C that is given
        low, found = wide[:, :rank], [wide[:, rank : rank + states], wide[:, -states:]]
    delta = functional.linear(low.transpose(1, 2), delta_proj).transpose(1, 2)
    rows = []
    for x, bias, row in zip(given, biases, found, strict=True):
        own = row if bias is None else row + bias.to(row.dtype)[:, None]
        # The bias belongs to the projection: upstream adds none to a B or C that it is given.
        rows.append(own if x is None else x)
    return delta, rows[0], rows[1]


_BIMAMBA = ("none", "v1", "v2")


class Mamba(nn.Module):
    """in_proj, causal depthwise convolution, x_proj, dt_proj, gated scan, out_proj.

    Args:
        d_model: width in and out.
        d_state: states a channel.
        d_conv: taps of the convolution.
        expand: d_inner / d_model.
        dt_rank: "auto" for ceil(d_model / 16).
        dt_min: smallest initial step.
        dt_max: largest initial step.
        dt_init: "random" or "constant".
        dt_scale: of the initial step projection.
        dt_init_floor: lower bound of the initial steps.
        conv_bias: whether the convolution has one.
        bias: whether in_proj and out_proj have one.
        use_fast_path: inert: both of upstream's paths compute the same for one direction.
        layer_idx: kept as upstream does.
        device: of the weights.
        dtype: of the weights.
        bimamba_type: "none" or None, "v1" (an own A for the backward direction) or "v2" (own
            weights).
        if_divide_out: v2: halve the sum of the directions.
        init_layer_scale: initial `gamma`, None without one.
        of_a_fork: any other argument is refused.

    Raises:
        UnsupportedError: an argument, or a `bimamba_type`, that only a fork of mamba_ssm has.
    """

    A_log: nn.Parameter
    A_b_log: nn.Parameter
    D: nn.Parameter
    D_b: nn.Parameter
    dt_proj: nn.Linear
    dt_proj_b: nn.Linear

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
        bimamba_type: str | None = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        **of_a_fork: Any,
    ) -> None:
        super().__init__()
        bimamba_type = bimamba_type or "none"
        if bimamba_type not in _BIMAMBA:
            of_a_fork["bimamba_type"] = bimamba_type
        if of_a_fork:
            given = ", ".join(f"{name}={value!r}" for name, value in of_a_fork.items())
            raise UnsupportedError(
                f"Mamba({given}): neither mamba_ssm nor Vim's fork has that (bimamba_type is "
                f"{', '.join(_BIMAMBA)}); give the folder that holds the mamba_ssm of this "
                "repository with --path, and its own file is used"
            )
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.bimamba_type, self.if_divide_out = bimamba_type, if_divide_out
        self.init_layer_scale = init_layer_scale
        self.activation, self.act = "silu", nn.SiLU()
        kind = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **kind)
        # v2 has a second set of everything but in_proj and out_proj, v1 a second A alone.
        for suffix in ("", "_b") if bimamba_type == "v2" else ("",):
            self._add_branch(suffix, conv_bias, kind)
            steps = initial_steps(self.d_inner, dt_min, dt_max, dt_init_floor)
            self._initialise_steps(suffix, steps, dt_init, dt_scale)
        if bimamba_type == "v1":
            self.A_b_log = self._state_log(device)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **kind)
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model, device=device))

    def _add_branch(self, suffix: str, conv_bias: bool, kind: dict[str, Any]) -> None:
        inner, rank, taps = self.d_inner, self.dt_rank, self.d_conv
        # Never called: it holds the weights under upstream's keys, for `causal_conv1d_fn`.
        conv = nn.Conv1d(inner, inner, taps, bias=conv_bias, groups=inner, padding=taps - 1, **kind)
        self.add_module(f"conv1d{suffix}", conv)
        x_proj = nn.Linear(inner, rank + 2 * self.d_state, bias=False, **kind)
        self.add_module(f"x_proj{suffix}", x_proj)
        self.add_module(f"dt_proj{suffix}", nn.Linear(rank, inner, bias=True, **kind))
        log, skip = ("A_b_log", "D_b") if suffix else ("A_log", "D")
        self.register_parameter(log, self._state_log(kind["device"]))
        ones = nn.Parameter(torch.ones(inner, device=kind["device"]))
        self.register_parameter(skip, undecayed(ones))

    def _state_log(self, device: Any) -> nn.Parameter:
        log = initial_a_log(self.d_inner, self.d_state)
        return undecayed(nn.Parameter(log.to(device or log.device)))

    def _initialise_steps(self, suffix: str, steps: Tensor, how: str, scale: float) -> None:
        if how not in {"random", "constant"}:
            raise ValueError(f"dt_init={how!r} is not random or constant; choose one of these")
        projection: Any = getattr(self, f"dt_proj{suffix}")
        bound = self.dt_rank**-0.5 * scale
        if how == "constant":
            nn.init.constant_(projection.weight, bound)
        else:
            nn.init.uniform_(projection.weight, -bound, bound)
        with torch.no_grad():
            # The inverse of softplus, so that training starts from these steps.
            projection.bias.copy_(steps + torch.log(-torch.expm1(-steps)))
        # What upstream's own initialisers look for: leave this bias alone.
        projection.bias._no_reinit = True

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """Mixed (batch, seqlen, d_model).

        Raises:
            UnsupportedError: `inference_params` asks for a cache.
        """
        if inference_params is not None:
            raise UnsupportedError(
                "Mamba.forward: inference_params is a cache for decoding token by token; call the "
                "model on the whole sequence (prefill), with inference_params=None"
            )
        # Called, not read: repositories put other modules in the place of the outer projections.
        out = self._mix(self.in_proj(hidden_states).transpose(1, 2))
        return out if self.init_layer_scale is None else out * self.gamma

    def _mix(self, xz: Tensor) -> Tensor:
        """(batch, seqlen, d_model) of xz (batch, 2 * d_inner, seqlen)."""
        A, D, bias = -torch.exp(self.A_log), self.D, self.dt_proj.bias
        weights = self._weights("")
        if self.bimamba_type == "v1":
            out, A_b = self.out_proj, -torch.exp(self.A_b_log)
            return bimamba_inner_fn(
                xz, *weights, out.weight, out.bias, A, A_b, D=D, delta_bias=bias
            )
        y = mamba_inner_fn_no_out_proj(xz, *weights, A, D=D, delta_bias=bias)
        if self.bimamba_type == "v2":
            back = mamba_inner_fn_no_out_proj(
                xz.flip(-1),
                *self._weights("_b"),
                -torch.exp(self.A_b_log),
                D=self.D_b,
                delta_bias=self.dt_proj_b.bias,
            )
            y = y + back.flip(-1)
            # Before the output projection: its bias is added once, and is not halved.
            y = y / 2 if self.if_divide_out else y
        mixed: Tensor = self.out_proj(y.transpose(1, 2))
        return mixed

    def _weights(self, suffix: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        conv: Any = getattr(self, f"conv1d{suffix}")
        x_proj: Any = getattr(self, f"x_proj{suffix}")
        dt_proj: Any = getattr(self, f"dt_proj{suffix}")
        return conv.weight, conv.bias, x_proj.weight, dt_proj.weight

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: decoding token by token has no exported form.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "Mamba.step decodes token by token, which is not supported; call the model on the "
            "whole sequence (prefill)"
        )


def initial_steps(d_inner: int, low: float, high: float, floor: float) -> Tensor:
    """Log-uniform step sizes in [low, high]."""
    span = math.log(high) - math.log(low)
    # Drawn as upstream draws them; only models without a checkpoint keep them.
    return torch.exp(torch.rand(d_inner) * span + math.log(low)).clamp(min=floor)


def undecayed(parameter: nn.Parameter) -> nn.Parameter:
    """Marked as upstream's optimiser set-up expects."""
    marked: Any = parameter
    marked._no_weight_decay = True
    return parameter
