"""Programs near to what the graph passes look for, where applying one would change the numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.compat.packages import scan
from vssm.compat.passes import simplify
from vssm.compat.passes.graph import SCANS
from vssm.compat.passes.writes import without_mutation
from vssm.onnx.trace import quiet

L, D, N = 6, 4, 2
PART = torch.tensor([2, 0, 3, 1])
BACK = torch.argsort(PART)


class _Function(nn.Module):
    """A function of x, of the weights of one scan, and of further ones."""

    def __init__(self, function: Callable[..., Tensor], **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        weights |= {"A": -torch.rand(D, N) - 0.1, "D": torch.randn(D), "bias": torch.randn(D)}
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _scan(w: Any, x: Tensor, delta: Tensor | None = None, B: Tensor | None = None) -> Tensor:
    """A scan of tokens x (batch, seqlen, D); delta and B of x where they are not given."""
    u = x.transpose(1, 2)
    rows = u[:, :N] if B is None else B.transpose(1, 2)
    delta = x.cos() if delta is None else delta
    args = (u, delta.transpose(1, 2), w.A, rows, rows, w.D, None, w.bias, True)
    return scan.selective_scan_fn(*args).transpose(1, 2)


def _written_copy(w: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    y.mul_(2)
    return y + x


def _written_twins(w: Any, x: Tensor) -> Tensor:
    a, b = torch.zeros(L, D, dtype=x.dtype), torch.zeros(L, D, dtype=x.dtype)
    a[0], b[1] = 1, 5
    return x + a - b


def _written_fresh(w: Any, x: Tensor) -> Tensor:
    """Written to where nobody sees it, and where somebody does."""
    y = functional.linear(x, w.w).relu_()
    z = x + 1
    return z.relu_() + z.sin() + y + (x * 2).add_(x)


def _written_order(w: Any, x: Tensor) -> Tensor:
    order = torch.arange(L)
    order[0], order[1] = 1, 0
    return _scan(w, x[:, order])[:, torch.arange(L)]


def _step_rank(w: Any, x: Tensor) -> Tensor:
    """Step projections of two widths."""
    linear = functional.linear
    first, second = (linear(linear(x, a), a.t()) for a in (w.low, w.high))
    return _scan(w, x, first) + _scan(w, x, second)


def _interleaved(w: Any, x: Tensor) -> Tensor:
    y = x.transpose(1, 2).sin()
    every_second, behind = y[:, 0:4:2], y[:, 2:4]
    return _scan(w, x, B=every_second.transpose(1, 2)) + _scan(w, x, B=behind.transpose(1, 2))


CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, tuple[int, ...]]]] = {
    "a copy that is written to": (_written_copy, {}),
    "equal nodes that are written to": (_written_twins, {}),
    "results that are written to": (_written_fresh, {"w": (D, D)}),
    "a table that is written to": (_written_order, {}),
    "T turns all axes": (lambda w, x: x + w.w.mT.T.sum(1), {"w": (D, L, 5)}),
    "a slice with a step is no part": (
        lambda w, x: torch.cat([x.sin(), x.cos()], 1)[:, ::2],
        {},
    ),
    "a folded product of three axes": (
        lambda w, x: (
            x.sum()
            + (w.w @ w.x.permute(2, 0, 1).reshape(4, 4, 4)).reshape(5, 2, 8).permute(1, 0, 2)
        ),
        {"w": (5, 4), "x": (2, 8, 4)},
    ),
    "a permuted weight": (lambda w, x: x + w.w.permute(1, 0, 2), {"w": (L, 1, D)}),
    "flips of operands of other ranks": (
        lambda w, x: x.flip(1) + w.w.flip(1),
        {"w": (L, D)},
    ),
    "a flip of a broadcast operand": (lambda w, x: x[:, :1] + w.w.flip(0), {"w": (L, D)}),
    "a map without a batch axis": (
        lambda w, x: x.sum() + functional.conv2d(w.x.flip(2), w.w),
        {"w": (4, 3, 2, 3), "x": (3, L, L)},
    ),
    "a squeeze that squeezes nothing": (
        lambda w, x: torch.squeeze(x.flip(2), 1).unsqueeze(3).squeeze(1),
        {},
    ),
    "a gather that leaves tokens out": (lambda w, x: _scan(w, x[:, PART])[:, BACK], {}),
    "a gather by steps that leaves tokens out": (
        lambda w, x: _scan(w, x[:, PART], x[:, :4].cos(), x[:, :4, :N])[:, BACK],
        {},
    ),
    "a sum of batches of other sizes": (lambda w, x: _scan(w, x) + _scan(w, w.w), {"w": (1, L, D)}),
    "a sum of sequences of other lengths": (lambda w, x: _scan(w, x) + _scan(w, x[:, :1]), {}),
    "step projections of two ranks": (_step_rank, {"low": (2, D), "high": (3, D)}),
    "interleaved parts": (_interleaved, {}),
}


@pytest.mark.filterwarnings("ignore:The use of `x.T`:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_numbers_stay(name: str) -> None:
    function, shapes = CASES[name]
    torch.manual_seed(0)
    weights = {key: torch.randn(shape) for key, shape in shapes.items()}
    model = _Function(function, **weights).double()
    x = torch.randn(2, L, D).double()
    want = model(x)
    dynamic = ({0: torch.export.Dim("batch")},)
    with quiet():
        program = without_mutation(torch.export.export(model, (x,), dynamic_shapes=dynamic))
    simplify(program)
    program.graph_module.recompile()
    names = program.graph_signature.inputs_to_parameters
    names = {**names, **program.graph_signature.inputs_to_lifted_tensor_constants}
    values = {**program.state_dict, **program.constants}
    places = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    got = program.graph_module(*(values[names[p]] if p in names else x for p in places))[0]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_scans_added_in_place_are_one_node() -> None:
    def accumulate(w: Any, x: Tensor) -> Tensor:
        y = _scan(w, x, x)
        y += _scan(w, x.flip(1), x.flip(1)).flip(1)
        y /= 2
        return y

    program = torch.export.export(_Function(accumulate), (torch.randn(2, L, D),))
    with quiet():
        program = without_mutation(program)
    simplify(program)
    assert sum(node.target in SCANS for node in program.graph.nodes) == 1
