"""Gradients of the operators: the native kernel on a CPU, in PyTorch for the rest.

float32, float16 and bfloat16 on a CPU go through libvssm.so. float64, other devices and a machine
without the library take the formulas of `reference`: exact, and slow. The gradients are an operator
of their own, `vssm::<name>_backward`, so that a compiled training step has them too. Those of a
scatter are a gather and a scatter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from vssm.errors import UnsupportedError
from vssm.ops.kernels import differentiable, run_backward, runs_on_kernels
from vssm.ops.record import note_run
from vssm.ops.reference import (
    selective_scan_backward,
    token_conv2d_backward,
    token_conv_backward,
)
from vssm.ops.spec import FLAGS, TOKEN_CONV, TOKEN_CONV2D, OperatorSpec

# Of the operators that are no scans.
_FORMULAS: Final[Mapping[str, Callable[..., dict[str, Tensor]]]] = {
    TOKEN_CONV.name: token_conv_backward,
    TOKEN_CONV2D.name: token_conv2d_backward,
}


def define(library: torch.library.Library, op: OperatorSpec, name: str) -> None:
    """Defines `vssm::<name>_backward`: dy, the operator's inputs and attributes; its gradients.

    Args:
        library: where.
        op: the operator.
        name: its torch name.
    """
    count = len(op.inputs)
    inputs = ", ".join(f"Tensor {o.name}" for o in op.inputs)
    attributes = ", ".join(f"{a.kind.__name__} {a.name}" for a in op.attributes)
    outputs = ", ".join("Tensor" for _ in differentiable(op))
    library.define(f"{name}_backward(Tensor dy, {inputs}, {attributes}) -> ({outputs})")

    def run(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        first: Tensor = args[0]
        native = first.device.type == "cpu" and runs_on_kernels(first)  # no kernel on a GPU yet
        if native:
            found = tuple(run_backward(op, op.named(args), dy))
        else:
            found = _in_pytorch(op, op.named(args), dy)
        note_run(f"{op.name} backward", "kernel" if native else "reference")
        return found

    def fake(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        floats = [t for t in args[:count] if t.is_floating_point()]
        return tuple(torch.empty_like(t) for t in floats)

    oracle = _FORMULAS.get(op.name, selective_scan_backward).__name__.removesuffix("_backward")

    def refuse_second(ctx: Any, *grads: Tensor) -> NoReturn:
        raise UnsupportedError(
            f"vssm: the gradient of {op.name} has no derivative of its own; for a second one call "
            f"{oracle} of vssm.ops.reference in place of the operator"
        )

    library.impl(f"{name}_backward", run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vssm::{name}_backward", fake, lib=library)
    torch.library.register_autograd(f"vssm::{name}_backward", refuse_second, lib=library)


def register_autograd(library: torch.library.Library, op: OperatorSpec, overload: str) -> None:
    """Makes `vssm::<name>_backward` the gradient of `vssm::<name>` or `vssm::<name>.<overload>`."""
    count = len(op.inputs)
    name = f"{overload.partition('.')[0]}_backward"

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.attributes = inputs[count:]

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call = getattr(torch.ops.vssm, name).default
        found = call(dy, *ctx.saved_tensors, *ctx.attributes)
        gradients = dict(zip(differentiable(op), found, strict=True))
        needed = zip(op.inputs, ctx.needs_input_grad, strict=False)
        return (
            *(gradients.get(o.name) if asked else None for o, asked in needed),
            *(None for _ in ctx.attributes),
        )

    torch.library.register_autograd(
        f"vssm::{overload}", backward, setup_context=setup_context, lib=library
    )


def register_scatter_autograd(library: torch.library.Library, overload: str) -> None:
    """Makes `vssm::<overload>`, which scatters dy too, and a gather of dy the gradients of it."""
    name, _, variant = overload.partition(".")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, x, position = inputs
        ctx.save_for_backward(position)
        ctx.rows = x.shape

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (position,) = ctx.saved_tensors
        dbase = dx = None
        if ctx.needs_input_grad[0]:
            scatter = getattr(getattr(torch.ops.vssm, name), variant or "default")
            dbase = scatter(dy, dy.new_zeros(ctx.rows), position)
        if ctx.needs_input_grad[1]:
            image = torch.arange(dy.shape[0], device=dy.device)
            dx = dy[image[:, None], position.long()]
        return dbase, dx, None

    torch.library.register_autograd(
        f"vssm::{overload}", backward, setup_context=setup_context, lib=library
    )


def _in_pytorch(op: OperatorSpec, named: dict[str, Any], dy: Tensor) -> tuple[Tensor, ...]:
    named = named | {name: bool(named[name]) for name in FLAGS & named.keys()}
    formula = _FORMULAS.get(op.name, selective_scan_backward)
    found = formula(dy, **named)
    return tuple(torch.empty_like(named[n]).copy_(found[n]) for n in differentiable(op))
