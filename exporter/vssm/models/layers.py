"""Layers shared by the models: norms in float32 or wider, embeddings, position tables."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn

from vssm.errors import CheckpointError
from vssm.ops import operators as ops

_MAX_SIDE = 512  # images of 8,192 pixels in patches of 16


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; nothing at all where it has it, as a trace would hold every call of `to`."""
    return x if x.dtype == dtype else x.to(dtype)


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it is wider."""
    # Not cast to float32 always: a model in float64 is the oracle and must stay float64.
    return x if x.dtype == torch.float64 else to_dtype(x, torch.float32)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 or wider."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width); the result is as wide as the norm's own arithmetic."""
        x = wide(x)
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, in float32 or wider."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.LayerNorm has
        """(..., width) to (..., width); the result is as wide as the norm's own arithmetic."""
        return super().forward(wide(input))


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the channels of a map, in float32 or wider."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.BatchNorm2d has
        """(batch, channels, height, width) to the same; as wide as the norm's own arithmetic."""
        return super().forward(wide(input))


class Linear(nn.Linear):
    """A linear layer that casts its input to its own dtype: islands end where it begins."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear has
        """(..., in_features) to (..., out_features) in the weight's dtype."""
        return super().forward(to_dtype(input, self.weight.dtype))


class Conv2d(nn.Conv2d):
    """A convolution that casts its input to its own dtype."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Conv2d has
        """(batch, in_channels, height, width) to (batch, out_channels, ...)."""
        return super().forward(to_dtype(input, self.weight.dtype))


def to_tokens(x: Tensor) -> Tensor:
    """A map (batch, channels, height, width) as row-major tokens, float32 or wider."""
    return wide(x).flatten(2).transpose(1, 2)


def to_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Row-major tokens (batch, seqlen, channels) as a map (batch, channels, height, width)."""
    return x.transpose(1, 2).reshape(-1, x.shape[2], *grid)


def resize_grid(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A position table (1, old_h * old_w, width) resized to (1, new_h * new_w, width).

    Bicubic, align_corners=False, as the official loaders do.

    Raises:
        CheckpointError: `old` is larger than any image's grid.
    """
    check_grid(*old)
    # Widened first, so that a table in half precision is rounded once, at the end.
    grid = wide(table).reshape(*old, table.shape[-1])
    rows, columns = (_cubic(o, n, grid) for o, n in zip(old, new, strict=True))
    # The kernel is a product of one over rows and one over columns, so two products with constant
    # matrices are the whole of it; exporters fold them where they fold no interpolation.
    grid = torch.einsum("ih,hwd->iwd", rows, grid)
    grid = torch.einsum("jw,iwd->ijd", columns, grid)
    return grid.reshape(1, -1, table.shape[-1]).to(table.dtype)


_CUBIC: Final = -0.75  # PyTorch's choice of the cubic kernel's one parameter


def _cubic(old: int, new: int, like: Tensor) -> Tensor:
    """(new, old): bicubic interpolation along one axis, the border repeated beyond it."""
    centre = (torch.arange(new, device=like.device, dtype=like.dtype) + 0.5) * (old / new) - 0.5
    first = centre.floor()
    place = torch.arange(old, device=like.device)
    matrix = torch.zeros(new, old, device=like.device, dtype=like.dtype)
    for tap in (-1, 0, 1, 2):
        x = (centre - first - tap).abs()
        near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
        far = ((_CUBIC * x - 5 * _CUBIC) * x + 8 * _CUBIC) * x - 4 * _CUBIC
        index = (first.long() + tap).clamp(0, old - 1)
        matrix = matrix + torch.where(x <= 1, near, far)[:, None] * (index[:, None] == place)
    return matrix


def check_grid(height: int, width: int) -> None:
    """Refuse a position table of a file before it is resized, which copies it several times.

    Raises:
        CheckpointError: it is larger than any image's grid.
    """
    if max(height, width) > _MAX_SIDE:
        raise CheckpointError(
            f"a table of {height} x {width} positions has more than {_MAX_SIDE} a side; load the "
            "checkpoint of a model for images"
        )


def fold_batch_norm(
    conv: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d
) -> tuple[Tensor, Tensor]:
    """Weight and bias, float32 or wider, of the convolution that is `conv` and then `norm`.

    With the stored statistics, in training too: they belong to the checkpoint.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise AssertionError("the batch norms of these models keep their statistics")
    scale = wide(norm.weight) / torch.sqrt(wide(norm.running_var) + norm.eps)
    shift = wide(norm.bias) - wide(norm.running_mean) * scale
    if conv.bias is not None:
        shift = shift + wide(conv.bias) * scale
    # A transposed convolution has its input's channels first.
    by_output = (1, -1, 1, 1) if isinstance(conv, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    return wide(conv.weight) * scale.reshape(by_output), shift


def over_grid(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    *,
    position: Tensor | None = None,
    activation: bool = True,
    backend: str,
) -> Tensor:
    """A depthwise convolution over a grid of tokens, at the tokens that are there.

    Args:
        x: (batch, seqlen, width), row by row.
        weight: (width, 1, side, side), of odd side; the result has x's size.
        bias: (width,); None for zeros.
        grid: (height, width) of the grid.
        position: (1 or batch, seqlen) int32, ascending: the tokens' places on the grid, row by
            row. All others are zeros. None where every place has its token.
        activation: whether the result goes through silu.
        backend: what computes it, as for `ops.token_conv`.

    Returns:
        (batch, seqlen, width), dtype of `x`.
    """
    taps = wide(weight).squeeze(1)
    places = position
    if places is None:
        places = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)[None]
    return ops.token_conv2d(
        x,
        taps,
        torch.zeros_like(taps[:, 0, 0]) if bias is None else wide(bias),
        places,
        grid=grid,
        by_position=position is not None,
        activation=activation,
        backend=backend,
    )


def initial_a_log(d_inner: int, d_state: int) -> Tensor:
    """S4D-real: A = -(1 ... d_state) in every channel."""
    # The logarithm is what is trained: A = -exp(A_log) stays negative whatever a step does to it.
    return torch.log(torch.arange(1, d_state + 1).float()).repeat(d_inner, 1)


def initial_dt_proj(dt_rank: int, d_inner: int) -> nn.Linear:
    """The projection to step sizes as Mamba draws it."""
    layer = nn.Linear(dt_rank, d_inner)
    bound = dt_rank**-0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    with torch.no_grad():
        layer.bias.copy_(initial_step_bias(d_inner))
    return layer


def initial_step_bias(*shape: int) -> Tensor:
    """softplus(bias) log-uniform in [1e-3, 1e-1], as Mamba draws it."""
    low, high = math.log(1e-3), math.log(1e-1)
    # The floor is Mamba's dt_init_floor; with dt from 1e-3 up it never takes effect.
    dt = torch.exp(torch.rand(*shape) * (high - low) + low).clamp(min=1e-4)
    # The inverse of softplus; expm1 keeps the digits that 1 - exp(-dt) loses at dt near 1e-3.
    return dt + torch.log(-torch.expm1(-dt))
