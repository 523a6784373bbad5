"""A batch of any size, where a module's code counts with it in Python's numbers."""

from __future__ import annotations

import builtins
import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

# torch's own numbers are symbolic already; these packages' code is not the user's.
_OTHERS: Final = frozenset({"torch", "vssm", "builtins"})
_PACKAGE: Final = str(Path(__file__).parents[1])


class _Whole(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, builtins.int)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, builtins.int)


class _Int(builtins.int, metaclass=_Whole):
    """`int` in the user's code: a symbolic size stays one, a quotient becomes a whole division."""

    def __new__(cls, value: Any = 0, *rest: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return value
        if isinstance(value, torch.SymFloat) and (parts := getattr(value, "of_sizes", None)):
            return parts[0] // parts[1]
        return builtins.int(value, *rest)


def _len(value: Any) -> Any:
    """`len` in the user's code: of a tensor its first size, symbolic or not."""
    return value.shape[0] if isinstance(value, Tensor) else builtins.len(value)


@contextmanager
def symbolic_arithmetic(model: nn.Module) -> Iterator[None]:
    """Let `int(x.shape[0] / n)` and `len(x)` in a module's code keep the batch open.

    Python's `int` and `len` can return but one number, which would fix the batch. In the modules
    that define the model's parts, both are others for a while; a quotient of a size and a whole
    number remembers the two, since `int` of it is their whole division.
    """
    replaced = []
    for module in _modules_of(model):
        for name, ours in (("int", _Int), ("len", _len)):
            if name not in vars(module):
                setattr(module, name, ours)
                replaced.append((module, name))
    divide = torch.SymInt.__truediv__

    def dividing(a: Any, b: Any) -> Any:
        found = divide(a, b)  # type: ignore[no-untyped-call]
        whole = builtins.int(b) if isinstance(b, float) and b.is_integer() else b
        # A negative quotient is cut towards zero by `int`, and not by a whole division.
        if isinstance(found, torch.SymFloat) and isinstance(whole, builtins.int) and whole > 0:
            found.of_sizes = (a, whole)  # type: ignore[attr-defined]
        return found

    torch.SymInt.__truediv__ = dividing  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.SymInt.__truediv__ = divide  # type: ignore[method-assign]
        for module, name in replaced:
            delattr(module, name)


def _modules_of(model: nn.Module) -> list[ModuleType]:
    """The Python modules of the model's classes, and what is beside them in their packages."""
    names = {type(part).__module__ for part in model.modules()}
    roots = {name.partition(".")[0] for name in names} - _OTHERS
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in roots and isinstance(module, ModuleType)
    ]


def user_line() -> str:
    """The innermost line of the user's code that runs now, if any."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and "/sympy/" not in file and not file.startswith(_PACKAGE):
            return f"{file}:{frame.f_lineno}: {linecache.getline(file, frame.f_lineno).strip()}"
        frame = frame.f_back
    return ""


@contextmanager
def noting_fixed_sizes() -> Iterator[list[str]]:
    """Note the lines of the user's code at which torch.export fixes a symbolic size."""
    lines: list[str] = []
    replace = ShapeEnv._set_replacement

    def noting(self: Any, symbol: Any, value: Any, message: str) -> None:
        if value.is_number and (line := user_line()):
            lines.append(line)
        replace(self, symbol, value, message)

    ShapeEnv._set_replacement = noting  # type: ignore[assignment, method-assign]
    try:
        yield lines
    finally:
        ShapeEnv._set_replacement = replace  # type: ignore[method-assign]
