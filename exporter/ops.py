"""torch.library operators `vssm::*`: what models call and what the exporter turns into ONNX nodes.

Schemas come from the operator table in `spec`. Every operator has a fake kernel, an
implementation for any device through the oracle, and autograd: the gathers through the oracle, the
scans as `ops_gradients` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from exporter import ops_gradients, reference
from exporter.ops_rules import check_operands, check_scan_values
from exporter.spec import (
    GATED_SELECTIVE_SCAN,
    GATHER_OPERATORS,
    OPERATORS,
    SCAN_OPERATORS,
    SELECTIVE_SCAN,
    SELECTIVE_SCAN_CONSTANT_GAP,
    OperatorSpec,
)

_LIBRARY = torch.library.Library("vssm", "DEF")
_TORCH_NAMES = {
    "SelectiveScan": "selective_scan",
    "GatedSelectiveScan": "gated_selective_scan",
    "SelectiveScanConstantGap": "selective_scan_constant_gap",
    "TokenGather": "token_gather",
    "TokenGather1": "token_gather1",
}


def torch_op(op: OperatorSpec) -> Any:
    """The callable `torch.ops.vssm.*` overload of an operator."""
    return getattr(torch.ops.vssm, _TORCH_NAMES[op.name]).default


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    delta_bias: Tensor,
    order: Tensor,
    gap: Tensor,
    z: Tensor | None = None,
    delta0: Tensor | None = None,
    delta_softplus: bool = True,
    params_by_step: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """One `vssm` scan node: the arguments and result of `reference.selective_scan`.

    Which operator it is follows from the operands: gated with `z`, constant gap with `delta0`.
    While gradients are recorded on a CPU the native kernels run, as `ops_gradients` says.

    Raises:
        ValueError: a shape or value breaks the contract, or both `z` and `delta0` are given.
    """
    if z is not None and delta0 is not None:
        raise ValueError(
            "z and delta0 are both given, but no operator takes both; multiply the scan by silu(z)"
        )
    operands = [u, delta, A, B, C, D, delta_bias, order, gap]
    op = SELECTIVE_SCAN
    if z is not None:
        op, operands = GATED_SELECTIVE_SCAN, [*operands, z]
    elif delta0 is not None:
        op, operands = SELECTIVE_SCAN_CONSTANT_GAP, [*operands, delta0]
    attributes = (int(delta_softplus), int(params_by_step), scale)
    if ops_gradients.records_natively(operands):
        return ops_gradients.scan(op, operands, attributes)
    result: Tensor = torch_op(op)(*operands, *attributes)
    return result


def token_gather(
    score: Tensor,
    position: Tensor,
    xs: Sequence[Tensor],
    *,
    num_keep: int,
    protected_position: int = -1,
) -> tuple[Tensor, list[Tensor]]:
    """One `vssm` gather node: arguments and result of `reference.token_gather`, one or two xs.

    Raises:
        ValueError: a shape or value breaks the contract, or there is another number of xs.
    """
    if len(xs) not in {1, 2}:
        raise ValueError(f"len(xs)={len(xs)}: TokenGather takes 1 or 2 tensors; call it again")
    op = GATHER_OPERATORS[2 - len(xs)]
    kept, *rows = torch_op(op)(score, position, *xs, num_keep, protected_position)
    return kept, rows


def _schema(op: OperatorSpec) -> str:
    arguments = [f"Tensor {o.name}" for o in op.inputs]
    for a in op.attributes:
        arguments.append(
            f"{a.kind.__name__} {a.name}" + ("" if a.default is None else f"={a.default}")
        )
    outputs = ", ".join("Tensor" for _ in op.outputs)
    return f"{_TORCH_NAMES[op.name]}({', '.join(arguments)}) -> ({outputs})"


def _named(op: OperatorSpec, args: Sequence[Any]) -> dict[str, Any]:
    names = [o.name for o in op.inputs] + [a.name for a in op.attributes]
    defaults = [None] * len(op.inputs) + [a.default for a in op.attributes]
    given = [*args, *defaults[len(args) :]]
    return dict(zip(names, given, strict=True))


def _scan_reference(op: OperatorSpec, args: Sequence[Any]) -> Tensor:
    named = _named(op, args)
    named["delta_softplus"] = bool(named["delta_softplus"])
    named["params_by_step"] = bool(named["params_by_step"])
    return reference.selective_scan(**named)


def _gather_reference(op: OperatorSpec, args: Sequence[Any]) -> tuple[Tensor, ...]:
    named = _named(op, args)
    xs = [named.pop(o.name) for o in op.inputs if o.name.startswith("x")]
    kept, rows = reference.token_gather(**named, xs=xs)
    return (kept, *rows)


def _scan_kernel(op: OperatorSpec) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        named = _named(op, args)
        check_operands(op, named)
        check_scan_values(op, named)
        return _scan_reference(op, args).contiguous()

    return run


def _scan_fake(op: OperatorSpec) -> Callable[..., Tensor]:
    def fake(*args: Any) -> Tensor:
        named = _named(op, args)
        check_operands(op, named)
        u: Tensor = named["u"]
        return u.new_empty(u.shape[0], u.shape[1], u.shape[3])

    return fake


def _gather_kernel(op: OperatorSpec) -> Callable[..., tuple[Tensor, ...]]:
    def run(*args: Any) -> tuple[Tensor, ...]:
        check_operands(op, _named(op, args))
        return tuple(t.contiguous() for t in _gather_reference(op, args))

    return run


def _gather_fake(op: OperatorSpec) -> Callable[..., tuple[Tensor, ...]]:
    def fake(*args: Any) -> tuple[Tensor, ...]:
        named = _named(op, args)
        check_operands(op, named)
        batch, keep = named["score"].shape[0], named["num_keep"]
        rows = [named[o.name] for o in op.inputs if o.name.startswith("x")]
        kept = named["position"].new_empty(batch, keep)
        return (kept, *(x.new_empty(batch, keep, x.shape[2]) for x in rows))

    return fake


def _register_autograd(op: OperatorSpec, forward: Callable[..., Any]) -> None:
    """Backward by running the oracle again under autograd: exact, and slow."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = len(op.inputs)
        ctx.save_for_backward(*inputs[:tensors])
        ctx.attributes = inputs[tensors:]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [
                t.detach().requires_grad_(needed)
                for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
            ]
            outputs = forward(op, [*leaves, *ctx.attributes])
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [
                (o, g)
                for o, g in zip(outputs, grads, strict=True)
                if o.requires_grad and g is not None
            ]
            wanted = [t for t in leaves if t.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True
                )
            )
        gradients = [next(found) if t.requires_grad else None for t in leaves]
        return (*gradients, *(None for _ in ctx.attributes))

    torch.library.register_autograd(
        torch_op(op), backward, setup_context=setup_context, lib=_LIBRARY
    )


def _register(
    op: OperatorSpec,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    _LIBRARY.define(_schema(op), tags=(torch.Tag.pt2_compliant_tag,))
    name = _TORCH_NAMES[op.name]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vssm::{name}", fake, lib=_LIBRARY)


for _op in SCAN_OPERATORS:
    _register(_op, _scan_kernel(_op), _scan_fake(_op))
    ops_gradients.register(_LIBRARY, _op, _TORCH_NAMES[_op.name], _scan_reference)
for _op in GATHER_OPERATORS:
    _register(_op, _gather_kernel(_op), _gather_fake(_op))
    _register_autograd(_op, _gather_reference)
assert set(_TORCH_NAMES) == set(OPERATORS)
