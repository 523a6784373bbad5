"""A module in float64, whatever it casts to float32 on its way: the oracle of its export."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vssm.errors import UnsupportedError, reason

_MAKERS: Final = (torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.tensor)
# Beyond this, the module in float64 is another function than the one exported.
_SAME: Final = 1e-2


class KeepDouble(TorchFunctionMode):
    """Casts of float64 tensors to float32 leave them as they are; float32 is made as float64.

    Upstream code computes its A in `.float()`, to be exact in half precision.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every function of torch goes through here."""
        kwargs = dict(kwargs or {})
        x = args[0] if args else None
        double = isinstance(x, Tensor) and x.dtype == torch.float64
        if func is Tensor.float and double:
            return x
        if func in {Tensor.to, Tensor.type, Tensor.type_as} and double:
            args = tuple(_widened(a) for a in args)
        if "dtype" in kwargs and (double or func in _MAKERS):
            kwargs["dtype"] = _widened(kwargs["dtype"])
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.double()
    return torch.float64 if value is torch.float32 else value


def exact_copy(model: nn.Module) -> nn.Module:
    """The module in float64 on the CPU, in eval mode; the original stays as it is."""
    twin = copy.deepcopy(model).cpu().double()
    set_eval(twin)
    return twin


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module has its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    set_eval(model)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def set_eval(model: nn.Module) -> None:
    """Eval mode, also for modules whose own `train` or `eval` are broken."""
    for module in model.modules():
        module.training = False


def exact_outputs(
    model: nn.Module, x: Tensor, outputs: Callable[[nn.Module, Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What the module says of x in float64, by name; floating x is widened.

    Raises:
        UnsupportedError: it does not run in float64, or is another function there.
    """
    wide = x.double() if x.is_floating_point() else x
    with torch.inference_mode():
        try:
            with KeepDouble():
                exact = outputs(exact_copy(model), wide)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UnsupportedError(
                f"{type(model).__name__} does not run in float64, which is the oracle of its "
                f"export ({reason(error)}); mend the dtype it insists on, or export with "
                "reference=False"
            ) from error
        plain = outputs(model, x)
    for name, value in plain.items():
        alike = value.shape == exact[name].shape
        if value.is_floating_point() and alike and not _close(value.double(), exact[name]):
            raise UnsupportedError(
                f"{type(model).__name__}: output {name} differs between float32 and float64 by "
                f"more than {_SAME:g} of its largest value; the module depends on its dtype or "
                "draws random numbers: mend it, or export with reference=False"
            )
    return exact


def _close(a: Tensor, b: Tensor) -> bool:
    scale = float(b.abs().max()) if b.numel() else 0.0
    return not scale or float((a - b).abs().max()) <= _SAME * scale
