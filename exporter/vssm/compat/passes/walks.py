"""Graph pass: walks over a map, however they are written, become gathers by one table a scan.

Repositories write the ways in which a map is read as stacks, transposes, flips, windows and
assignments into an empty tensor, and undo them alike behind the scan. What such a chain does is
read off by running it on the numbers of its source's elements. Where each step of a scan turns out
to read one place, and what is made of the scan's result to put it back there, both become plain
gathers, which `absorb_orders` then turns into the scan's order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from vssm.compat.passes.graph import (
    ATEN,
    SCANS,
    Rewriter,
    argument,
    is_call,
    is_size,
    is_tensor,
    rank,
    scan_arguments,
    shape,
)

# Operators that move elements and compute nothing. Their operands are tensors in the first place.
_VIEWS: Final = (ATEN.reshape.default, ATEN.view.default, ATEN._unsafe_view.default)
_MOVES: Final = frozenset(
    {
        *_VIEWS,
        ATEN.permute.default,
        ATEN.transpose.int,
        ATEN.flip.default,
        ATEN.roll.default,
        ATEN.flatten.using_ints,
        ATEN.unflatten.int,
        ATEN.unsqueeze.default,
        ATEN.squeeze.dim,
        ATEN.squeeze.default,
        ATEN.expand.default,
        ATEN.repeat.default,
        ATEN.slice.Tensor,
        ATEN.select.int,
        ATEN.narrow.default,
        ATEN.index_select.default,
        ATEN.index.Tensor,
        ATEN.contiguous.default,
        ATEN.clone.default,
        ATEN.alias.default,
        ATEN.detach.default,
        ATEN.split_with_sizes.default,
        ATEN.unbind.int,
        ATEN.unfold.default,
        ATEN.movedim.int,
        ATEN.movedim.intlist,
        ATEN.swapaxes.default,
        ATEN.pixel_shuffle.default,
        ATEN.pixel_unshuffle.default,
        ATEN.gather.default,
        operator.getitem,
    }
)
_JOINS: Final = frozenset({ATEN.cat.default, ATEN.stack.default})
# `x[:, 0] = y` without mutation: the values of the second operand in the places of the first.
_WRITES: Final = frozenset(
    {
        ATEN.slice_scatter.default,
        ATEN.select_scatter.default,
        ATEN.copy.default,
        ATEN.scatter.src,
        ATEN.index_put.default,
    }
)
_BY_TABLE: Final = frozenset({ATEN.index.Tensor, ATEN.index_select.default, ATEN.gather.default})
# The written values' place among the operands, where it is not the second one.
_VALUES: Final[dict[Any, int]] = {ATEN.scatter.src: 3, ATEN.index_put.default: 2}
# What stays of these in a result is no place of a map: zeros, too, are only there to be written to.
_EMPTY: Final = frozenset(
    {
        ATEN.new_empty.default,
        ATEN.empty.memory_format,
        ATEN.empty_like.default,
        ATEN.new_zeros.default,
        ATEN.zeros.default,
        ATEN.zeros_like.default,
    }
)
# The batch is counted as this while places are: two images show what belongs to which.
_BATCH: Final = 2
_NOWHERE: Final = -1
_LARGEST: Final = 1 << 25  # elements whose places are followed


class _UnknownError(Exception):
    """A value is more than moved elements; the text says why, for the report."""


class Places:
    """Where the elements of values are from, as numbers of their sources' elements.

    A value may be a sum: it has one tensor of places for each term, of its own shape.

    Args:
        r: of the program.
        probe: the sizes with which they are counted.
        sums: the additions that are such sums; any other is a source.
        unfolded: whether a view of a source counts as the source.
    """

    def __init__(
        self,
        r: Rewriter,
        probe: Mapping[Any, int],
        *,
        sums: frozenset[Node] = frozenset(),
        unfolded: bool = False,
    ) -> None:
        self._r, self.probe, self._sums, self._unfolded = r, probe, sums, unfolded
        self._known: dict[Node, Any] = {}
        self._starts: dict[Node, int] = {}
        self._end = self._held = 0

    def of(self, node: Node) -> list[Tensor]:
        """The places of each term of a node's value."""
        if node not in self._known:
            if _count(node, self.probe) > _LARGEST:
                raise _UnknownError("a walk is over too large a map")
            found = self._find(node)
            # Found again where it is needed again: all at once would take gigabytes.
            self._held += _count(node, self.probe) * len(found)
            if self._held > _LARGEST:
                self._known.clear()
                self._held = 0
            self._known[node] = found
        held: list[Tensor] = self._known[node]
        return held

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape of a node's value."""
        return _shape(node, self.probe)

    def root(self, places: Tensor) -> tuple[Node, Tensor]:
        """The one source of all places, and their numbers in it."""
        first = int(places.min())
        if first == _NOWHERE:
            raise _UnknownError("a walk leaves the map")
        source = next(n for n, s in self._starts.items() if s <= first < s + _count(n, self.probe))
        inside = places - self._starts[source]
        if int(inside.max()) >= _count(source, self.probe):
            raise _UnknownError("a scan reads more than one value")
        return source, inside

    def sources(self, node: Node) -> set[Node]:
        """The sources of which a value has any element; none where they are not known."""
        try:
            terms = self.of(node)
        except _UnknownError:
            return set()
        return {
            source
            for source, start in self._starts.items()
            for places in terms
            if bool(((places >= start) & (places < start + _count(source, self.probe))).any())
        }

    def _find(self, node: Node) -> Any:
        target: Any = node.target
        if node.op == "call_function" and not self._is_root(node):
            if target in _EMPTY:
                return [torch.full(self.shape(node), _NOWHERE)]
            if target in _JOINS:
                return self._joined(node)
            if target is operator.getitem:
                which: Any = node.args[1]
                return [parts[which] for parts in self._inside(node.args[0])]
            if target in _WRITES:
                return self._written(node)
            if node in self._sums:
                return self._summed(node)
            args = self._numbers(node.args[1:])
            kwargs = {k: v for k, v in self._numbers(node.kwargs).items() if k != "memory_format"}
            return [target(places, *args, **kwargs) for places in self._inside(node.args[0])]
        return [self._counted(node)]

    def _inside(self, node: Any) -> Any:
        return self.of(node) if is_tensor(node) else self._known_parts(node)

    def _known_parts(self, node: Node) -> Any:
        # The value of a split is a tuple, for which `of` has no shape to look at.
        if node not in self._known:
            self._known[node] = self._find(node)
        return self._known[node]

    def _is_root(self, node: Node) -> bool:
        known = _MOVES | _JOINS | _WRITES | _EMPTY
        if node in self._sums:
            return False
        if node.target not in known or _adds_up(node):
            return True
        # By a table that the input decides: what it reads is a value of its own.
        tables = (n for n in node.all_input_nodes[1:] if node.target in _BY_TABLE and is_tensor(n))
        if any(_table(self._r, n, self.probe) is None for n in tables):
            return True
        # A view of a product, whose own axes may be folded: the view's axes are the plain ones.
        return self._unfolded and node.target in _VIEWS and not self._moves(node.args[0])

    def _moves(self, node: Any) -> bool:
        return (
            isinstance(node, Node)
            and node.op == "call_function"
            and (node in self._sums or node.target in _MOVES | _JOINS | _WRITES | _EMPTY)
        )

    def _counted(self, node: Node) -> Tensor:
        if not is_tensor(node):
            raise _UnknownError("a walk is made of what is no tensor")
        count = _count(node, self.probe)
        start = self._starts.setdefault(node, self._end)
        self._end = max(self._end, start + count)
        return torch.arange(start, start + count).reshape(self.shape(node))

    def _joined(self, node: Node) -> list[Tensor]:
        parts = [self.of(part) for part in node.args[0]]  # type: ignore[union-attr, arg-type]
        terms = max(map(len, parts))
        none = [torch.full_like(part[0], _NOWHERE) for part in parts]
        target: Any = node.target
        rest = self._numbers(node.args[1:])
        return [
            target([p[i] if i < len(p) else n for p, n in zip(parts, none, strict=True)], *rest)
            for i in range(terms)
        ]

    def _written(self, node: Node) -> list[Tensor]:
        at = _VALUES.get(node.target, 1)
        into, values = self.of(node.args[0]), self.of(node.args[at])  # type: ignore[arg-type]
        terms = max(len(into), len(values))
        into = [*into, *[torch.full_like(into[0], _NOWHERE)] * (terms - len(into))]
        values = [*values, *[torch.full_like(values[0], _NOWHERE)] * (terms - len(values))]
        target: Any = node.target
        before, behind = self._numbers((node.args[1:at], node.args[at + 1 :]))
        named = self._numbers(node.kwargs)
        return [target(a, *before, b, *behind, **named) for a, b in zip(into, values, strict=True)]

    def _summed(self, node: Node) -> list[Tensor]:
        if is_call(node, ATEN.add.Tensor):
            return [places for part in node.args[:2] for places in self.of(part)]  # type: ignore[arg-type]
        (dim,) = self._numbers(node.args[1])
        return [part for places in self.of(node.args[0]) for part in places.unbind(dim)]  # type: ignore[arg-type]

    def _numbers(self, value: Any) -> Any:
        """Arguments with every symbolic size as a number, and every table as its value."""

        def number(node: Node) -> Any:
            found = node.meta.get("val")
            if isinstance(found, torch.SymInt | int):
                return _number(found, self.probe)
            table = _table(self._r, node, self.probe)
            if table is None:
                raise _UnknownError("a walk depends on the input")
            return table

        return torch.fx.map_arg(value, number)


def _table(r: Rewriter, node: Node, probe: Mapping[Any, int]) -> Tensor | None:
    """The value of a table, one that is repeated for every image included."""
    sizes = node.meta["val"].shape if is_tensor(node) else ()
    open_ones = {s for n in sizes if not isinstance(n, int) for s in n.node.expr.free_symbols}
    return r.constant(node, {**dict.fromkeys(open_ones, _BATCH), **probe}, largest=_LARGEST)


def _number(size: Any, probe: Mapping[Any, int]) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr.subs(probe)
    return int(expression.subs(dict.fromkeys(expression.free_symbols, _BATCH)))


def _shape(node: Node, probe: Mapping[Any, int]) -> tuple[int, ...]:
    return tuple(_number(size, probe) for size in node.meta["val"].shape)


def _count(node: Node, probe: Mapping[Any, int]) -> int:
    return math.prod(_shape(node, probe)) if is_tensor(node) else 0


@dataclass(frozen=True)
class _Walk:
    """Tokens of a map in some order.

    Attributes:
        source: the value that the map is.
        picked: (axis, index) of axes of the source of which one entry is taken.
        batch: the axis of images.
        tokens: axes that make up a map's tokens.
        channels: axes that make up a token's channels.
        first: the first channel taken.
        tables: the token of each step, at each probe.
    """

    source: Node
    picked: tuple[tuple[int, int], ...]
    batch: int
    tokens: tuple[int, ...]
    channels: tuple[int, ...]
    first: int
    tables: tuple[Tensor, ...]


def _walk(places: Places, node: Node) -> _Walk:
    """What a scan operand (batch, seqlen, 1, width) reads."""
    source, index = places.root(places.of(node)[0][:, :, 0])
    sizes = places.shape(source)
    roles: dict[str, list[int]] = {"batch": [], "tokens": [], "channels": []}
    picked, rest = [], index
    coordinates = {}
    for place in reversed(range(len(sizes))):
        rest, at = rest // sizes[place], rest % sizes[place]
        moving = [bool((at != at.narrow(d, 0, 1)).any()) for d in range(3)]
        if sum(moving) > 1:
            raise _UnknownError("a walk folds tokens, channels or images into one axis")
        coordinates[place] = at
        if not any(moving):
            if sizes[place] > 1:
                picked.append((place, int(at.flatten()[0])))
            continue
        roles[("batch", "tokens", "channels")[moving.index(True)]].insert(0, place)

    def ravel(axes: list[int]) -> Tensor:
        total = torch.zeros_like(index)
        for place in axes:
            total = total * sizes[place] + coordinates[place]
        return total

    batches, _, width = index.shape
    images, tokens, channels = (ravel(axes) for axes in roles.values())
    first = int(channels[0, 0, 0])
    straight = torch.equal(images, torch.arange(batches)[:, None, None].expand_as(images))
    together = torch.equal(channels, (first + torch.arange(width)).expand_as(channels))
    if len(roles["batch"]) != 1 or not straight or not together:
        raise _UnknownError("a walk moves images or channels too")
    if len(roles["channels"]) > 1 and width != math.prod(sizes[c] for c in roles["channels"]):
        raise _UnknownError("a walk reads some channels of several axes")
    return _Walk(
        source,
        tuple(picked),
        roles["batch"][0],
        tuple(roles["tokens"]),
        tuple(roles["channels"]),
        first,
        (tokens[0, :, 0].clone(),),
    )


def _walk_of(everywhere: Sequence[Places], node: Node) -> _Walk:
    """What a scan operand reads, at every probe."""
    first, *others = (_walk(places, node) for places in everywhere)
    if any(replace(other, tables=first.tables) != first for other in others):
        raise _UnknownError("a walk is another one at another size")
    return replace(first, tables=tuple(walk.tables[0] for walk in (first, *others)))


@dataclass(frozen=True)
class _Return:
    """What is made of results of scans: each put back in place, and summed.

    Attributes:
        node: the value.
        axes: for each axis of it "batch", "tokens" or "channels", or None where it is 1 long.
        terms: each scan, and the step that each token is read from, at each probe.
    """

    node: Node
    axes: tuple[str | None, ...]
    terms: tuple[tuple[Node, tuple[Tensor, ...]], ...]


def _return(places: Places, node: Node) -> _Return:
    """How a value is made of scans alone."""
    sizes = places.shape(node)
    terms, all_axes = [], set()
    for each in places.of(node):
        scan, index = places.root(each)
        _, seqlen, width = places.shape(scan)
        parts = {
            "batch": index // (seqlen * width),
            "tokens": index // width % seqlen,
            "channels": index % width,
        }
        axes: list[str | None] = []
        for dim, size in enumerate(sizes):
            moving = [n for n, at in parts.items() if bool((at != at.narrow(dim, 0, 1)).any())]
            if len(moving) > 1 or (size > 1) != bool(moving):
                raise _UnknownError("results of scans are folded together")
            axes.append(moving[0] if moving else None)
        all_axes.add(tuple(axes))
        held = {
            role: math.prod(s for s, a in zip(sizes, axes, strict=True) if a == role)
            for role in parts
        }
        if held != {"batch": _BATCH, "tokens": seqlen, "channels": width}:
            raise _UnknownError("a part of a scan's result is left out")
        flat = index.permute(_apart(axes)).reshape(-1, seqlen, width)
        table = flat[0, :, 0] // width
        again = torch.arange(flat.shape[0])[:, None, None] * seqlen + table[:, None]
        if not torch.equal(flat, again * width + torch.arange(width)):
            raise _UnknownError("images or channels of a scan's result are moved")
        terms.append((scan, (table.clone(),)))
    if len(all_axes) > 1:
        raise _UnknownError("results of scans are summed in different layouts")
    return _Return(node, all_axes.pop(), tuple(terms))


def _return_of(everywhere: Sequence[Places], node: Node) -> _Return:
    """How a value is made of scans alone, at every probe."""
    first, *others = (_return(places, node) for places in everywhere)
    scans = [scan for scan, _ in first.terms]
    for other in others:
        if other.axes != first.axes or [scan for scan, _ in other.terms] != scans:
            raise _UnknownError("results of scans are put back otherwise at another size")
    tables = [[table for _, (table,) in found.terms] for found in (first, *others)]
    return replace(first, terms=tuple(zip(scans, zip(*tables, strict=True), strict=True)))


def _apart(axes: list[str | None]) -> list[int]:
    """Axes in the order batch, tokens, channels; those that are 1 long last."""
    roles = ("batch", "tokens", "channels", None)
    return sorted(range(len(axes)), key=lambda dim: roles.index(axes[dim]))


def follow_walks(r: Rewriter) -> None:
    """Walks into scans and back become gathers along the tokens, where they do nothing else.

    A scan of a map's tokens in the order of a table, whose result is read back by the inverse of
    the table, is the scan in that order.
    """
    scans = [node for node in r.graph.nodes if node.target in SCANS]
    _write_means_as_sums(r, _made_of(r, scans))
    made = _made_of(r, scans)
    sums = frozenset(filter(_is_sum, made))
    back = [Places(r, probe, sums=sums) for probe in r.probes]
    returns: list[_Return] = []
    left: set[Node] = set()
    for node in made:
        # Only what leaves: what it is made of goes with it.
        if any(user not in made and not _asks_for_size(user) for user in node.users):
            try:
                returns.append(_return_of(back, node))
            except _UnknownError as why:
                left |= back[0].sources(node) or _scans_of(node, made)
                r.report.refuse(str(why))
    walks = _walks(r, scans, returns, left)
    steps = {scan: _steps(r, scan, walk) for scan, walk in walks.items()}
    for found in returns:
        if all(scan in walks for scan, _ in found.terms):
            _read_back(r, found, {scan: (walks[scan], steps[scan]) for scan, _ in found.terms})
    emitted: dict[Any, Node] = {}
    for scan, walk in walks.items():
        _read_by_table(r, scan, walk, (steps[scan], emitted))


def _made_of(r: Rewriter, scans: list[Node]) -> dict[Node, None]:
    """Every value that is made of results of scans by moves and sums alone, in order."""
    made: dict[Node, None] = {}
    inside = set(scans)
    for node in r.graph.nodes:
        if node.op != "call_function" or node in inside:
            continue
        tensors = [n for n in node.all_input_nodes if "val" in n.meta and not is_size(n)]
        from_scans = [n for n in tensors if n in inside]
        others = [n for n in tensors if n not in inside]
        moves = node.target in _MOVES | _JOINS | _WRITES and not _adds_up(node)
        moves = moves or _is_sum(node)
        # A table, or the empty tensor that results are written into, is no other value.
        if from_scans and moves and all(_is_aside(r, node, n) for n in others):
            made[node] = None
            inside.add(node)
    return made


def _write_means_as_sums(r: Rewriter, made: Mapping[Node, None]) -> None:
    """Write the mean of scans' results as their sum, divided: the passes know sums and factors."""
    for node in list(r.graph.nodes):
        if not is_call(node, ATEN.mean.dim) or node.args[0] not in made:
            continue
        source: Any = node.args[0]
        dims: Any = node.args[1]
        if len(node.args) > 2 or node.kwargs or len(dims) != 1:
            continue
        count = shape(source)[dims[0]]
        if isinstance(count, int):
            total = r.emit(node, ATEN.sum.dim_IntList, source, list(dims))
            node.replace_all_uses_with(r.emit(node, ATEN.div.Tensor, total, count))
            r.graph.erase_node(node)  # what no walk is made of would be another reader


def _asks_for_size(node: Node) -> bool:
    return is_size(node) or node.target in _EMPTY


def _is_sum(node: Node) -> bool:
    if is_call(node, ATEN.add.Tensor):
        a, b = node.args[:2]
        return bool(is_tensor(a) and is_tensor(b) and not node.kwargs) and shape(a) == shape(b)  # type: ignore[arg-type]
    if is_call(node, ATEN.sum.dim_IntList):
        return len(node.args) == 2 and len(node.args[1]) == 1 and not node.kwargs  # type: ignore[arg-type]
    return False


def _adds_up(node: Node) -> bool:
    """Whether values are added to what is there, instead of written over it."""
    return is_call(node, ATEN.index_put.default) and bool(argument(node, 3, "accumulate", False))


def _is_aside(r: Rewriter, user: Node, node: Node) -> bool:
    if user.target in _WRITES and node is user.args[0]:
        return node.target in _EMPTY or _is_aside_chain(node)
    return all(_table(r, node, probe) is not None for probe in r.probes)


def _is_aside_chain(node: Node) -> bool:
    """Whether a value is a part of an empty tensor."""
    while node.op == "call_function" and node.target in _MOVES:
        source: Any = node.args[0]
        node = source
    return node.target in _EMPTY


def _scans_of(node: Node, made: dict[Node, None]) -> set[Node]:
    found, waiting = set(), [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source.target in SCANS:
                found.add(source)
            elif source in made:
                waiting.append(source)
    return found


def _walks(
    r: Rewriter, scans: list[Node], returns: list[_Return], left: set[Node]
) -> dict[Node, _Walk]:
    """The walks of the scans that become gathers: all of what is read back together, or none."""
    forth = [Places(r, probe) for probe in r.probes]
    unfolded = [Places(r, probe, unfolded=True) for probe in r.probes]
    walks: dict[Node, _Walk] = {}
    backs: dict[Node, list[tuple[Tensor, ...]]] = {}
    for found in returns:
        for scan, tables in found.terms:
            backs.setdefault(scan, []).append(tables)
    for scan in scans:
        named = scan_arguments(scan)
        if scan in left or scan not in backs or "z" in named:
            continue
        try:
            walk = _walk_of(forth, named["u"])
        except _UnknownError:
            try:
                walk = _walk_of(unfolded, named["u"])
            except _UnknownError as why:
                r.report.refuse(str(why))
                continue
        inverses = [torch.argsort(table) for table in walk.tables]
        # Equal to its own inverse's inverse: a permutation of all tokens of the map.
        whole = all(
            torch.equal(table[inverse], torch.arange(len(table)))
            for table, inverse in zip(walk.tables, inverses, strict=True)
        )
        if not whole or not all(_alike(tables, inverses) for tables in backs[scan]):
            continue
        if _is_settled(r) or _arithmetic(r, walk) is not None:
            walks[scan] = walk
        else:
            r.report.refuse("no arithmetic on height and width is known that makes a walk")
    kept = len(walks) + 1
    while len(walks) < kept:  # what is summed with a scan that stays, stays too
        kept = len(walks)
        for found in returns:
            if not all(scan in walks for scan, _ in found.terms) or not _is_sized(found, walks):
                for scan, _ in found.terms:
                    walks.pop(scan, None)
    # In token order already, and summed with none that is not: other passes know that form.
    moved = {s for s, w in walks.items() if not all(map(_is_in_order, w.tables))}
    moved |= {s for f in returns if moved & {s for s, _ in f.terms} for s, _ in f.terms}
    return {scan: walk for scan, walk in walks.items() if scan in moved}


def _is_sized(found: _Return, walks: Mapping[Node, _Walk]) -> bool:
    """Whether every open size of a returned map is one of the map that was walked over."""
    source = walks[found.terms[0][0]]
    known = [str(shape(source.source)[axis]) for axis in source.tokens]
    sizes = [s for s, a in zip(shape(found.node), found.axes, strict=True) if a == "tokens"]
    return len(sizes) == 1 or all(isinstance(size, int) or size in known for size in sizes)


def _alike(tables: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tables, others, strict=True))


def _is_in_order(table: Tensor) -> bool:
    return torch.equal(table, torch.arange(len(table)))


def _is_settled(r: Rewriter) -> bool:
    """Whether the program has one size of map, so that a walk is a table."""
    return r.probes == ({},)


def _steps(r: Rewriter, scan: Node, walk: _Walk) -> Node:
    """The token of each step of a walk, in front of its scan: a table, or computed from sizes."""
    if _is_settled(r):
        return r.table(walk.tables[0])
    recipe = _arithmetic(r, walk)
    assert recipe is not None  # or it would be no walk

    def emit(target: Any, *args: Any) -> Any:
        return r.emit(scan, target, *args)

    sizes = [emit(ATEN.sym_size.int, walk.source, axis) for axis in walk.tokens]
    return _written_by(emit, sizes, recipe)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Recipe:
    """A walk over a grid in words: the axes that are flipped, then turned, then by windows."""

    flips: tuple[int, ...]
    turned: bool = False
    window: int = 1


_RECIPES: Final = tuple(
    _Recipe(flips, turned, window)
    for window in range(1, 17)
    for turned in (False, True)
    for flips in ((), (0,), (1,), (0, 1))
)


def _arithmetic(r: Rewriter, walk: _Walk) -> _Recipe | None:
    """The recipe that makes a walk's tables at all probes."""

    def call(target: Any, *args: Any) -> Any:
        return target(*args)

    grids = [[_shape(walk.source, probe)[axis] for axis in walk.tokens] for probe in r.probes]
    if any(len(grid) != 2 for grid in grids):
        fitting = [_Recipe(()), _Recipe((0,))] if all(len(grid) == 1 for grid in grids) else []
    else:
        fitting = [x for x in _RECIPES if not any(n % x.window for grid in grids for n in grid)]
    for recipe in fitting:
        if all(
            torch.equal(_written_by(call, grid, recipe), table)
            for grid, table in zip(grids, walk.tables, strict=True)
        ):
            return recipe
    return None


def _written_by(call: Callable[..., Any], sizes: list[Any], recipe: _Recipe) -> Any:
    """The tokens of a grid in the order of a recipe; `call` computes, or emits nodes."""
    count = sizes[0] if len(sizes) == 1 else call(operator.mul, *sizes)
    tokens = call(ATEN.arange.default, count)
    if len(sizes) > 1:
        tokens = call(ATEN.reshape.default, tokens, sizes)
    if recipe.flips:
        tokens = call(ATEN.flip.default, tokens, list(recipe.flips))
    if recipe.turned:
        tokens, sizes = call(ATEN.permute.default, tokens, [1, 0]), sizes[::-1]
    if (side := recipe.window) > 1:
        rows, columns = (call(operator.floordiv, size, side) for size in sizes)
        tokens = call(ATEN.reshape.default, tokens, [rows, side, columns, side])
        tokens = call(ATEN.permute.default, tokens, [0, 2, 1, 3])
    return call(ATEN.reshape.default, tokens, [-1]) if len(sizes) > 1 else tokens


def _read_by_table(
    r: Rewriter, scan: Node, walk: _Walk, known: tuple[Node, dict[Any, Node]]
) -> None:
    """Let a scan read tokens (batch, tokens, width) of the map by a table."""
    steps, emitted = known
    named = scan_arguments(scan)
    width = named["u"].meta["val"].shape[3]
    key = (walk.source, walk.picked, walk.batch, walk.tokens, walk.channels, walk.first, width)
    if key not in emitted:
        emitted[key] = _token_major(r, scan, walk, width)
    taken = r.emit(scan, ATEN.index_select.default, emitted[key], 1, steps)
    scan.update_arg(0, r.emit(scan, ATEN.unsqueeze.default, taken, 2))
    r.report.applied += 1


def _token_major(r: Rewriter, scan: Node, walk: _Walk, width: int) -> Node:
    """The map of a walk as (batch, tokens, width), in front of the first scan that reads it."""
    node, axes = walk.source, list(range(rank(walk.source)))
    anchor = scan
    for place, index in sorted(walk.picked, reverse=True):
        node = r.emit(anchor, ATEN.select.int, node, place, index)
        axes.remove(place)
    used = (walk.batch, *walk.tokens, *walk.channels)
    for place in reversed([a for a in axes if a not in used]):
        node = r.emit(anchor, ATEN.squeeze.dim, node, axes.index(place))
        axes.remove(place)
    order = [axes.index(place) for place in used]
    if order != sorted(order):
        node = r.emit(anchor, ATEN.permute.default, node, order)
    for start, group in ((1, walk.tokens), (2, walk.channels)):
        if not group:
            node = r.emit(anchor, ATEN.unsqueeze.default, node, start)
        elif len(group) > 1:
            node = r.emit(anchor, ATEN.flatten.using_ints, node, start, start + len(group) - 1)
    if width != node.meta["val"].shape[2]:
        node = r.emit(anchor, ATEN.slice.Tensor, node, 2, walk.first, walk.first + width)
    return node


def _read_back(r: Rewriter, found: _Return, walks: Mapping[Node, tuple[_Walk, Node]]) -> None:
    """Let a value be the sum of gathers of the scans' results, in its own layout."""
    node = found.node
    with_tables = []
    for scan, tables in found.terms:
        back = r.table(tables[0]) if _is_settled(r) else _inverse(r, node, walks[scan][1])
        with_tables.append(r.emit(node, ATEN.index_select.default, scan, 1, back))
    total = with_tables[0]
    for other in with_tables[1:]:
        total = r.emit(node, ATEN.add.Tensor, total, other)
    sizes = _sizes(r, node, walks[found.terms[0][0]][0])
    for role, dim in (("channels", 2), ("tokens", 1)):
        group = [size for size, axis in zip(sizes, found.axes, strict=True) if axis == role]
        if len(group) > 1:
            total = r.emit(node, ATEN.unflatten.int, total, dim, group)
        elif not group:
            total = r.emit(node, ATEN.squeeze.dim, total, dim)
    used = [dim for dim in _apart(list(found.axes)) if found.axes[dim] is not None]
    order = sorted(range(len(used)), key=lambda at: used[at])
    if order != sorted(order):
        total = r.emit(node, ATEN.permute.default, total, order)
    for dim, axis in enumerate(found.axes):
        if axis is None:
            total = r.emit(node, ATEN.unsqueeze.default, total, dim)
    node.replace_all_uses_with(total)


def _inverse(r: Rewriter, before: Node, steps: Node) -> Node:
    """The step of each token, of the token of each step."""
    counted = r.emit(before, ATEN.arange.default, r.emit(before, ATEN.sym_size.int, steps, 0))
    nothing = r.emit(before, ATEN.zeros_like.default, steps)
    return r.emit(before, ATEN.scatter.src, nothing, 0, steps, counted)


def _sizes(r: Rewriter, node: Node, walk: _Walk) -> list[Any]:
    """The sizes of a value, those of the map as what its source has."""
    found: list[Any] = []
    for size in node.meta["val"].shape:
        places = [axis for axis in walk.tokens if str(size) == str(shape(walk.source)[axis])]
        is_open = not isinstance(size, int) and places
        found.append(r.emit(node, ATEN.sym_size.int, walk.source, places[0]) if is_open else size)
    return found
