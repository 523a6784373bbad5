"""Scans in a user's own files, known by their parameters and by what they compute.

Repositories copy the function around mamba_ssm's kernel under names of their own. Its parameters
say what it is: u, delta, A, B and C in this order, and options that every copy calls alike. Where
it runs on a CPU, it must also compute what ours does.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from vssm.compat.packages import scan
from vssm.errors import UnsupportedError
from vssm.ops.record import unrecorded

_OPERANDS: Final = ("u", "delta", "A", "B", "C")
_OPTIONS: Final = ("D", "z", "delta_bias", "delta_softplus", "return_last_state", "oflex")
# Tuning of the kernels, or read by their backward pass alone.
_INERT: Final = frozenset({"nrows", "backnrows", "backend", "chunksize", "lag"})
_ALIASES: Final = {
    **dict.fromkeys(("x", "X", "xs", "us", "hidden_states"), "u"),
    **dict.fromkeys(("dt", "dts", "deltas", "Delta"), "delta"),
    **dict.fromkeys(("As", "A_log", "A_logs"), "A"),
    **{"Bs": "B", "Cs": "C", "Ds": "D", "gate": "z"},
    **{"dt_bias": "delta_bias", "dt_softplus": "delta_softplus"},
}
_STREAMS: Final = ("u", "delta", "B", "C", "z")
# Where u has its batch, heads, channels of a head, and steps; of three axes it has no heads.
LAYOUTS: Final = {"channels": "bhdl", "tokens": "blhd", "heads": "bhld"}
_TOLERANCE: Final = 1e-4  # of the largest value: both sides are float32
# So small a step that its decay rounds to one in every type.
_LEAST_STEP: Final = 1e-20


@dataclass(frozen=True)
class Signature:
    """How a function takes the operands of a scan.

    Attributes:
        layout: "channels": u is (batch, d_inner, seqlen), as mamba_ssm has it; "tokens": it is
            (batch, seqlen, d_inner), and B and C are alike. With an axis of heads behind the batch
            or the sequence; "heads": (batch, heads, seqlen, headdim).
        names: what its parameters are, in order; empty: what they are called.
        softplus: whether it takes delta through softplus unasked.
        logs: whether its A is the logarithm of -A.
        backwards: whether its first step is the last of the sequence.
        states: whether it returns the last state too.
    """

    layout: str = "channels"
    names: tuple[str, ...] = ()
    softplus: bool = False
    logs: bool = False
    backwards: bool = False
    states: bool = False

    @classmethod
    def parse(cls, text: str) -> Signature:
        """Read LAYOUT or LAYOUT:NAME,NAME,...

        Raises:
            ValueError: the layout or a name is unknown, or an operand is missing.
        """
        layout, _, rest = text.partition(":")
        names = tuple(rest.split(",")) if rest else ()
        known = {*_OPERANDS, *_OPTIONS, "_"}
        if layout not in LAYOUTS or not known.issuperset(names) or (names and not _is_scan(names)):
            raise ValueError(
                f"signature={text!r} is not LAYOUT or LAYOUT:NAME,NAME,...; the layout is "
                f"{' or '.join(LAYOUTS)}, and the names say what the parameters are, in order: "
                f"{', '.join(_OPERANDS)}, each once, {', '.join(_OPTIONS)}, or _ for anything else"
            )
        return cls(layout, names)

    def adapt(self, function: Callable[..., Any], *, skip: int = 0) -> Callable[..., Any]:
        """Our scan under the parameters and defaults of `function`, without the first `skip`."""
        whole = inspect.signature(function)
        own = list(whole.parameters.values())[skip:]
        given = whole.replace(parameters=own)
        names = [p.name for p in own]
        meaning = dict(zip(names, self.names, strict=False)) if self.names else _meanings(names)

        def ours(*args: Any, **kwargs: Any) -> Any:
            bound = given.bind(*args, **kwargs)
            bound.apply_defaults()
            named = {meaning.get(key, "_"): value for key, value in bound.arguments.items()}
            return _run({k: named[k] for k in (*_OPERANDS, *_OPTIONS) if k in named}, self)

        return ours


def parameters(function: Any) -> tuple[str, ...]:
    """The names of a Python function's parameters; none for anything else, and for ours."""
    if "_vssm_ours" in (getattr(function, "__kwdefaults__", None) or {}):
        return ()
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def is_named_scan(names: tuple[str, ...]) -> bool:
    """Whether parameters are those of the function around mamba_ssm's kernel, by name and order."""
    return _is_scan(names) and all(name in {*_OPTIONS, *_INERT} for name in _behind(names))


def may_be_scan(function: Callable[..., Any], *, skip: int) -> bool:
    """Whether a function takes a scan's operands, in any order and by other names; a call tells.

    It may take more: what that means, `proving` finds out. Without delta, A is the decay of each
    step, as Mamba-2 in plain PyTorch has it.
    """
    return {"u", "A", "B", "C"} <= set(_meanings(parameters(function)[skip:]).values())


def _meanings(names: Sequence[str]) -> dict[str, str]:
    """What parameters are, by name; one that has the very name of an operand goes first."""
    return {
        name: meaning
        for name in names
        if (meaning := _ALIASES.get(name, name)) == name or meaning not in names
    }


def _is_scan(names: tuple[str, ...]) -> bool:
    # Without C a function returns the states themselves.
    return names[:4] == _OPERANDS[:4] or tuple(n for n in names if n in _OPERANDS) == _OPERANDS


def _behind(names: tuple[str, ...]) -> tuple[str, ...]:
    return names[5 if names[4:5] == ("C",) else 4 :]


def _run(given: dict[str, Any], how: Signature) -> Any:
    """Our scan of the operands by name."""
    oflex, u = given.pop("oflex", False), given["u"]
    if "C" not in given:
        return _states(given)
    layout = LAYOUTS[how.layout] if u.dim() == 4 else LAYOUTS[how.layout].replace("h", "")
    given = _channels_first(given, LAYOUTS[how.layout])
    if how.softplus:
        given["delta_softplus"] = True
    if how.logs:
        given["A"] = -torch.exp(given["A"])
    if how.states:
        given["return_last_state"] = True
    if how.backwards:
        given |= {k: given[k].flip(-1) for k in _STREAMS if given.get(k) is not None}
    found = scan.selective_scan_fn(**given)
    y, rest = (found[0], found[1:]) if isinstance(found, tuple) else (found, ())
    y = y.flip(-1) if how.backwards else y
    if u.dim() == 4:
        heads = (u.shape[layout.index("h")], -1)
        y, rest = y.unflatten(1, heads), tuple(state.unflatten(1, heads) for state in rest)
    inside = [c for c in "bhdl" if c in layout]
    y = _permuted(y, [inside.index(c) for c in layout])
    # The kernels called so return float32 where u is half precision.
    y = y.to(scan.wide_type(u)) if oflex else y
    return (y, *rest) if rest else y


def _laid(x: Tensor, letters: str) -> Tensor:
    """A tensor with its axes in the order batch, heads, channels, steps, as far as it has them."""
    return _permuted(x, [letters.index(c) for c in "bhdl" if c in letters])


def _permuted(x: Tensor, order: list[int]) -> Tensor:
    # Without a node for what stays where it is, which would part a scan from its layout.
    return x if order == sorted(order) else x.permute(order)


def _channels_first(given: dict[str, Any], layout: str) -> dict[str, Any]:
    """Operands as mamba_ssm's function takes them, one decay and step for each channel."""
    u, plain = given["u"], layout.replace("h", "")
    streams = {k: given[k] for k in _STREAMS if given.get(k) is not None}
    if "delta" not in given:
        streams["delta"] = -given["A"].clamp(max=-_LEAST_STEP)
    found = {}
    for name, x in streams.items():
        a_row = name in {"B", "C"}
        # One number a head has no axis of channels, and a row for all heads none of heads.
        letters = layout if x.dim() == 4 else plain if a_row or u.dim() == 3 else _without_d(layout)
        laid = _laid(x, letters)
        found[name] = laid if a_row or laid.dim() < 4 else laid.flatten(1, 2)
    channels = found["u"].shape[1]

    def spread(x: Tensor, axis: int) -> Tensor:
        """A number of each head, or the one of all, for each of its channels."""
        times = channels // x.shape[axis] if u.dim() == 4 or x.shape[axis] == 1 else 1
        return x.repeat_interleave(times, dim=axis) if times > 1 else x

    found["delta"] = spread(found["delta"], 1)
    if "delta" not in given:
        # exp(A) is the decay, and u goes in as it is: the step is taken out of it again.
        found["u"] = found["u"] / found["delta"]
        found["A"] = -torch.ones_like(found["delta"][0, :, :1])
    else:
        A = given["A"]
        rows = A if A.dim() == 2 else A[:, None] if A.dim() == 1 else A.flatten(0, 1)
        found["A"] = spread(rows, 0)
    for name in ("D", "delta_bias"):
        if (x := given.get(name)) is not None:
            found[name] = spread(x if x.dim() == 1 else x.flatten(), 0)
    return given | found


def _without_d(layout: str) -> str:
    return layout.replace("d", "")


def _states(given: dict[str, Any]) -> Tensor:
    """The states (batch, d_inner, d_state, seqlen) of a scan that no C reads out.

    Each is the y of a C that is one row of the unit matrix.
    """
    set_too = [name for name in ("D", "z") if given.pop(name, None) is not None]
    if set_too or given.pop("return_last_state", False):
        raise UnsupportedError(
            f"a scan without C gives its states, to which {set_too or 'return_last_state'} does "
            "not apply; give the scan a C, or replace it by report.replace"
        )
    states = given["A"].shape[1]
    unit = torch.eye(states, dtype=given["B"].dtype, device=given["B"].device)
    rows = [
        scan.selective_scan_fn(**given, C=unit[n, :, None].expand_as(given["B"]))
        for n in range(states)
    ]
    return torch.stack(rows, dim=2)


def computes_a_scan(
    function: Callable[..., Any], plain: Callable[..., Any], *, skip: int
) -> bool | None:
    """Whether `function` computes our scan of a few small operands; None: it does not run here.

    Args:
        function: a function, or the `apply` of an autograd Function.
        plain: what says which parameters it has: itself, or the `forward`.
        skip: parameters of `plain` in front of the operands.
    """
    generator = torch.Generator().manual_seed(0)
    own = list(inspect.signature(plain).parameters.values())[skip:]
    names = tuple(p.name for p in own)
    ours = Signature().adapt(plain, skip=skip)
    # A copy of VMamba's alone asks for the axis of groups.
    for groups in (False, True):
        given = _operands(generator, names, groups=groups)
        # By place: the `apply` of a Function takes no names.
        row = [given.get(p.name, p.default) for p in own]
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            return _alike(function(*row), ours(*row))
    return None


def computes_the_same(
    theirs: Callable[[Tensor], Any], ours: Callable[[Tensor], Tensor], sizes: tuple[int, ...]
) -> bool | None:
    """Whether two functions of one tensor agree on one of these sizes; None: theirs fails."""
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    try:
        found = theirs(x)
    except Exception:  # the user's code may raise anything
        return None
    return _alike(found, ours(x))


def _operands(
    generator: torch.Generator, names: tuple[str, ...], *, groups: bool
) -> dict[str, Any]:
    batch, width, states, seqlen = 2, 4, 2, 3
    rows = (batch, *(1,) * groups, states, seqlen)
    shapes = {
        **dict.fromkeys(("u", "delta", "z"), (batch, width, seqlen)),
        "A": (width, states),
        **dict.fromkeys(("B", "C"), rows),
        **dict.fromkeys(("D", "delta_bias"), (width,)),
    }
    made = {name: torch.randn(s, generator=generator) for name, s in shapes.items()}
    made["A"] = -made["A"].exp()
    options = {"delta_softplus": True}
    return {name: value for name, value in {**made, **options}.items() if name in names}


def _alike(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, tuple) or isinstance(ours, tuple):
        pairs = isinstance(theirs, tuple) and isinstance(ours, tuple) and len(theirs) == len(ours)
        return pairs and all(_alike(a, b) for a, b in zip(theirs, ours, strict=True))
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return False
    largest = float(theirs.abs().max())
    return float((theirs - ours).abs().max()) <= _TOLERANCE * max(largest, 1.0)


def proving(
    function: Callable[..., Any],
    plain: Callable[..., Any],
    *,
    skip: int,
    by_name: Callable[..., Any] | None = None,
    settled: Callable[[bool], None],
) -> Callable[..., Any]:
    """A function that may be a scan: ours as soon as a call shows that both give the same.

    The first call of each object judges, with the operands of the user's model: one object of a
    class may turn its sequence round, and another not. A trace comes after a run of the model, so
    what is traced is settled. What its parameters beyond those of a scan mean, such as a `mode` or
    a `reverse`, is not known: each choice of their values is judged by itself, and with a tensor
    or an object among them the function stays the user's.

    Args:
        function: the user's: it is called.
        plain: what says which parameters it has: itself, or the `forward` of an autograd Function.
        skip: parameters of `plain` in front of the operands: `self`, or `ctx`.
        by_name: our scan of what its parameters are called, where they leave no doubt: it is that
            if the user's cannot run here.
        settled: told whether it is a scan.
    """
    chosen: dict[int, dict[tuple[str, ...], Callable[..., Any]]] = {}
    # A method is called with its object, an `apply` without its context.
    own = skip if plain is function else 0
    whole = inspect.signature(plain)
    whole = whole.replace(parameters=list(whole.parameters.values())[skip - own :])

    def judged(theirs: Any, args: Any, kwargs: Any) -> Callable[..., Any]:
        states = isinstance(theirs, tuple) and "return_last_state" not in whole.parameters
        for way in _WAYS:
            adapted = replace(way, states=states).adapt(plain, skip=skip)
            # Operands of another layout do not fit.
            with contextlib.suppress(Exception), unrecorded():
                if _alike(theirs, adapted(*args[own:], **kwargs)):
                    return lambda *args, **kwargs: adapted(*args[own:], **kwargs)
        return function

    @functools.wraps(plain)
    def proved(*args: Any, **kwargs: Any) -> Any:
        owner = args[0] if own else function
        if id(owner) not in chosen:
            chosen[id(owner)] = {}
            weakref.finalize(owner, chosen.pop, id(owner), None)
        known, further = chosen[id(owner)], _further(whole, own, args, kwargs)
        if further in known:
            return known[further](*args, **kwargs)
        try:
            theirs = function(*args, **kwargs)
        except Exception:  # of a compiled kernel, anything
            if by_name is None or further is None:
                raise
            known[further] = by_name
            return by_name(*args, **kwargs)
        if further is None or _says_nothing(theirs):
            return theirs
        known[further] = judged(theirs, args, kwargs)
        settled(known[further] is not function)
        # A scan of the model's, which counts as one: what was tried before did not.
        return theirs if known[further] is function else known[further](*args, **kwargs)

    return proved


# The most usual first, as the first that fits is taken.
_WAYS: Final = tuple(
    Signature(layout, softplus=softplus, logs=logs, backwards=backwards)
    for logs, softplus, backwards in itertools.product((False, True), repeat=3)
    for layout in LAYOUTS
)


def _says_nothing(theirs: Any) -> bool:
    """Whether a result proves nothing: of a first trace, or zeros, which anything may give."""
    first = theirs[0] if isinstance(theirs, tuple) and theirs else theirs
    return isinstance(first, FakeTensor) or (isinstance(first, Tensor) and not bool(first.any()))


def _further(whole: inspect.Signature, skip: int, args: Any, kwargs: Any) -> tuple[str, ...] | None:
    """The values of a call's parameters that a scan has not; None if they cannot be compared."""
    bound = whole.bind(*args, **kwargs)
    bound.apply_defaults()
    behind = dict(list(bound.arguments.items())[skip:])
    meanings = _meanings(list(behind))
    known = {*_OPERANDS, *_OPTIONS, *_INERT}
    found = {name: value for name, value in behind.items() if meanings.get(name) not in known}
    plain = all(value is None or type(value) in _COMPARED for value in found.values())
    return tuple(f"{name}={value!r}" for name, value in found.items()) if plain else None


_COMPARED: Final = frozenset({bool, int, float, str, torch.device, torch.dtype})
