"""Writes to operands become values, whichever of them show the same memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vssm.compat.passes.writes import _writes, without_mutation
from vssm.onnx.trace import quiet


class _Functions(nn.Module):
    def __init__(self, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(x) for function in self.functions)


def _residual(x: Tensor) -> Tensor:
    y = torch.relu(x).transpose(1, 2).reshape(x.shape[0], 5, 2, 2)
    y += x[:, :1, :, None, None].transpose(1, 2).squeeze(2)
    return y


def _filled(x: Tensor) -> Tensor:
    empty = x.new_empty(x.shape[0], 4, 10)
    empty[:, :, ::2] = x
    empty[:, :, 1::2] = x.flip(1)
    empty[:, 0] = 1
    return empty


def _views_of_one(x: Tensor) -> Tensor:
    """Each write is seen by views made before it and after it, and by what others write to."""
    y = x * 2
    row, columns, turned = y[:, 1], y[:, :, 1:3], y.transpose(1, 2)
    flat = y.view(x.shape[0], 20)
    kept = columns * 1
    row += 3
    late = y[:, 1:]
    columns.mul_(late[:, :, 1:3].mean())
    again = turned.add_(1)
    flat[:, 7:9] = kept[:, 0] * 5
    late.permute(2, 0, 1)[4].zero_()
    return torch.cat([y, turned.transpose(1, 2), row[:, None], again.mT, late], 1) + y.sum()


def _casts(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 4, 5, dtype=x.dtype)
    y.copy_(torch.arange(20).reshape(4, 5))
    y[:, 0].fill_(7)
    nn.functional.silu(y, inplace=True)
    y += torch.arange(5)
    return y.relu_().sub_(1).gt_(x.mean())


def _scattered(x: Tensor) -> Tensor:
    """A walk back: what was in one order is put into another."""
    order = torch.tensor([3, 0, 4, 1, 2]).expand(x.shape[0], 4, 5)
    return torch.zeros_like(x).scatter_(2, order, x).scatter_add_(2, order.flip(2), x)


def _to_its_input(x: Tensor) -> Tensor:
    return x.add_(1) * x


def _to_a_part(x: Tensor) -> Tensor:
    y = x * 2
    first, second = y.chunk(2, dim=1)
    first += second
    return y


def _where(x: Tensor) -> Tensor:
    y = x * 2
    y[y > 0] = 5.0
    return y


def _program(model: nn.Module, x: Tensor) -> ExportedProgram:
    with quiet(), torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch")},))
        return without_mutation(program)


@pytest.fixture
def traced_again(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    seen = []
    run = ExportedProgram.run_decompositions

    def noting(self, table):
        seen.append(True)
        return run(self, table)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", noting)
    return seen


def _assert_the_same(program: ExportedProgram, model: nn.Module, x: Tensor) -> None:
    assert not any(map(_writes, program.graph.nodes))
    program.graph.lint()
    with quiet():
        again = program.module()
    for batch in (x, torch.cat([x, x.flip(0), x])):
        wanted = model(batch.clone())
        for got, want in zip(again(batch.clone()), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_views_of_what_was_written_to(traced_again: list[bool]) -> None:
    model = _Functions(_residual, _filled, _views_of_one, _casts, _scattered, _where)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    program = _program(model, x)
    assert not traced_again
    _assert_the_same(program, model, x)


@pytest.mark.parametrize("function", [_to_its_input, _to_a_part])
def test_other_writes_are_left_to_torch(
    function: Callable[[Tensor], Tensor], traced_again: list[bool]
) -> None:
    model, x = _Functions(function), torch.randn(2, 4, 5, dtype=torch.float64)
    program = _program(model, x)
    assert traced_again
    _assert_the_same(program, model, x)
