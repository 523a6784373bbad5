"""What the user's code sees of where it runs: no GPU but the CPU, and no trace but a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ASKED: Final = ("is_compiling", "is_dynamo_compiling", "is_exporting")


class OnTheCpu(TorchFunctionMode):
    """`x.cuda()`, `x.to("cuda")` and `device="cuda"` in the user's code mean the CPU.

    An export computes on the CPU, and where a number is computed does not change what it is.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every function of torch goes through here."""
        if func is Tensor.cuda:
            return args[0]
        # No function of torch's has a device inside another argument.
        named = {name: _here(value) for name, value in (kwargs or {}).items()}
        return func(*map(_here, args), **named)


def _here(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    is_name = isinstance(value, str) and (value == "cuda" or value.startswith("cuda:"))
    return "cpu" if is_name else value


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what torch.compile made as the Python that it is made of: the same function, at once."""
    # Nothing was compiled where the compiler is not loaded, which takes a second.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def as_python() -> Iterator[None]:
    """Let torch.compile and torch.jit.script give back what they are given.

    A function in another language cannot be known for a scan, or traced; compiled for one size, it
    takes longer than the whole export.
    """
    patched: tuple[tuple[Any, str, Any, Any], ...] = (
        (torch, "compile", torch.compile, _given),
        (nn.Module, "compile", nn.Module.compile, lambda *_, **__: None),
        (torch.jit, "script", torch.jit.script, _given),
    )

    def calling(theirs: Any, ours: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            caller = str(sys._getframe(1).f_globals.get("__name__"))
            # Torch itself compiles the branches of a cond.
            return (theirs if caller.partition(".")[0] == "torch" else ours)(*args, **kwargs)

        return call

    for owner, name, theirs, ours in patched:
        setattr(owner, name, calling(theirs, ours))
    try:
        yield
    finally:
        for owner, name, theirs, _ in patched:
            setattr(owner, name, theirs)


def _given(function: Any = None, *_: Any, **__: Any) -> Any:
    """What is compiled, or as `@torch.compile(mode=...)` what gives back what it decorates."""
    return _given if function is None else function


@contextmanager
def as_if_run() -> Iterator[None]:
    """Let user code that asks torch.compiler whether it is traced hear that it is not.

    Such code has another path for traces, with a loop in the place of the scan, since kernels that
    are called from Python cannot be traced. Ours can.
    """
    real = {name: getattr(torch.compiler, name) for name in _ASKED}

    def answer(name: str) -> Any:
        def asked() -> bool:
            caller = str(sys._getframe(1).f_globals.get("__name__"))
            if caller.startswith("torch._dynamo.") and name != "is_exporting":
                return True
            return caller.partition(".")[0] == "torch" and bool(real[name]())

        # Dynamo, which traces the branches of a cond, cannot look into frames: it asks us itself,
        # for torch's own code in them.
        return torch.compiler.assume_constant_result(asked)

    for name in _ASKED:
        setattr(torch.compiler, name, answer(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(torch.compiler, name, function)
