"""Sizes of the input that a file leaves open: those that the module's own code allows, and a proof.

torch.export notes every condition on sizes under which what it traced is what the code does. The
sizes that meet all of them are read off; a table of positions, a number made of a size, or a walk
of fixed length leaves but one, and is refused by its line.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnxruntime
import sympy
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

from vssm.artifact.manifest import BATCH, FreeSize
from vssm.compat.batch import user_line
from vssm.compat.exact import Outputs, evaluating
from vssm.compat.passes.graph import ATEN
from vssm.errors import RuntimeUnavailableError, UnsupportedError, check_several
from vssm.files.json import is_name
from vssm.native_library import ORT_LIBRARY, find_library

_IMAGE_AXES: Final = {"height": 2, "width": 3}
# Multiples beyond the example's size that have to be allowed, before all are taken to be.
_AHEAD: Final = 4
_LARGEST_STEP: Final = 32  # the stride of the last stage of nearly all pyramids
# The fault that is looked for, a size or an order of the example's, is as large as the values;
# float32 in two orders of summation is 1e-6 to 1e-5 of the largest value apart.
_SAME: Final = 1e-4
_PROOF_BATCHES: Final = (1, 3)

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class FreeAxis:
    """An axis of the input that is to have any size, and its name in the file.

    The trace knows it as `count` times `step`, so that what the module divides it by, as a rule
    powers of two, leaves no rounded quotients behind: of those in those, torch's algebra takes
    minutes.
    """

    name: str
    axis: int
    example: int

    @property
    def step(self) -> int:
        """The largest power of two up to 32 that divides the example's size, twice or more."""
        step = 1
        while step < _LARGEST_STEP and self.example % (2 * step) == 0 and self.example >= 4 * step:
            step *= 2
        return step


@dataclass(frozen=True)
class SizeRule(FreeAxis):
    """A free axis, and which sizes it may have."""

    size: FreeSize

    def after(self, steps: int) -> int:
        """A size `steps` steps from the example's, as far as it may be that small."""
        wanted = self.size.example + steps * self.size.multiple
        return wanted if self.size.allows(wanted) else wanted - 2 * steps * self.size.multiple


def free_axes(dynamic: Sequence[str], shape: Sequence[int]) -> tuple[FreeAxis, ...]:
    """The axes of an input that `dynamic` names: height, width, or NAME=AXIS, counted from 0.

    Raises:
        TypeError: it is one text.
        ValueError: a name or an axis is none, or is there twice.
    """
    check_several(dynamic=dynamic)
    found: list[FreeAxis] = []
    for text in dynamic:
        name, equals, place = text.partition("=")
        if not equals and (len(shape) != 4 or name not in _IMAGE_AXES):
            raise ValueError(
                f"dynamic={text!r} with an input of shape {tuple(shape)}: only images "
                "(batch, channels, height, width) have height and width; say NAME=AXIS, such as "
                "length=1"
            )
        axis = _IMAGE_AXES[name] if not equals else int(place) if place.isdecimal() else -1
        if not name.isidentifier() or not is_name(name) or name == BATCH:
            raise ValueError(f"dynamic={text!r}: {name!r} is not a name of a size; use letters")
        if not 1 <= axis < len(shape):
            raise ValueError(
                f"dynamic={text!r}: the axes of an input of shape {tuple(shape)} behind "
                f"the batch are 1 to {len(shape) - 1}; name one of them"
            )
        if any(name == other.name or axis == other.axis for other in found):
            raise ValueError(f"dynamic={list(dynamic)} names {name!r} or its axis twice")
        found.append(FreeAxis(name, axis, shape[axis]))
    return tuple(found)


def split(x: Tensor, axes: Sequence[FreeAxis]) -> Tensor:
    """An input with every free axis as two, (count, step)."""
    for axis in _from_the_back(axes):
        x = x.unflatten(axis.axis, (-1, axis.step))
    return x


def joined(x: Tensor, axes: Sequence[FreeAxis]) -> Tensor:
    """What `split` split."""
    # In front of one that is still split, an axis has its own place.
    for axis in reversed(_from_the_back(axes)):
        x = x.flatten(axis.axis, axis.axis + 1)
    return x


def _from_the_back(axes: Sequence[FreeAxis]) -> list[FreeAxis]:
    return sorted(axes, key=lambda axis: -axis.axis)


def join_input(program: ExportedProgram, axes: Sequence[FreeAxis]) -> None:
    """Let a program that was traced with a split input take it as it is."""
    graph, node = program.graph, user_input(program)
    whole, counts = node, [n for n in node.users if n.target is ATEN.sym_size.int]
    places = {a.axis + i: a for i, a in enumerate(sorted(axes, key=lambda axis: axis.axis))}
    for _ in axes:
        (whole,) = (n for n in whole.users if n.target is ATEN.flatten.using_ints)
    for name in ("val", "tensor_meta"):
        if name in whole.meta:
            node.meta[name] = whole.meta[name]
    whole.replace_all_uses_with(node)
    for count in counts:
        place = int(count.args[1])
        axis = places.get(place)
        # Axes in front of this one were two each.
        place -= sum(other < place for other in places)
        with graph.inserting_before(count):
            size = graph.call_function(ATEN.sym_size.int, (node, place))
            size.meta["val"] = node.meta["val"].shape[place]
            new = size
            if axis is not None:
                new = graph.call_function(operator.floordiv, (size, axis.step))
                new.meta["val"] = count.meta["val"]
        count.replace_all_uses_with(new)
    graph.eliminate_dead_code()
    program._example_inputs = None


@contextmanager
def noting_conditions() -> Iterator[dict[Any, str]]:
    """Note for each condition on sizes the line of the user's code that needs it."""
    lines: dict[Any, str] = {}
    log = ShapeEnv._log_guard

    def noting(self: Any, prefix: str, g: Any, forcing_spec: bool) -> None:
        lines.setdefault(g, user_line())
        log(self, prefix, g, forcing_spec)

    ShapeEnv._log_guard = noting  # type: ignore[method-assign]
    try:
        yield lines
    finally:
        ShapeEnv._log_guard = log  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Condition:
    """A condition on sizes, as torch noted it and as a function of the sizes by name."""

    text: str
    line: str
    equal: bool
    holds: Callable[[Sizes], bool]


def size_rules(
    program: ExportedProgram, axes: Sequence[FreeAxis], lines: Mapping[Any, str]
) -> tuple[SizeRule, ...]:
    """Which sizes the free axes may have.

    Args:
        program: traced with these axes symbolic, its input joined.
        axes: of its one input.
        lines: what `noting_conditions` noted meanwhile.

    Raises:
        UnsupportedError: nothing but the example's size is allowed, or not all pairs of sizes.
    """
    value = user_input(program).meta["val"]
    names = {axis.name: _symbol(value, axis) for axis in axes}
    example = {axis.name: axis.example for axis in axes}
    conditions = _conditions(value.fake_mode.shape_env, axes, names, lines)
    rules = tuple(_rule(axis, example, conditions) for axis in axes)
    for steps in itertools.product(range(3), repeat=len(rules)):
        _refuse(
            conditions, example, {r.name: r.after(n) for r, n in zip(rules, steps, strict=True)}
        )
    # A map that is as high as it is wide, where the example's is not.
    square = math.lcm(*(rule.size.multiple for rule in rules))
    square *= -(-max(rule.size.example for rule in rules) // square)
    _refuse(conditions, example, dict.fromkeys(example, square))
    return rules


def user_input(program: ExportedProgram) -> Any:
    """The placeholder node of a program's one input."""
    (name,) = program.graph_signature.user_inputs
    return next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == name)


def probes(program: ExportedProgram, rules: Sequence[SizeRule]) -> tuple[dict[Any, int], ...]:
    """Sizes at which graph passes look at walks, by torch's symbols; one of none without rules."""
    if not rules:
        return ({},)
    value = user_input(program).meta["val"]
    counts = {rule.name: _symbol(value, rule) for rule in rules}
    steps = {rule.name: rule.step for rule in rules}
    return tuple(
        {counts[name]: size // steps[name] for name, size in sizes.items()}
        for sizes in proof_sizes(rules)
    )


def _symbol(value: Any, axis: FreeAxis) -> Any:
    """The symbol of an axis's count."""
    size = value.shape[axis.axis]
    symbols = set() if isinstance(size, int) else size.node.expr.free_symbols
    if len(symbols) != 1:
        raise UnsupportedError(
            f"dynamic: the module's code makes {axis.name} {size} for good; leave {axis.name} out "
            "of dynamic (--dynamic)"
        )
    return next(iter(symbols))


def _conditions(
    env: Any, axes: Sequence[FreeAxis], names: Mapping[str, Any], lines: Mapping[Any, str]
) -> tuple[_Condition, ...]:
    """Every condition that speaks of the free sizes; the batch stays the one of the trace."""
    found: dict[str, _Condition] = {}
    batch = {s: n for s, n in env.backed_var_to_val.items() if s not in names.values()}
    # As the code that a condition is written in has it: with whole quotients of sizes.
    renamed = {names[a.name]: sympy.Symbol(f"({a.name}//{a.step})", integer=True) for a in axes}
    for guard in env.guards:
        expression = guard.expr.subs(batch)
        if not expression.free_symbols or not expression.free_symbols <= set(renamed):
            continue
        text = PythonPrinter().doprint(expression.xreplace(renamed))
        if text not in found:
            equal = isinstance(guard.expr, sympy.Eq)
            found[text] = _Condition(text, lines.get(guard.expr, ""), equal, _function(text))
    # Those that leave least open first: they say best what is fixed.
    return tuple(sorted(found.values(), key=lambda condition: not condition.equal))


def _function(text: str) -> Callable[[Sizes], bool]:
    code = compile(text, "<condition>", "eval")
    known = {"math": math, "max": max, "min": min, "abs": abs}
    return lambda sizes: bool(eval(code, {"__builtins__": {}, **known}, dict(sizes)))


def _rule(axis: FreeAxis, example: Sizes, conditions: Sequence[_Condition]) -> SizeRule:
    size = axis.example

    def allowed(other: int) -> bool:
        return all(c.holds({**example, axis.name: other}) for c in conditions)

    counts = size // axis.step
    for multiple in (axis.step * n for n in range(1, counts + 1) if counts % n == 0):
        if all(allowed(size + k * multiple) for k in range(1, _AHEAD + 1)):
            minimum = size
            while minimum > multiple and allowed(minimum - multiple):
                minimum -= multiple
            return SizeRule(axis.name, axis.axis, size, FreeSize(size, multiple, minimum))
    _refuse(conditions, example, {**example, axis.name: 2 * size})
    raise UnsupportedError(
        f"dynamic: the module's code allows no regular sizes of {axis.name} beside {size}; leave "
        f"{axis.name} out of dynamic (--dynamic)"
    )


def _refuse(conditions: Sequence[_Condition], example: Sizes, sizes: Sizes) -> None:
    broken = next((c for c in conditions if not c.holds(sizes)), None)
    if broken is None:
        return
    named = [name for name in example if re.search(rf"\b{name}\b", broken.text)]
    where = f" at {broken.line}" if broken.line else ""
    raise UnsupportedError(
        f"dynamic: {' and '.join(named)} cannot be any size, as the module's code needs "
        f"{broken.text}{where}, which holds for {_said(example)} and not for {_said(sizes)}. A "
        "table of positions, a number made of a size, or a walk of fixed length is there: make it "
        "from x.shape (resize the table to it), or leave "
        f"{' and '.join(named)} out of dynamic (--dynamic)"
    )


def _said(sizes: Sizes) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def proof_sizes(rules: Sequence[SizeRule]) -> list[Sizes]:
    """The example's sizes, and two more in which no two axes go the same way."""
    return [
        {rule.name: rule.after(steps[place % 2]) for place, rule in enumerate(rules)}
        for steps in ((0, 0), (1, 2), (2, -1))
    ]


def prove(
    model: nn.Module,
    outputs: Outputs,
    file: Path,
    example: Tensor,
    rules: Sequence[SizeRule],
    *,
    dynamic_batch: bool,
) -> None:
    """Hold the file against the module at several sizes, with the kernels and on the bodies.

    Raises:
        UnsupportedError: they differ, or ONNX Runtime cannot run the file at some size.
    """
    sessions = _sessions(file)
    for place, sizes in enumerate(proof_sizes(rules)):
        count = _PROOF_BATCHES[place % 2] if dynamic_batch else len(example)
        x = _sized(example, count, rules, sizes, seed=place)
        with evaluating(model), torch.inference_mode():
            wanted = outputs(model, x)
        for backend, session in sessions.items():
            try:
                found = session.run(list(wanted), {session.get_inputs()[0].name: x.numpy()})
            except Exception as error:  # ONNX Runtime's errors have no common base
                raise _unproven(model, sizes, backend, f"fails: {error}") from error
            for name, got in zip(wanted, found, strict=True):
                _compare(model, (sizes, backend, name), wanted[name], torch.as_tensor(got))


def _compare(model: nn.Module, where: tuple[Sizes, str, str], a: Tensor, b: Tensor) -> None:
    sizes, backend, name = where
    if a.shape != b.shape:
        raise _unproven(model, sizes, backend, f"gives {name} of shape {tuple(b.shape)}")
    if a.numel() == 0:
        return
    # NaN is no proof of anything, so it counts as a difference.
    error = float((a.double() - b.double()).abs().max())
    scale = float(a.double().abs().max()) or 1.0
    if not error <= _SAME * scale:
        raise _unproven(model, sizes, backend, f"differs in {name} by {error / scale:.1e}")


def _unproven(model: nn.Module, sizes: Sizes, backend: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"dynamic: at {_said(sizes)} the file of {type(model).__name__}, run {backend}, {what} of "
        f"the module's largest value, where {_SAME:g} is allowed; something in the module has the "
        "example's sizes for good: leave these axes out of dynamic (--dynamic)"
    )


def _sessions(file: Path) -> dict[str, Any]:
    """The file in ONNX Runtime with the library, where there is one, and without."""
    found = {}
    try:
        libraries = {"with the library": find_library(ORT_LIBRARY), "on its bodies": None}
    except RuntimeUnavailableError:
        libraries = {"on its bodies": None}
    for backend, library in libraries.items():
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if library is not None:
            options.register_custom_ops_library(str(library))
        found[backend] = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
    return found


def _sized(
    example: Tensor, count: int, rules: Sequence[SizeRule], sizes: Sizes, *, seed: int
) -> Tensor:
    """An input of these sizes: noise, or the example's integers over again."""
    shape = [count, *example.shape[1:]]
    for rule in rules:
        shape[rule.axis] = sizes[rule.name]
    if example.is_floating_point():
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    # Only the user knows which integers are valid.
    for axis, size in enumerate(shape):
        example = example.index_select(axis, torch.arange(size) % example.shape[axis])
    return example
