"""The operators' contract, checked against the table: types, sizes, attributes, order and gap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from vssm.ops.spec import FLAGS, MAX_PLACES, SHARED, OperatorSpec, axes_of

_REMEDIES: Final = {
    "d_state": "split the state over several scans",
    "width": "use a narrower convolution",
    "side": "use a smaller square of taps",
    "K": "give a row to the look back, and one to the look ahead where there is one",
}


def check_operands(op: OperatorSpec, named: Mapping[str, Any]) -> Mapping[str, int]:
    """Every rule that shapes, dtypes and attributes can show, on fake tensors too.

    Args:
        op: the operator.
        named: its tensors, or what else has a shape and a dtype, and its attributes by name.

    Returns:
        The size of each symbol of the operator table.

    Raises:
        ValueError: one breaks the operator's contract.
    """
    _check_types(op, named)
    sizes = _check_sizes(op, named)
    _check_attributes(op, named, sizes)
    return sizes


def empty_outputs(op: OperatorSpec, named: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The outputs, of the shapes, types and device that the operands give them; uninitialised.

    Raises:
        ValueError: an operand breaks the operator's contract.
    """
    return tuple(named[like].new_empty(shape) for like, shape in output_sizes(op, named))


def output_sizes(
    op: OperatorSpec, named: Mapping[str, Any]
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Of each output the name of an input that has its type, and its shape.

    Args:
        op: the operator.
        named: what `check_operands` takes.

    Raises:
        ValueError: an operand breaks the operator's contract.
    """
    sizes = {**check_operands(op, named), "num_keep": named.get("num_keep", 0)}
    of_type = {o.dtype: o.name for o in op.inputs}
    return tuple((of_type[o.dtype], tuple(sizes[s] for s in o.shape)) for o in op.outputs)


def check_values(op: OperatorSpec, named: Mapping[str, Any]) -> None:
    """The rules that only a run can see: of a scan's `order` and `gap`, of others' `position`.

    Raises:
        ValueError: one is broken.
    """
    if "order" in named:
        check_scan_values(op, named)
    if named.get("by_position"):
        position = named["position"]
        _require(
            bool((position.long().diff(dim=1) >= 1).all()),
            f"{op.name} position with values {_span(position)}",
            "must ascend from token to token of every image",
            "sort the tokens by position, or use by_position=0",
        )
        if "grid_width" in named:
            places = named["grid_height"] * named["grid_width"]
            _require(
                bool(((position >= 0) & (position < places)).all()),
                f"{op.name} position with values {_span(position)}",
                f"is outside [0, {places}), the places of the grid",
                "give original positions",
            )
    if "base" in named:
        position, rows = named["position"], named["base"].shape[1]
        _require(
            bool(((position >= 0) & (position < rows)).all()),
            f"{op.name} position with values {_span(position)}",
            f"is outside [0, {rows - 1}], the rows of base",
            "give original positions",
        )
        _require(
            bool((position.long().sort(1).values.diff(dim=1) >= 1).all()),
            f"{op.name} position with values {_span(position)}",
            "must be distinct within an image",
            "give each token its own",
        )


def check_scan_values(op: OperatorSpec, named: Mapping[str, Any]) -> None:
    """The rules of `order` and `gap`, which only a run can see.

    Raises:
        ValueError: `order` is no permutation, or a gap is too small.
    """
    order, gap = named["order"], named["gap"]
    steps = order.new_ones(order.shape[-1]).cumsum(0) - 1
    _require(
        bool((order.sort(-1).values == steps).all()),
        f"{op.name} order with values {_span(order)}",
        f"must be a permutation of [0, {len(steps)}) for every image and direction",
        "build it from argsort or arange",
    )
    _require(
        bool((gap[..., 1:] >= 1).all()) and bool((gap[..., :1] >= 0).all()),
        f"{op.name} gap with values {_span(gap)}",
        "must be at least 1 after a direction's first step, and not negative there",
        "a dense scan has gap 1 everywhere",
    )


def _check_types(op: OperatorSpec, named: Mapping[str, Any]) -> None:
    """The table's types; float64 throughout, A, D, delta_bias and score included, is one more."""
    variables = op.type_variables
    types = {o.name: str(named[o.name].dtype).removeprefix("torch.") for o in op.inputs}
    bound = {o.dtype: types[o.name] for o in reversed(op.inputs) if o.dtype in variables}
    given = tuple(bound[v] for v in variables)
    exact = set(given) == {"float64"}
    _require(
        exact or given in op.types,
        f"{op.name} ({', '.join(variables)})=({', '.join(given)})",
        f"must be one of {' | '.join(', '.join(t) for t in op.types)}, or float64 throughout",
        "cast the inputs",
    )
    for operand in op.inputs:
        wanted = bound.get(operand.dtype, operand.dtype)
        if exact and wanted == "float32":
            wanted = "float64"
        _require(
            types[operand.name] == wanted,
            f"{op.name} {operand.name}.dtype={types[operand.name]}",
            f"must be {wanted} here",
            "cast it",
        )


def _check_sizes(op: OperatorSpec, named: Mapping[str, Any]) -> dict[str, int]:
    """Bind the table's symbolic sizes to these tensors; the sizes by symbol."""
    sizes: dict[str, int] = {}
    shared: list[tuple[str, int, str, str]] = []  # looked at when every symbol has its size
    for operand in op.inputs:
        shape = named[operand.name].shape
        symbols = axes_of(operand, named.get("direction_axis", 2))
        value = f"{op.name} {operand.name}.shape={tuple(shape)}"
        axes = f"its axes are ({', '.join(symbols)})"
        _require(len(shape) == len(symbols), value, "has another rank than the table", axes)
        for symbol, size in zip(symbols, shape, strict=True):
            if symbol.startswith(SHARED):
                shared.append((symbol.removeprefix(SHARED), size, value, axes))
                continue
            known = f"{symbol}={sizes.setdefault(symbol, size)} of the inputs before it"
            rule = f"must have on its axis {symbol} {known}"
            _require(sizes[symbol] == size, value, rule, axes)
    for symbol, size, value, axes in shared:
        rule = f"must have on its axis {SHARED}{symbol} 1 or {symbol}={sizes[symbol]}"
        _require(size in (1, sizes[symbol]), value, rule, axes)
    for symbol, size in sizes.items():
        if symbol != "batch":
            _require(size >= 1, f"{op.name} {symbol}={size}", "must be at least 1", "drop the node")
        if symbol.startswith("K"):
            _require(
                size in (1, sizes["K"]),  # a tuple: a symbolic size has no hash
                f"{op.name} {symbol}={size}",
                f"is neither 1 nor K={sizes['K']}, the directions of order",
                "give one row for all directions or one each",
            )
    if "full_seqlen" in sizes:
        _require(
            sizes["seqlen"] <= sizes["full_seqlen"],
            f"{op.name} seqlen={sizes['seqlen']}",
            f"is outside [1, {sizes['full_seqlen']}], the rows of base",
            "no two tokens share a row of base: give fewer tokens, or the base that they are of",
        )
    for symbol, limit in op.limits:
        value, rule = f"{op.name} {symbol}={sizes[symbol]}", f"is outside [1, {limit}]"
        _require(sizes[symbol] <= limit, value, rule, _REMEDIES[symbol])
    return sizes


def _check_attributes(op: OperatorSpec, named: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    for flag in sorted(FLAGS):
        _require(
            named.get(flag, 0) in {0, 1}, f"{flag}={named.get(flag)}", "must be 0 or 1", "0 is no"
        )
    _require(
        named.get("direction_axis", 2) in {1, 2},
        f"direction_axis={named.get('direction_axis')}",
        "must be 1 or 2",
        "it is an axis of u, delta, B and C",
    )
    scale = named.get("scale", 1.0)
    _require(math.isfinite(scale), f"scale={scale}", "must be finite", "1.0 is the default")
    if "grid_width" in named:
        _check_grid(op, named, sizes)
    if "num_keep" not in named:
        return
    keep, protected, seqlen = named["num_keep"], named["protected_position"], sizes["seqlen"]
    _require(
        1 <= keep <= seqlen,
        f"{op.name} num_keep={keep}",
        f"is outside [1, {seqlen}], the tokens of this layer",
        "derive it from keep_ratio with PruneSchedule.num_keep()",
    )
    _require(
        protected >= -1,
        f"{op.name} protected_position={protected}",
        "must be an original position, or -1 for none",
        "pass the class token's position",
    )


def _check_grid(op: OperatorSpec, named: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    height, width, group = (named[n] for n in ("grid_height", "grid_width", "group"))
    places = height * width
    grid = f"{op.name} grid_height={height}, grid_width={width}"
    _require(
        min(height, width) >= 1 and places <= MAX_PLACES,
        grid,
        f"must be at least 1 and make {MAX_PLACES} places at most",
        "give the grid's rows and columns",
    )
    seqlen, side, d_inner = (sizes[n] for n in ("seqlen", "side", "d_inner"))
    _require(
        seqlen <= places if named["by_position"] else seqlen == places,
        f"{op.name} seqlen={seqlen}",
        f"must be {'at most ' if named['by_position'] else ''}{places}, the places of the grid",
        "say by_position where tokens are missing",
    )
    _require(
        side % 2 == 1,
        f"{op.name} side={side}",
        "is even, so that no tap is its centre",
        "give an odd one",
    )
    _require(group == d_inner, f"{op.name} group={group}", f"must be d_inner={d_inner}", "give it")


def _require(holds: bool, value: str, rule: str, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{value} {rule}; {remedy}")


def _span(x: Tensor) -> str:
    return f"{int(x.min())} to {int(x.max())}" if x.numel() else "none"
