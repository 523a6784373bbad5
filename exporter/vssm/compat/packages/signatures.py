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
import weakref
from collections.abc import Callable
from dataclasses import dataclass
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
_ALIASES: Final = {"x": "u", "xs": "u", "dt": "delta", "dts": "delta"}
_STREAMS: Final = ("u", "delta", "B", "C", "z")
LAYOUTS: Final = ("channels", "tokens")
_TOLERANCE: Final = 1e-4  # of the largest value: both sides are float32


@dataclass(frozen=True)
class Signature:
    """How a function takes the operands of a scan.

    Attributes:
        layout: "channels": u is (batch, d_inner, seqlen), as mamba_ssm has it; "tokens": it is
            (batch, seqlen, d_inner), and B and C are alike.
        names: what its parameters are, in order; empty: what they are called.
    """

    layout: str = "channels"
    names: tuple[str, ...] = ()

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
        meaning = dict(zip(names, self.names or map(_canonical, names), strict=False))

        def ours(*args: Any, **kwargs: Any) -> Any:
            bound = given.bind(*args, **kwargs)
            bound.apply_defaults()
            named = {meaning.get(key, "_"): value for key, value in bound.arguments.items()}
            return _run({k: named[k] for k in (*_OPERANDS, *_OPTIONS) if k in named}, self.layout)

        return ours


def parameters(function: Any) -> tuple[str, ...]:
    """The names of a Python function's parameters; none for anything else."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def is_named_scan(names: tuple[str, ...]) -> bool:
    """Whether parameters are those of the function around mamba_ssm's kernel, by name and order."""
    return _is_scan(names) and all(name in {*_OPTIONS, *_INERT} for name in _behind(names))


def may_be_scan(function: Callable[..., Any], *, skip: int) -> bool:
    """Whether a function takes a scan's operands, be it under other names; a call must tell.

    It may take more, by default: what that means, `proving` finds out.
    """
    names = tuple(map(_canonical, parameters(function)[skip:]))
    if "C" not in names or not _is_scan(names):
        return False
    given = list(inspect.signature(function).parameters.values())[skip:]
    known = {*_OPERANDS, *_OPTIONS, *_INERT}
    return all(p.default is not p.empty for p in given if _canonical(p.name) not in known)


def _canonical(name: str) -> str:
    return _ALIASES.get(name, name)


def _is_scan(names: tuple[str, ...]) -> bool:
    # Without C a function returns the states themselves.
    return names[:4] == _OPERANDS[:4] or tuple(n for n in names if n in _OPERANDS) == _OPERANDS


def _behind(names: tuple[str, ...]) -> tuple[str, ...]:
    return names[5 if names[4:5] == ("C",) else 4 :]


def _run(given: dict[str, Any], layout: str) -> Any:
    """Our scan of the operands by name."""
    oflex, u = given.pop("oflex", False), given["u"]
    if "C" not in given:
        return _states(given)
    if layout == "tokens":
        given |= {k: v.transpose(1, 2) for k, v in given.items() if k in _STREAMS and v is not None}
    found = scan.selective_scan_fn(**given)
    y, rest = (found[0], found[1:]) if isinstance(found, tuple) else (found, ())
    y = y.transpose(1, 2) if layout == "tokens" else y
    # The kernels called so return float32 where u is half precision.
    y = y.to(scan.wide_type(u)) if oflex else y
    return (y, *rest) if rest else y


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
    function: Callable[..., Any], *, skip: int, settled: Callable[[bool], None]
) -> Callable[..., Any]:
    """A function that may be a scan: ours as soon as a call shows that both give the same.

    The first call of each object judges, with the operands of the user's model: one object of a
    class may turn its sequence round, and another not. A trace comes after a run of the model, so
    what is traced is settled. What its parameters beyond those of a scan mean, such as a `mode` or
    a `reverse`, is not known: each choice of their values is judged by itself, and with a tensor
    or an object among them the function stays the user's.

    Args:
        function: the user's.
        skip: arguments in front of the operands: the `self` of a method.
        settled: told whether it is a scan.
    """
    chosen: dict[int, dict[tuple[str, ...], Callable[..., Any]]] = {}
    whole = inspect.signature(function)

    def ours(layout: str) -> Callable[..., Any]:
        adapted = Signature(layout).adapt(function, skip=skip)
        return lambda *args, **kwargs: adapted(*args[skip:], **kwargs)

    def judged(theirs: Any, args: Any, kwargs: Any) -> Callable[..., Any]:
        for candidate in map(ours, LAYOUTS):
            # Operands of another layout do not fit.
            with contextlib.suppress(Exception), unrecorded():
                if _alike(theirs, candidate(*args, **kwargs)):
                    return candidate
        return function

    @functools.wraps(function)
    def proved(*args: Any, **kwargs: Any) -> Any:
        owner = args[0] if skip else function
        if id(owner) not in chosen:
            chosen[id(owner)] = {}
            weakref.finalize(owner, chosen.pop, id(owner), None)
        own, further = chosen[id(owner)], _further(whole, skip, args, kwargs)
        if further in own:
            return own[further](*args, **kwargs)
        theirs = function(*args, **kwargs)
        if further is None or isinstance(theirs, FakeTensor):  # a first trace proves nothing
            return theirs
        own[further] = judged(theirs, args, kwargs)
        settled(own[further] is not function)
        # A scan of the model's, which counts as one: what was tried before did not.
        return theirs if own[further] is function else own[further](*args, **kwargs)

    return proved


def _further(whole: inspect.Signature, skip: int, args: Any, kwargs: Any) -> tuple[str, ...] | None:
    """The values of a call's parameters that a scan has not; None if they cannot be compared."""
    bound = whole.bind(*args, **kwargs)
    bound.apply_defaults()
    known = {*_OPERANDS, *_OPTIONS, *_INERT}
    behind = list(bound.arguments.items())[skip:]
    found = {name: value for name, value in behind if _canonical(name) not in known}
    plain = all(value is None or type(value) in {bool, int, float, str} for value in found.values())
    return tuple(f"{name}={value!r}" for name, value in found.items()) if plain else None
