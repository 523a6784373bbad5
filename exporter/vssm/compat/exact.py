"""A module in float64, whatever it says of its dtypes: the reference of its export."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from vssm.compat.inputs import Example, Inputs
from vssm.compat.passes.graph import SCANS
from vssm.compat.surroundings import OnTheCpu, uncompiled
from vssm.errors import UnsupportedError, reason

FLOAT64: Final = "float64"
FLOAT64_SCANS: Final = "float32, its scans in float64"
# Beyond this, the module in float64 is another function than the one exported.
_SAME: Final = 1e-2
Outputs = Callable[[nn.Module, Example | Inputs], dict[str, Tensor]]


@dataclass(frozen=True)
class Exact:
    """What a module says of some inputs.

    Attributes:
        outputs: by name, as exactly as they can be had.
        precision: `FLOAT64` or `FLOAT64_SCANS`.
        rounding: how far the module itself is from them in float32, over the largest value, in the
            output in which it is farthest.
    """

    outputs: dict[str, Tensor]
    precision: str
    rounding: float


class _Wide(Tensor):
    """Numbers in float64 that call themselves float32.

    Code of the user's asks for float32 (`assert y.dtype == torch.float`), casts to it, and branches
    on it. All of that sees what it wants, and the numbers stay exact.
    """

    exact: Tensor
    # Torch's own would turn every result, masks and indices too, into a `_Wide` without `exact`.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, exact: Tensor) -> _Wide:
        # Without memory of its own: code that reads it (`.numpy()`) fails, instead of reading
        # float64 numbers as float32; the scans alone are made exact then.
        found: _Wide = Tensor._make_wrapper_subclass(
            cls,
            exact.size(),
            strides=exact.stride(),
            storage_offset=exact.storage_offset(),
            dtype=torch.float32,
            device=exact.device,
        )
        found.exact = exact
        return found

    def __init__(self, exact: Tensor) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.exact!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What a `_Widen` sees, for a tensor that outlives it."""
        return _widened(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """What the two ways to compute have in common: `torch.cond` runs the branch that is taken."""

    # Without this, torch refuses `torch.cond` under a mode.
    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operator goes through here."""
        if func is torch.ops.higher_order.cond:
            taken, yes, no, operands = args
            # Torch switches a mode off inside its own handler, but the branch has to go through it
            # too.
            with self:
                return (yes if taken else no)(*operands)
        return self.compute(func, args, kwargs or {})

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator's result."""
        raise NotImplementedError


class _Widen(_Mode):
    """Every float32 that is made becomes a `_Wide`, and every operator computes in float64."""

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """In float64."""
        return _widened(func, args, kwargs)


def _widened(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on what stands behind its operands; float64 results call themselves float32."""
    known: dict[int, _Wide] = {}

    def inner(value: Any) -> Any:
        if isinstance(value, _Wide):
            # An operator that writes returns its operand: the caller must get back the one it gave.
            known[id(value.exact)] = value
            return value.exact
        # Casts and factories name the type: `.to(torch.float32)` must not round.
        if value is torch.float32:
            return torch.float64
        # A constant that the module made before the mode began.
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            return value.double()
        return value

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in {torch.float32, torch.float64}:
            return value
        if id(value) not in known:
            return _Wide(value.double())
        # A wrapper's sizes are settled when it is made.
        if known[id(value)].shape != value.shape:
            raise RuntimeError(f"{func} changes the shape of a tensor in place")
        return known[id(value)]

    if func._schema.is_mutable:
        _refuse_writes(func, args, kwargs)
    inside = tree_map(inner, (args, kwargs))
    return tree_map(outer, func(*inside[0], **inside[1]))


def _refuse_writes(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """A float32 tensor that the module made before would be written to as a copy."""
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and _is_float32(value) and not isinstance(value, _Wide):
            raise RuntimeError(f"{func} writes to a float32 tensor that the module keeps")


class _WideScans(_Mode):
    """Selective scans in float64, everything else as it is."""

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """In float64 where it is a scan."""
        if func not in SCANS:
            return func(*args, **kwargs)
        wide = tree_map(lambda x: x.double() if _is_float(x) else x, (args, kwargs))
        return func(*wide[0], **wide[1]).to(args[0].dtype)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_float32(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and the CPU for a while; every module has its own mode back afterwards."""
    # Of each module: parts that the user froze in eval mode stay there when the rest trains on.
    modes = {module: module.training for module in model.modules()}
    set_eval(model)
    try:
        with OnTheCpu(), uncompiled():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def set_eval(model: nn.Module) -> None:
    """Eval mode, also for modules whose own `train` or `eval` are broken."""
    for module in model.modules():
        module.training = False


def exact_outputs(model: nn.Module, x: Example | Inputs, outputs: Outputs) -> Exact:
    """What the module says of x, as exactly as it can be had.

    All of it in float64, where the module bears that; else the module as it is, float32, with its
    scans in float64.

    Args:
        model: float32, on the CPU; it runs in eval mode, and stays as it is.
        x: the inputs.
        outputs: what gives the outputs by name.

    Raises:
        UnsupportedError: it runs in neither way, or is another function in float64.
    """
    inputs = Inputs.of(model, x)
    with evaluating(model), torch.inference_mode():
        # A module that branches on its dtype, or draws random numbers, would otherwise give a
        # reference that no export of it can meet.
        plain = outputs(model, inputs)
        try:
            exact, precision = _in_float64(model, inputs, outputs), FLOAT64
        except Exception:  # the user's code may raise anything where it is fed another tensor
            exact, precision = _with_exact_scans(model, inputs, outputs), FLOAT64_SCANS
    rounding = 0.0
    for name, value in plain.items():
        if not value.is_floating_point() or value.shape != exact[name].shape:
            continue
        apart = _apart(value, exact[name])
        if not apart <= _SAME:  # NaN counts
            raise UnsupportedError(
                f"{type(model).__name__}: output {name} differs between float32 and float64 by "
                f"more than {_SAME:g} of its largest value; the module depends on its dtype or "
                "draws random numbers: mend it, or export with reference=False (--no-reference)"
            )
        rounding = max(rounding, apart)
    return Exact(exact, precision, rounding)


def _in_float64(model: nn.Module, x: Inputs, outputs: Outputs) -> dict[str, Tensor]:
    # Torch copies no tensor that was computed from parameters, as weight_norm leaves one.
    known = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    # A copy, since its parameters are exchanged for what is no parameter.
    twin: Any = copy.deepcopy(model, known).cpu()
    for module in twin.modules():
        for held in (module._parameters, module._buffers):
            # Into the dicts themselves: a module takes nothing but a Parameter under a parameter's
            # name.
            held.update({k: _Wide(v.double()) for k, v in held.items() if _is_float32(v)})
    given = x.map(lambda tensor: _Wide(tensor.double()) if _is_float32(tensor) else tensor)
    with _Widen():  # type: ignore[no-untyped-call]
        found = outputs(twin, given)
    return {k: value.exact if isinstance(value, _Wide) else value for k, value in found.items()}


def _with_exact_scans(model: nn.Module, x: Inputs, outputs: Outputs) -> dict[str, Tensor]:
    try:
        with _WideScans():  # type: ignore[no-untyped-call]
            return outputs(model, x)
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} runs neither in float64 nor with its scans in float64, which "
            f"is the reference of its export ({reason(error)}); mend the dtype it "
            "insists on, or export with reference=False (--no-reference)"
        ) from error


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference of two values over the largest of the second."""
    if not b.numel():
        return 0.0
    # An output that is zero everywhere has no scale of its own: then the error itself counts.
    scale = float(b.abs().max()) or 1.0
    return float((a.double() - b.double()).abs().max()) / scale
