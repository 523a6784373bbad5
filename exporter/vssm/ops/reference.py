"""The oracle: every operator as plain PyTorch, short enough to check against the paper.

Differentiable and dtype-generic: sums and state are float32, or float64 where the inputs are.
Sources: selective scan, Gu & Dao, arXiv:2312.00752, Algorithm 2; hidden-state alignment and
token selection, Zhan et al., arXiv:2409.18962.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight

# Steps whose decays (batch, steps, K, d_inner, d_state) are held at once: bounds the memory.
_CHUNK = 64


def selective_scan(
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
    delta_softplus: bool = True,
    params_by_step: bool = False,
    scale: float = 1.0,
    direction_axis: int = 2,
) -> Tensor:
    """All directions of a layer, summed in token order.

    Per direction k and step t, with q = order[b, k, t] and s = t if params_by_step else q::

        dt = softplus(delta[b, s, k] + delta_bias[k])
        h  = exp(D_t * A[k]) * h + dt * B[b, s, k] * u[b, q, k]
        y[b, q] += scale * (C[b, s, k] . h + D[k] * u[b, q, k])

    where D_t = gap * dt, or dt + (gap - 1) * delta0 when `delta0` is given.

    Args:
        u: (batch, seqlen, 1 or K, d_inner) scan input.
        delta: (batch, seqlen, 1 or K, d_inner) step size before bias and softplus.
        A: (1 or K, d_inner, 1 or d_state), negative; one decay for all states where the last is 1.
        B: (batch, seqlen, 1 or K, d_state).
        C: (batch, seqlen, 1 or K, d_state).
        D: (1 or K, d_inner) skip.
        delta_bias: (Kd, d_inner), Kd as in `delta`.
        order: (1 or batch, K, seqlen) integers, the token of each step; a permutation.
        gap: (1 or batch, K, seqlen) integers, the original positions a step stands for.
        z: (batch, seqlen, d_inner) gate: y is multiplied by silu(z).
        delta0: (Kd, d_inner) step size of a pruned token, after bias and softplus.
        delta_softplus: whether dt is softplus(delta + bias) or the sum itself.
        params_by_step: whether delta, B, C of step t are those of token t instead of token q.
        scale: factor of the sum over directions.
        direction_axis: 1 where u, delta, B and C are (batch, 1 or K, seqlen, ...).

    Returns:
        y (batch, seqlen, d_inner), dtype of `u`.
    """
    if direction_axis == 1:
        u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
    compute = torch.promote_types(u.dtype, torch.float32)
    u_dtype, (u, delta, A, B, C, D) = u.dtype, (x.to(compute) for x in (u, delta, A, B, C, D))
    token = order.long().expand(u.shape[0], -1, -1).transpose(1, 2)[..., None]
    owner = _steps(token) if params_by_step else token  # of delta, B and C
    x, dt = _rows(u, token), _rows(delta, owner) + delta_bias.to(compute)
    if delta_softplus:
        dt = functional.softplus(dt)
    _, span = _spans(dt, token, gap, delta0)
    y = _recurrence(span, A, dt * x, _rows(B, owner), _rows(C, owner)) + D * x
    y = _put(y, token, shared=True)[:, :, 0] * scale
    if z is not None:
        y = y * functional.silu(z.to(compute))
    return y.to(u_dtype)


def _recurrence(span: Tensor, A: Tensor, inject: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """y_t = C_t . h_t, h_t = exp(span_t A) h_{t-1} + inject_t B_t; (batch, seqlen, K, width)."""
    h = inject.new_zeros(*inject.shape[:1], *inject.shape[2:], B.shape[-1])
    outputs = []
    for start in range(0, inject.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        decay = torch.exp(span[:, part, :, :, None] * A)
        source = inject[:, part, :, :, None] * B[:, part, :, None, :]
        states = []
        for a, b in zip(decay.unbind(1), source.unbind(1), strict=True):
            h = torch.addcmul(b, a, h)
            states.append(h)
        outputs.append(torch.einsum("btken,btkn->btke", torch.stack(states, 1), C[:, part]))
    return torch.cat(outputs, 1)


def token_gather(
    score: Tensor,
    position: Tensor,
    xs: Sequence[Tensor],
    *,
    num_keep: int,
    protected_position: int = -1,
) -> tuple[Tensor, list[Tensor]]:
    """Keep the protected token and the highest scores, in ascending index order.

    Equal scores keep the lower index, -0 equals +0, NaN ranks below -inf, the protected token
    above +inf.

    Args:
        score: (batch, seqlen), larger is kept.
        position: (1 or batch, seqlen) integers, distinct within an image: original positions.
        xs: tensors (batch, seqlen, width) whose rows are gathered.
        num_keep: tokens kept per image, the protected one included.
        protected_position: original position of the token that is always kept; -1 for none.

    Returns:
        kept_position (batch, num_keep), dtype of `position`; each x's kept rows
        (batch, num_keep, width).

    Raises:
        ValueError: `num_keep` is outside [1, seqlen].
    """
    batch, seqlen = score.shape
    if not 1 <= num_keep <= seqlen:
        raise ValueError(
            f"num_keep={num_keep} is outside [1, {seqlen}], the tokens of this layer; "
            "derive it from keep_ratio with PruneSchedule.num_keep()"
        )
    positions = position.expand(batch, -1)
    # Two stable sorts, least significant key first: the score, then its class (the protected
    # token, numbers, NaN). A single sort would let NaN lead and would tie the protected with +inf.
    rank = torch.where(score.isnan(), 2, 1)
    if protected_position >= 0:
        rank = torch.where(positions == protected_position, 0, rank)
    number = torch.where(score.isnan(), 0.0, score)
    by_score = torch.argsort(number, dim=1, descending=True, stable=True)
    by_class = torch.argsort(rank.gather(1, by_score), dim=1, stable=True)
    kept = by_score.gather(1, by_class)[:, :num_keep].sort(dim=1).values
    rows = [x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1])) for x in xs]
    return positions.gather(1, kept), rows


def token_scatter(base: Tensor, x: Tensor, position: Tensor) -> Tensor:
    """Rows at their positions over a base: the inverse of `token_gather`.

    Args:
        base: (batch, full_seqlen, width), what is shown where no row of x is.
        x: (batch, seqlen, width), of its type.
        position: (1 or batch, seqlen) integers, distinct within an image: rows of base.

    Returns:
        y (batch, full_seqlen, width), dtype of `base`.
    """
    return base.scatter(1, position.long()[..., None].expand_as(x), x)


def token_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    *,
    by_position: bool = False,
    activation: bool = True,
) -> Tensor:
    """Each direction's depthwise convolution over a list of tokens.

    The first direction looks back: tap `o` behind the last one (`weight[0, :, width - 1 - o]`)
    reads the token `o` before. The second looks ahead: its tap reads the token `o` after.

    Args:
        x: (batch, seqlen, d_inner).
        weight: (1 or 2, d_inner, width), the taps as `torch.nn.Conv1d` has them.
        bias: (1 or 2, d_inner).
        position: (1 or batch, seqlen) integers, ascending: original positions.
        by_position: whether `o` counts original positions, of which the pruned ones are zeros, or
            the tokens of the list.
        activation: whether y goes through silu.

    Returns:
        y (batch, 1 or 2, seqlen, d_inner), dtype of `x`.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    rows, index = _spread(x.to(compute), position, weight.shape[2] if by_position else 0)
    y = torch.stack([_sums(*taps) for taps in _both_ways(rows, weight, bias)], 1)
    if index is not None:
        y = y.gather(3, index[:, None].expand(-1, y.shape[1], -1, -1))
    return (functional.silu(y) if activation else y).transpose(2, 3).to(x.dtype)


def token_conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    *,
    by_position: bool = False,
    activation: bool = True,
) -> dict[str, Tensor]:
    """The gradients of `token_conv` by its x, weight and bias, by name.

    Written out, because inside an operator of its own autograd records nothing. `dy` (batch, 1 or
    2, seqlen, d_inner) is the gradient by y; what follows is as `token_conv` takes it.

    Returns:
        The gradients, each of its input's shape, in float32 or, of float64 inputs, float64.
    """
    compute, width = torch.promote_types(x.dtype, torch.float32), weight.shape[2]
    rows, index = _spread(x.to(compute), position, width if by_position else 0)
    dx, dweight, dbias = torch.zeros_like(rows), [], []
    for k, (padded, taps, shift) in enumerate(_both_ways(rows, weight, bias)):
        g = dy[:, k].to(compute).transpose(1, 2)
        if index is not None:
            g = torch.zeros_like(rows).scatter(2, index, g)
        if activation:
            g = g * _slope_of_silu(_sums(padded, taps, shift))
        reached = functional.conv_transpose1d(g, taps[:, None], groups=len(taps))
        dx += reached[..., width - 1 :] if k == 0 else reached[..., : rows.shape[2]]
        dtaps = torch.einsum("bdt,bdjt->dj", g, padded.unfold(2, rows.shape[2], 1))
        dweight.append(dtaps if k == 0 else dtaps.flip(-1))
        dbias.append(g.sum((0, 2)))
    if index is not None:
        dx = dx.gather(2, index)
    found = {"x": dx.transpose(1, 2), "weight": torch.stack(dweight), "bias": torch.stack(dbias)}
    return {name: gradient.contiguous() for name, gradient in found.items()}


def token_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    *,
    grid_height: int,
    grid_width: int,
    group: int,
    by_position: bool = False,
    activation: bool = True,
) -> Tensor:
    """A depthwise convolution over a grid among whose tokens some are missing, at the others.

    Args:
        x: (batch, seqlen, d_inner).
        weight: (d_inner, side, side), the taps as `torch.nn.Conv2d` has them; of odd side.
        bias: (d_inner,).
        position: (1 or batch, seqlen) integers, ascending: places on the grid, row by row.
        grid_height: rows of the grid.
        grid_width: columns of it.
        group: d_inner.
        by_position: whether the tokens are at `position`, with zeros everywhere else; or, with
            all of them there, one after the other.
        activation: whether y goes through silu.

    Returns:
        y (batch, seqlen, d_inner), dtype of `x`.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    place = _places(x, position if by_position else None)
    maps = _on_grid(x.to(compute), place, (grid_height, grid_width))
    y = _sums_on_grid(maps, weight, bias).flatten(2).gather(2, place).transpose(1, 2)
    return (functional.silu(y) if activation else y).to(x.dtype)


def token_conv2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    *,
    grid_height: int,
    grid_width: int,
    group: int,
    by_position: bool = False,
    activation: bool = True,
) -> dict[str, Tensor]:
    """The gradients of `token_conv2d` by its x, weight and bias, by name.

    `dy` (batch, seqlen, d_inner) is the gradient by y; what follows is as `token_conv2d` takes it.

    Returns:
        The gradients, each of its input's shape, in float32 or, of float64 inputs, float64.
    """
    compute, grid = torch.promote_types(x.dtype, torch.float32), (grid_height, grid_width)
    place = _places(x, position if by_position else None)
    maps, g = (_on_grid(rows.to(compute), place, grid) for rows in (x, dy))
    if activation:
        g = g * _slope_of_silu(_sums_on_grid(maps, weight, bias))
    taps = weight.to(maps)[:, None]
    reach = weight.shape[1] // 2
    dx = conv2d_input(maps.shape, taps, g, padding=reach, groups=group)
    dweight = conv2d_weight(maps, taps.shape, g, padding=reach, groups=group)
    found = {"x": dx.flatten(2).gather(2, place).transpose(1, 2), "weight": dweight[:, 0]}
    found["bias"] = g.sum((0, 2, 3))
    return {name: gradient.contiguous() for name, gradient in found.items()}


def _places(x: Tensor, position: Tensor | None) -> Tensor:
    """The place of each token on its grid, (batch, d_inner, seqlen)."""
    if position is None:
        position = torch.arange(x.shape[1], device=x.device)[None]
    return position.long()[:, None].expand(x.shape[0], x.shape[2], -1)


def _on_grid(x: Tensor, place: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens among zeros, (batch, d_inner, height, width)."""
    maps = x.new_zeros(*place.shape[:2], grid[0] * grid[1])
    return maps.scatter(2, place, x.transpose(1, 2)).reshape(*place.shape[:2], *grid)


def _sums_on_grid(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    taps, shift = weight.to(maps)[:, None], bias.to(maps)
    return functional.conv2d(maps, taps, shift, padding=taps.shape[2] // 2, groups=len(taps))


def _slope_of_silu(x: Tensor) -> Tensor:
    part = x.sigmoid()
    return part * (1 + x * (1 - part))


def _spread(x: Tensor, position: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Channels first, (batch, d_inner, places), and the place of each token.

    `width` is that of taps which count positions: every token stands at its own then, apart from
    the others as far as the taps can tell. At 0 they count tokens, which are their own places.
    """
    rows = x.transpose(1, 2)
    if not width:
        return rows, None
    # Further apart than the taps reach is as good as any distance: it bounds the memory.
    apart = position.long().diff(dim=1).clamp(max=width)
    index = functional.pad(apart.cumsum(1), (1, 0))[:, None].expand_as(rows)
    return rows.new_zeros(*rows.shape[:2], width * x.shape[1]).scatter(2, index, rows), index


def _both_ways(
    rows: Tensor, weight: Tensor, bias: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each direction's padded rows, its taps in their order along them, and its bias."""
    reach = weight.shape[2] - 1
    for k, (taps, shift) in enumerate(zip(weight.to(rows), bias.to(rows), strict=True)):
        back = k == 0
        yield (
            functional.pad(rows, (reach, 0) if back else (0, reach)),
            taps if back else taps.flip(-1),
            shift,
        )


def _sums(padded: Tensor, taps: Tensor, shift: Tensor) -> Tensor:
    return functional.conv1d(padded, taps[:, None], shift, groups=len(taps))


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
    direction_axis: int = 2,
) -> dict[str, Tensor]:
    """The gradients of a loss by every floating-point input of `selective_scan`.

    `dy` (batch, seqlen, d_inner) is the gradient by its output; what follows is as it takes it.

    Returns:
        By the name of the input its gradient, of its shape, in float32 or wider.
    """
    outside = direction_axis == 1
    if outside:
        u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
    compute = torch.promote_types(u.dtype, torch.float32)
    dy, u, delta, A, B, C, D = (x.to(compute) for x in (dy, u, delta, A, B, C, D))
    token = order.long().expand(u.shape[0], -1, -1).transpose(1, 2)[..., None]
    owner = _steps(token) if params_by_step else token  # of delta, B and C
    x, b, c = _rows(u, token), _rows(B, owner), _rows(C, owner)
    before = _rows(delta, owner) + delta_bias.to(compute)
    dt = functional.softplus(before) if delta_softplus else before
    more, span = _spans(dt, token, gap, delta0)
    decay = torch.exp(span[..., None] * A)  # (batch, seqlen, K, d_inner, d_state)
    h = _states(decay, (dt * x)[..., None] * b[..., None, :])

    gradients: dict[str, Tensor] = {}
    if z is not None:
        y = _put((h * c[..., None, :]).sum(-1) + D * x, token, shared=True)[:, :, 0] * scale
        gradients["z"], dy = _through_gate(dy, y, z.to(compute))
    g = _rows(dy[:, :, None], token) * scale
    d = _carried(decay, g[..., None] * c[..., None, :])
    e = d * decay * torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
    w, f = (d * b[..., None, :]).sum(-1), (e * A).sum(-1)
    slope = torch.sigmoid(before) if delta_softplus else 1
    v = (w * x + f * (1 + more if delta0 is None else 1)) * slope
    gradients["u"] = _put(w * dt + g * D, token, shared=u.shape[2] == 1)
    gradients["delta"] = _put(v, owner, shared=delta.shape[2] == 1)
    by_A = e * span[..., None]
    gradients["A"] = _total(by_A if A.shape[-1] > 1 else by_A.sum(-1, keepdim=True), A)
    gradients["B"] = _put((d * (dt * x)[..., None]).sum(-2), owner, shared=B.shape[2] == 1)
    gradients["C"] = _put((g[..., None] * h).sum(-2), owner, shared=C.shape[2] == 1)
    gradients["D"] = _total(g * x, D)
    gradients["delta_bias"] = _total(v, delta_bias)
    if delta0 is not None:
        gradients["delta0"] = _total(f * more, delta0)
    for name in ("u", "delta", "B", "C") if outside else ():
        gradients[name] = gradients[name].transpose(1, 2)
    return gradients


def _spans(dt: Tensor, token: Tensor, gap: Tensor, delta0: Tensor | None) -> tuple[Tensor, Tensor]:
    """How many pruned positions each step passes, and the time over which its state decays."""
    more = torch.where(_steps(token) > 0, gap.transpose(1, 2)[..., None] - 1, 0)  # h = 0 before
    return more, _span(dt, more, delta0)


def _span(dt: Tensor, more: Tensor, delta0: Tensor | None) -> Tensor:
    """The time over which a step's state decays; `more` positions were pruned before it."""
    # Not dt + more dt: an infinite step that passes no position would add 0 inf, which is NaN.
    return (1 + more) * dt if delta0 is None else dt + more * delta0.to(dt.dtype)


def _through_gate(dy: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by z and by y, from that by y silu(z)."""
    gate = torch.sigmoid(z)
    return dy * y * gate * (1 + z * (1 - gate)), dy * z * gate


def _steps(token: Tensor) -> Tensor:
    """The number of each step, as `token` (batch, seqlen, K, 1) lies."""
    return torch.arange(token.shape[1], device=token.device).view(1, -1, 1, 1).expand_as(token)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
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
