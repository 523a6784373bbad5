"""Autograd of the scans: native kernels on a CPU, the oracle's own autograd for the rest.

float64 anywhere and every type on another device go through the oracle again under autograd:
exact, and slow. float32, float16 and bfloat16 on a CPU go through libvssm.so. The gradients are
an operator of their own, `vssm::<scan>_backward`, so that a compiled training step has them too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exporter import ops_native
from exporter.ops_rules import check_operands
from exporter.spec import OperatorSpec

_NATIVE = (torch.float32, torch.float16, torch.bfloat16)
Forward = Callable[[OperatorSpec, Sequence[Any]], Tensor]


def records_natively(operands: Sequence[Tensor]) -> bool:
    """Whether a scan of these runs on the native kernels because gradients are recorded.

    So it is on a CPU, in float32, float16 or bfloat16, outside of tracing, where libvssm.so is
    there. Without the library y comes from the oracle, and asking for gradients is an error.
    """
    return (
        torch.is_grad_enabled()
        and any(t.requires_grad for t in operands)
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in operands)
        and not torch.compiler.is_compiling()
        and _is_native(operands[0])
        and ops_native.is_available()
    )


def scan(op: OperatorSpec, operands: Sequence[Tensor], attributes: Sequence[Any]) -> Tensor:
    """The result of a scan by the native kernel, with its gradients by the native kernel.

    Args:
        op: the operator.
        operands: its inputs, of which `records_natively` holds.
        attributes: in the order of the operator table.

    Raises:
        ValueError: a shape or value breaks the operator's contract.
    """
    y: Tensor = _NativeScan.apply(op, attributes, *operands)  # type: ignore[no-untyped-call]
    return y


class _NativeScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: OperatorSpec, attributes: Sequence[Any], *operands: Tensor) -> Tensor:
        named = _named(op, operands, attributes)
        check_operands(op, named)
        ctx.save_for_backward(*operands)
        ctx.op, ctx.attributes = op, attributes
        return ops_native.scan(op, named)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        named = _named(ctx.op, ctx.saved_tensors, ctx.attributes)
        found = ops_native.scan_backward(ctx.op, named, dy)
        return (None, None, *_in_place(ctx.op, found, ctx.needs_input_grad[2:]))


def register(library: torch.library.Library, op: OperatorSpec, name: str, forward: Forward) -> None:
    """Defines `vssm::<name>_backward`, and makes it the gradient of `vssm::<name>`.

    Args:
        library: holds `vssm::<name>` already.
        op: the operator.
        name: its torch name.
        forward: the oracle on the operator's arguments.
    """
    count = len(op.inputs)
    inputs = ", ".join(f"Tensor {o.name}" for o in op.inputs)
    attributes = ", ".join(f"{a.kind.__name__} {a.name}" for a in op.attributes)
    outputs = ", ".join("Tensor" for _ in ops_native.differentiable(op))
    library.define(f"{name}_backward(Tensor dy, {inputs}, {attributes}) -> ({outputs})")

    def run(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        named = _named(op, args[:count], args[count:])
        if not _is_native(named["u"]):
            return tuple(_oracle_backward(op, args, dy, forward))
        return tuple(ops_native.scan_backward(op, named, dy))

    def fake(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
        named = _named(op, args[:count], args[count:])
        return tuple(named[n].new_empty(named[n].shape) for n in ops_native.differentiable(op))

    library.impl(f"{name}_backward", run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vssm::{name}_backward", fake, lib=library)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.attributes = inputs[count:]

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call = getattr(torch.ops.vssm, f"{name}_backward").default
        found = call(dy, *ctx.saved_tensors, *ctx.attributes)
        gradients = _in_place(op, found, ctx.needs_input_grad)
        return (*gradients, *(None for _ in ctx.attributes))

    torch.library.register_autograd(
        f"vssm::{name}", backward, setup_context=setup_context, lib=library
    )


def _is_native(u: Tensor) -> bool:
    return u.device.type == "cpu" and u.dtype in _NATIVE


def _named(op: OperatorSpec, operands: Sequence[Any], attributes: Sequence[Any]) -> dict[str, Any]:
    names = [*(o.name for o in op.inputs), *(a.name for a in op.attributes)]
    return dict(zip(names, (*operands, *attributes), strict=True))


def _in_place(
    op: OperatorSpec, gradients: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """One a input: None for order and gap, and where nothing asks."""
    found: Mapping[str, Tensor] = dict(zip(ops_native.differentiable(op), gradients, strict=True))
    return [
        found.get(o.name) if asked else None for o, asked in zip(op.inputs, needed, strict=False)
    ]


def _oracle_backward(
    op: OperatorSpec, args: Sequence[Any], dy: Tensor, forward: Forward
) -> list[Tensor]:
    count = len(op.inputs)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in args[:count]]
        y = forward(op, [*leaves, *args[count:]])
    wanted = [t for t in leaves if t.requires_grad]
    found = torch.autograd.grad(y, wanted, dy)
    return [g.contiguous() for g in found]
