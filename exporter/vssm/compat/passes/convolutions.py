"""Graph pass: causal depthwise convolutions in front of scans become `TokenConv`, token-major.

Repositories convolve (batch, channels, seqlen) by conv1d with a truncation, by a padded conv2d, or
by causal_conv1d_fn, and for the other direction over the flipped sequence. Read over tokens as they
lie, channels last, all of these are one operator: nothing around it is transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from vssm.compat.passes.graph import (
    ATEN,
    Rewriter,
    argument,
    axis,
    is_call,
    is_tensor,
    number,
    rank,
    shape,
)
from vssm.ops import operators as ops
from vssm.ops.reference import token_conv
from vssm.ops.spec import MAX_CONV_WIDTH, TOKEN_CONV

_CONVOLUTIONS: Final = (ATEN.conv1d.default, ATEN.conv2d.default)
_SQUEEZE: Final = ATEN.squeeze.dim
_PADS: Final = (ATEN.pad.default, ATEN.constant_pad_nd.default)
# float64 in two orders of summation; what is not the same function is as far off as its values.
_SAME: Final = 1e-12


@dataclass(frozen=True)
class _Causal:
    """A convolution that looks back over a sequence, or ahead.

    Attributes:
        conv: the node of the convolution.
        x: its operand (batch, d_inner, seqlen), in front of what pads it.
        out: its result, of x's shape, behind what cuts it and behind silu.
        ahead: whether it looks at later tokens.
        silu: whether `out` has gone through silu.
    """

    conv: Node
    x: Node
    out: Node
    ahead: bool
    silu: bool

    @property
    def width(self) -> int:
        """Taps."""
        return int(self.conv.args[1].meta["val"].shape[-1])  # type: ignore[union-attr]


def join_convolutions(r: Rewriter) -> None:
    """Causal depthwise convolutions of token-major values as one `TokenConv` for each value.

    Applied where the nodes, run on noise in float64, give what the operator gives.
    """
    order = {node: place for place, node in enumerate(r.graph.nodes)}
    by_value: dict[Any, list[_Causal]] = {}
    for node in order:
        if not is_call(node, *_CONVOLUTIONS) or not _is_depthwise(node):
            continue
        found = _causal(node)
        if found is None:
            continue
        if why := _why_not(r, found):
            r.report.refuse(why)
        else:
            key = (found.x.args[0], found.width, found.silu)
            by_value.setdefault(key, []).append(found)
    for alike in by_value.values():
        back = [found for found in alike if not found.ahead]
        ahead = [found for found in alike if found.ahead]
        for found in back:
            # The operator's second direction is the one that looks ahead.
            _join(r, [found, ahead.pop(0)] if ahead else [found], order)
        for _ in ahead:
            r.report.refuse("a convolution looks ahead, and none looks back over the same tokens")


def _is_depthwise(node: Node) -> bool:
    weight: Any = node.args[1]
    channels = shape(weight)[0]
    alone = shape(weight)[1:-1] == (1,) * (rank(weight) - 2)
    return alone and argument(node, 6, "groups", 1) == channels and channels > 1


def _causal(conv: Node) -> _Causal | None:
    """What a depthwise convolution is, if it is one over a sequence, each place once."""
    stride, padding = argument(conv, 3, "stride", 1), argument(conv, 4, "padding", 0)
    strides = stride if isinstance(stride, list | tuple) else [stride]
    dilation = argument(conv, 5, "dilation", 1)
    dilations = dilation if isinstance(dilation, list | tuple) else [dilation]
    if any(n != 1 for n in (*strides, *dilations)) or isinstance(padding, str):
        return None
    paddings = list(padding) if isinstance(padding, list | tuple) else [padding]
    if any(paddings[:-1]):
        return None
    source, before = _unpadded(conv)
    if source is None or rank(source) != 3:
        return None
    out, cut = _behind(conv)
    # The place of the first tap's operand, counted from that of the result.
    start = cut - before - int(paddings[-1])
    width = int(shape(conv.args[1])[-1])  # type: ignore[arg-type]
    if shape(out) != shape(source) or start not in {0, 1 - width}:
        return None
    silu = _only_user(out, ATEN.silu.default)
    return _Causal(conv, source, silu or out, start == 0, silu is not None)


def _unpadded(conv: Node) -> tuple[Node | None, int]:
    """The sequence behind what pads it in front and adds an axis, and the places in front."""
    node: Any = conv.args[0]
    before = 0
    while is_call(node, *_PADS, ATEN.unsqueeze.default):
        if is_call(node, ATEN.unsqueeze.default):
            if axis(conv.args[0], node.args[1]) != 2:  # type: ignore[arg-type]
                return None, 0
        else:
            pads: Any = list(node.args[1])
            if not _is_zero_pad(node) or any(pads[2:]):
                return None, 0
            before += int(pads[0])
        node = node.args[0]
    return (node if is_tensor(node) else None), before


def _is_zero_pad(node: Node) -> bool:
    if node.target is ATEN.constant_pad_nd.default:
        return bool(argument(node, 2, "value", 0) == 0)
    constant = argument(node, 2, "mode", "constant") == "constant"
    return constant and argument(node, 3, "value") in {None, 0}


def _behind(node: Node) -> tuple[Node, int]:
    """The value behind what takes the added axis out and cuts, and the places cut in front."""
    cut = 0
    while True:
        squeezed = _only_user(node, ATEN.squeeze.dim)
        sliced = _only_user(node, ATEN.slice.Tensor)
        if squeezed is not None and axis(node, int(squeezed.args[1])) == 2 and rank(node) == 4:  # type: ignore[arg-type]
            node = squeezed
        elif sliced is not None and _is_cut(sliced, node):
            cut += int(argument(sliced, 2, "start") or 0)
            node = sliced
        else:
            return node, cut


def _is_cut(sliced: Node, node: Node) -> bool:
    start = argument(sliced, 2, "start") or 0
    last = axis(node, argument(sliced, 1, "dim", 0)) == rank(node) - 1
    return last and argument(sliced, 4, "step", 1) == 1 and isinstance(start, int) and start >= 0


def _only_user(node: Node, target: Any) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and is_call(users[0], target) else None


def _why_not(r: Rewriter, found: _Causal) -> str | None:
    if not is_call(found.x, ATEN.permute.default) or list(found.x.args[1]) != [0, 2, 1]:  # type: ignore[arg-type]
        return "a convolution's operand is not a token-major value, transposed"
    if found.width > MAX_CONV_WIDTH:
        return f"a convolution has more than {MAX_CONV_WIDTH} taps"
    if found.conv.meta["val"].dtype not in {torch.float32, torch.float64}:
        return "a convolution is not in float32"
    return None if _is_same(r, found) else "a convolution computes something else on noise"


def _is_same(r: Rewriter, found: _Causal) -> bool:
    """Whether the nodes, run on noise, give what the operator gives."""
    generator = torch.Generator().manual_seed(0)
    given: dict[Node, Any] = {}
    for node in (found.x, *found.conv.args[1:3]):
        if isinstance(node, Node):
            sizes = [number(size, r.probes[0]) or 2 for size in node.meta["val"].shape]
            given[node] = torch.randn(sizes, generator=generator, dtype=torch.float64)
    weight, bias = (given.get(node) for node in _pair(found))
    assert weight is not None
    taps = weight.reshape(len(weight), -1)
    taps = taps.flip(-1) if found.ahead else taps
    rows = torch.zeros_like(taps[:, 0]) if bias is None else bias
    x = given[found.x].transpose(1, 2)
    # Of a node with two directions the second looks ahead.
    count = 1 + found.ahead
    wanted = token_conv(
        x,
        taps.expand(count, -1, -1),
        rows.expand(count, -1),
        torch.arange(x.shape[1], dtype=torch.int32)[None],
        by_position=False,
        activation=found.silu,
    )[:, -1]
    result = _evaluated(found.out, given, r.probes[0])
    return result is not None and torch.allclose(
        result, wanted.transpose(1, 2), rtol=_SAME, atol=_SAME
    )


def _pair(found: _Causal) -> tuple[Any, Any]:
    return found.conv.args[1], argument(found.conv, 2, "bias")


def _evaluated(node: Node, given: Mapping[Node, Any], probe: Mapping[Any, int]) -> Tensor | None:
    """A node's value from those that are given; None where it depends on others."""
    if node in given:
        return given[node]  # type: ignore[no-any-return]
    if node.op != "call_function":
        return None
    values: dict[Node, Any] = {}
    for source in node.all_input_nodes:
        size = source.meta.get("val")
        if isinstance(size, torch.SymInt | int):
            values[source] = number(size, probe) or 2
        else:
            values[source] = _evaluated(source, given, probe)
        if values[source] is None:
            return None
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
    target: Any = node.target
    result: Tensor = target(*args, **kwargs)
    return result


def _join(r: Rewriter, parts: list[_Causal], order: Mapping[Node, int]) -> None:
    """One node for a convolution that looks back, and one that looks ahead if there is one."""
    # What reads the first result may stand in front of the second convolution.
    before = min((part.conv for part in parts), key=order.__getitem__)
    x: Any = parts[0].x.args[0]
    weights, biases = zip(*(_operands(r, before, part) for part in parts), strict=True)
    weight = weights[0] if len(parts) == 1 else r.emit(before, ATEN.cat.default, list(weights), 0)
    bias = biases[0] if len(parts) == 1 else r.emit(before, ATEN.cat.default, list(biases), 0)
    seqlen: Any = x.meta["val"].shape[1]
    if isinstance(seqlen, int):
        position = r.table(torch.arange(seqlen, dtype=torch.int32)[None])
    else:
        position = r.emit(before, ATEN.arange.default, r.emit(before, ATEN.sym_size.int, x, 1))
        position = r.emit(before, ATEN.to.dtype, position, torch.int32)
        position = r.emit(before, ATEN.unsqueeze.default, position, 0)
    target = ops.torch_op(TOKEN_CONV)
    y = r.emit(before, target, x, weight, bias, position, 0, int(parts[0].silu))
    for place, part in enumerate(parts):
        # Of one direction a view, not a copy of its part.
        alone = len(parts) == 1
        rows = r.emit(before, *((_SQUEEZE, y, 1) if alone else (ATEN.select.int, y, 1, place)))
        r.replace(part.out, r.emit(before, ATEN.permute.default, rows, [0, 2, 1]))


def _operands(r: Rewriter, before: Node, part: _Causal) -> tuple[Node, Node]:
    """The weight (1, d_inner, width) and bias (1, d_inner) of the operator for one direction."""
    weight, bias = _pair(part)
    channels = int(shape(weight)[0])
    turned = part.ahead
    # A flipped weight is what moved a flip of the sequence behind the convolution: taken back.
    if turned and is_call(weight, ATEN.flip.default) and _flips_last(weight):
        weight, turned = weight.args[0], False
    weight = r.emit(
        before, ATEN.reshape.default, _hoisted(r, before, weight), [1, channels, part.width]
    )
    if turned:
        weight = r.emit(before, ATEN.flip.default, weight, [2])
    if bias is None:
        return weight, r.table(torch.zeros(1, channels, dtype=part.conv.meta["val"].dtype))
    return weight, r.emit(before, ATEN.unsqueeze.default, _hoisted(r, before, bias), 0)


def _flips_last(flip: Any) -> bool:
    return [axis(flip, d) for d in flip.args[1]] == [rank(flip) - 1]


def _hoisted(r: Rewriter, before: Node, node: Node) -> Node:
    """A weight, and what is made of it, again in front of `before`."""
    if node.op != "call_function":
        return node
    inside = {n: _hoisted(r, before, n) for n in node.all_input_nodes}
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), inside.__getitem__)
    return r.emit(before, node.target, *args, **kwargs)
