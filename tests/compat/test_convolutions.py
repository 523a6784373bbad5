"""Causal depthwise convolutions in every spelling become `TokenConv`; what is none stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.compat.packages import blocks, scan
from vssm.compat.passes import simplify
from vssm.compat.passes.graph import ATEN, SCANS, PassReport, scan_arguments
from vssm.compat.passes.writes import without_mutation
from vssm.onnx.trace import quiet
from vssm.ops.operators import torch_op
from vssm.ops.spec import TOKEN_CONV

LENGTH, INNER, TAPS = 7, 6, 4
EXACT = {"rtol": 1e-11, "atol": 1e-12}
Convolve = Callable[[Tensor, nn.Conv1d], Tensor]


def _truncated(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """mamba_ssm's slow path: padded on both sides, and cut."""
    weight, groups = conv.weight, conv.groups
    y = functional.conv1d(x, weight, conv.bias, padding=TAPS - 1, groups=groups)
    return functional.silu(y[..., : x.shape[-1]])


def _padded(x: Tensor, conv: nn.Conv1d) -> Tensor:
    padded = functional.pad(x, (TAPS - 1, 0))
    return functional.silu(functional.conv1d(padded, conv.weight, groups=conv.groups))


def _function(x: Tensor, conv: nn.Conv1d) -> Tensor:
    return blocks.causal_conv1d_fn(x, conv.weight.squeeze(1), conv.bias, activation="silu")


def _inactive(x: Tensor, conv: nn.Conv1d) -> Tensor:
    y = blocks.causal_conv1d_fn(x, conv.weight[:, 0], conv.bias)
    return y.relu()


class _Layer(nn.Module):
    """in_proj, a convolution, x_proj and a scan, forwards and as asked for also from the end."""

    def __init__(self, convolve: Convolve, *, both_ways: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolve, self.ways = convolve, 1 + both_ways
        self.in_proj = nn.Linear(3, 2 * INNER)
        self.convs = nn.ModuleList(
            nn.Conv1d(INNER, INNER, TAPS, groups=INNER) for _ in range(self.ways)
        )
        self.x_proj = nn.ModuleList(nn.Linear(INNER, INNER + 4) for _ in range(self.ways))
        self.A = nn.Parameter(-torch.rand(INNER, 2))
        self.out_proj = nn.Linear(INNER, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        y = self._mixed(u, z, 0)
        if self.ways > 1:
            y = y + self._mixed(u.flip(-1), z.flip(-1), 1).flip(-1)
        return self.out_proj(y.transpose(1, 2))

    def _mixed(self, u: Tensor, z: Tensor, way: int) -> Tensor:
        u = self.convolve(u, self.convs[way])
        low = self.x_proj[way].weight @ u
        delta, B, C = low.split([INNER, 2, 2], dim=1)
        return scan.selective_scan_fn(u, delta, self.A, B, C, z=z, delta_softplus=True)


def _simplified(model: nn.Module) -> tuple[list[dict], PassReport, list[object]]:
    """Scans, the report of the pass and the operators; the numbers hold for another batch."""
    x = torch.randn(2, LENGTH, 3).double()
    with quiet():
        shapes = ({0: torch.export.Dim("batch")},)
        program = without_mutation(torch.export.export(model.double(), (x,), dynamic_shapes=shapes))
    reports = {report.name: report for report in simplify(program)}
    again = torch.randn(5, LENGTH, 3).double()
    torch.testing.assert_close(program.module()(again), model(again), **EXACT)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    scans = [scan_arguments(node) for node in nodes if node.target in SCANS]
    return scans, reports["join convolutions"], [node.target for node in nodes]


@pytest.mark.parametrize("convolve", [_truncated, _padded, _function, _inactive])
def test_two_ways_are_one_node_without_layouts(convolve: Convolve) -> None:
    (node,), report, operators = _simplified(_Layer(convolve, both_ways=True))
    assert (report.applied, dict(report.refused)) == (2, {})
    assert operators.count(torch_op(TOKEN_CONV)) == 1
    inside = {ATEN.flip.default, ATEN.conv1d.default, ATEN.conv2d.default, ATEN.pad.default}
    # Weights alone are transposed, once and for all, when the file is made.
    assert not inside & set(operators)
    assert node["direction_axis"] == 1
    if convolve is not _inactive:
        assert node["u"].target is torch_op(TOKEN_CONV)


def test_one_way_is_a_node_too() -> None:
    _, report, operators = _simplified(_Layer(_truncated))
    assert (report.applied, operators.count(torch_op(TOKEN_CONV))) == (1, 1)
    assert ATEN.permute.default not in operators


def _centred(x: Tensor, conv: nn.Conv1d) -> Tensor:
    return functional.conv1d(
        functional.pad(x, (2, 1)), conv.weight, conv.bias, groups=conv.groups
    ).sigmoid()


def _ahead(x: Tensor, conv: nn.Conv1d) -> Tensor:
    return _function(x.flip(-1), conv).flip(-1)


def _reflected(x: Tensor, conv: nn.Conv1d) -> Tensor:
    padded = functional.pad(x, (TAPS - 1, 0), mode="reflect")
    return functional.conv1d(padded, conv.weight, groups=conv.groups)


def _dilated(x: Tensor, conv: nn.Conv1d) -> Tensor:
    padded = functional.pad(x, (2 * TAPS - 2, 0))
    return functional.conv1d(padded, conv.weight, groups=conv.groups, dilation=2)


def _grouped(x: Tensor, conv: nn.Conv1d) -> Tensor:
    weight = conv.weight.expand(-1, 2, -1)
    return functional.conv1d(functional.pad(x, (TAPS - 1, 0)), weight, groups=INNER // 2)


def _along_channels(x: Tensor, conv: nn.Conv1d) -> Tensor:
    return _function(x.sigmoid().cumsum(1) + x.mean(2, keepdim=True), conv)


@pytest.mark.parametrize(
    ("convolve", "refused"),
    [
        (_centred, {}),
        (_ahead, {"a convolution looks ahead, and none looks back over the same tokens": 1}),
        (_reflected, {}),
        (_dilated, {}),
        (_grouped, {}),
        (_along_channels, {"a convolution's operand is not a token-major value, transposed": 1}),
    ],
)
def test_what_is_no_such_convolution_stays(convolve: Convolve, refused: dict[str, int]) -> None:
    _, report, operators = _simplified(_Layer(convolve))
    assert (report.applied, dict(report.refused)) == (0, refused)
    assert torch_op(TOKEN_CONV) not in operators
