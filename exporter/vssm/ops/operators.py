"""torch.library operators `vssm::*`: what models call and what the exporter turns into ONNX nodes.

Schemas come from the operator table in `spec`. Every operator has a fake kernel, autograd (gathers
through the oracle, the others as `ops_gradients` says), and three overloads:

- `default` ("auto"): the native kernels wherever they run, see `kernels.runs_on_kernels`; the
  oracle for float64 and on devices without kernels.
- `reference`: the oracle on every device.
- `kernel`: the native kernels on CUDA and CPU tensors; where they are missing, an error.

What ran is counted, see `record`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from vssm.errors import check_choice
from vssm.ops import gradients as ops_gradients
from vssm.ops import reference
from vssm.ops.kernels import kernels, runs_on_kernels
from vssm.ops.record import note_run
from vssm.ops.rules import check_operands, check_values, empty_outputs
from vssm.ops.spec import (
    CONV_OPERATORS,
    FLAGS,
    GATED_SELECTIVE_SCAN,
    GATHER_OPERATORS,
    OPERATORS,
    SCAN_OPERATORS,
    SELECTIVE_SCAN,
    SELECTIVE_SCAN_CONSTANT_GAP,
    TOKEN_CONV,
    TOKEN_CONV2D,
    TOKEN_SCATTER,
    OperatorSpec,
)

_LIBRARY = torch.library.Library("vssm", "DEF")
_TORCH_NAMES = {
    "SelectiveScan": "selective_scan",
    "GatedSelectiveScan": "gated_selective_scan",
    "SelectiveScanConstantGap": "selective_scan_constant_gap",
    "TokenGather": "token_gather",
    "TokenGather1": "token_gather1",
    "TokenConv": "token_conv",
    "TokenConv2D": "token_conv2d",
    "TokenScatter": "token_scatter",
}


# What `backend` may be, and the overload of each.
BACKENDS: Final = {"auto": "default", "reference": "reference", "kernel": "kernel"}


def torch_op(op: OperatorSpec, backend: str = "auto") -> Any:
    """The callable `torch.ops.vssm.*` overload of an operator."""
    check_choice("backend", backend, BACKENDS)
    return getattr(getattr(torch.ops.vssm, _TORCH_NAMES[op.name]), BACKENDS[backend])


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
    direction_axis: int = 2,
    backend: str = "auto",
) -> Tensor:
    """One `vssm` scan node: the arguments and result of `reference.selective_scan`.

    Which operator it is follows from the operands: gated with `z`, constant gap with `delta0`.
    What computes it is `backend`: "auto", "reference" or "kernel".

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
    run = torch_op(op, backend)
    attributes = (int(delta_softplus), int(params_by_step), scale, direction_axis)
    result: Tensor = run(*operands, *attributes)
    return result


def token_gather(
    score: Tensor,
    position: Tensor,
    xs: Sequence[Tensor],
    *,
    num_keep: int,
    protected_position: int = -1,
    backend: str = "auto",
) -> tuple[Tensor, list[Tensor]]:
    """One `vssm` gather node: arguments and result of `reference.token_gather`, one or two xs.

    What computes it is `backend`: "auto", "reference" or "kernel".

    Raises:
        ValueError: a shape or value breaks the contract, or there is another number of xs.
    """
    if len(xs) not in {1, 2}:
        raise ValueError(f"len(xs)={len(xs)}: TokenGather takes 1 or 2 tensors; call it again")
    op = GATHER_OPERATORS[2 - len(xs)]
    run = torch_op(op, backend)
    kept, *rows = run(score, position, *xs, num_keep, protected_position)
    return kept, rows


def token_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    *,
    by_position: bool = False,
    activation: bool = True,
    backend: str = "auto",
) -> Tensor:
    """One `vssm` convolution node: the arguments and result of `reference.token_conv`.

    What computes it is `backend`: "auto", "reference" or "kernel".

    Raises:
        ValueError: a shape or value breaks the contract.
    """
    run = torch_op(TOKEN_CONV, backend)
    result: Tensor = run(x, weight, bias, position, int(by_position), int(activation))
    return result


def token_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    *,
    grid: tuple[int, int],
    by_position: bool = False,
    activation: bool = True,
    backend: str = "auto",
) -> Tensor:
    """One `vssm` convolution node: the arguments and result of `reference.token_conv2d`.

    `grid` is its height and width. What computes it is `backend`: "auto", "reference" or "kernel".

    Raises:
        ValueError: a shape or value breaks the contract.
    """
    run = torch_op(TOKEN_CONV2D, backend)
    attributes = (*grid, x.shape[2], int(by_position), int(activation))
    result: Tensor = run(x, weight, bias, position, *attributes)
    return result


def token_scatter(base: Tensor, x: Tensor, position: Tensor, *, backend: str = "auto") -> Tensor:
    """One `vssm` scatter node: the arguments and result of `reference.token_scatter`.

    What computes it is `backend`: "auto", "reference" or "kernel".

    Raises:
        ValueError: a shape or value breaks the contract.
    """
    result: Tensor = torch_op(TOKEN_SCATTER, backend)(base, x, position)
    return result


def _schema(op: OperatorSpec, overload: str) -> str:
    arguments = [f"Tensor {o.name}" for o in op.inputs]
    for a in op.attributes:
        arguments.append(
            f"{a.kind.__name__} {a.name}" + ("" if a.default is None else f"={a.default}")
        )
    outputs = ", ".join("Tensor" for _ in op.outputs)
    return f"{_qualified(op, overload)}({', '.join(arguments)}) -> ({outputs})"


def _qualified(op: OperatorSpec, overload: str) -> str:
    name = _TORCH_NAMES[op.name]
    return name if overload == "default" else f"{name}.{overload}"


_Outputs: TypeAlias = Tensor | tuple[Tensor, ...]


def _reference(op: OperatorSpec, args: Sequence[Any]) -> _Outputs:
    """The oracle's outputs: a tensor, or a tuple where the operator has several."""
    named = op.named(args)
    for flag in FLAGS & named.keys():
        named[flag] = bool(named[flag])
    if op in SCAN_OPERATORS:
        return reference.selective_scan(**named)
    if op is TOKEN_CONV:
        return reference.token_conv(**named)
    if op is TOKEN_CONV2D:
        return reference.token_conv2d(**named)
    if op is TOKEN_SCATTER:
        return reference.token_scatter(**named)
    xs = [named.pop(o.name) for o in op.inputs if o.name.startswith("x")]
    kept, rows = reference.token_gather(**named, xs=xs)
    return (kept, *rows)


def _oracle(op: OperatorSpec) -> Callable[..., _Outputs]:
    def run(*args: Any) -> _Outputs:
        named = op.named(args)
        check_operands(op, named)
        check_values(op, named)
        found = _reference(op, args)
        note_run(op.name, "reference")
        if isinstance(found, Tensor):
            return found.contiguous()
        return tuple(t.contiguous() for t in found)

    return run


def _fake(op: OperatorSpec) -> Callable[..., _Outputs]:
    def fake(*args: Any) -> _Outputs:
        found = empty_outputs(op, op.named(args))
        return found if len(found) > 1 else found[0]

    return fake


def _native(op: OperatorSpec) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        found = kernels().run(op, args)
        note_run(op.name, "kernel")
        return found if len(found) > 1 else found[0]

    return run


def _auto(op: OperatorSpec, oracle: Callable[..., Any]) -> Callable[..., Any]:
    native = _native(op)

    def run(*args: Any) -> Any:
        return native(*args) if runs_on_kernels(args[0]) else oracle(*args)

    return run


def _register_autograd(op: OperatorSpec, overload: str) -> None:
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
            outputs = _reference(op, [*leaves, *ctx.attributes])
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
        note_run(f"{op.name} backward", "reference")
        gradients = [next(found) if t.requires_grad else None for t in leaves]
        return (*gradients, *(None for _ in ctx.attributes))

    torch.library.register_autograd(
        f"vssm::{_qualified(op, overload)}", backward, setup_context=setup_context, lib=_LIBRARY
    )


def _register(op: OperatorSpec) -> None:
    oracle, fake = _oracle(op), _fake(op)
    functions = {"default": _auto(op, oracle), "reference": oracle, "kernel": _native(op)}
    for overload, function in functions.items():
        _LIBRARY.define(_schema(op, overload), tags=(torch.Tag.pt2_compliant_tag,))
        name = _qualified(op, overload)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vssm::{name}", fake, lib=_LIBRARY)
        if op is TOKEN_SCATTER:
            ops_gradients.register_scatter_autograd(_LIBRARY, name)
        elif op in GATHER_OPERATORS or overload == "reference":
            _register_autograd(op, overload)
        else:
            ops_gradients.register_autograd(_LIBRARY, op, name)


for _op in (*SCAN_OPERATORS, *CONV_OPERATORS):
    ops_gradients.define(_LIBRARY, _op, _TORCH_NAMES[_op.name])
for _op in OPERATORS.values():
    _register(_op)
assert set(_TORCH_NAMES) == set(OPERATORS)
