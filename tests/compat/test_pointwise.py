"""What the operator of a scan does itself moves into it: bias, softplus, gate; and wide parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.compat.packages import scan
from vssm.compat.passes import simplify
from vssm.compat.passes.graph import ATEN, SCANS, PassReport, scan_arguments
from vssm.compat.passes.writes import without_mutation
from vssm.onnx.trace import quiet
from vssm.ops import operators as ops

LENGTH, WIDTH, INNER, STATES = 5, 6, 64, 2
# torch's softplus gives x from 20 on, the operator's the 2e-9 that are missing.
EXACT = {"rtol": 1e-9, "atol": 1e-12}
OUTSIDE = {
    ATEN.softplus.default,
    ATEN.silu.default,
    ATEN.sigmoid.default,
    ATEN.mul.Tensor,
}


class _Layer(nn.Module):
    """in_proj and dt_proj as a plain scan's author writes them; `mix` does the rest."""

    def __init__(self, mix: Callable[..., Tensor], ways: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = mix
        self.in_proj = nn.Linear(WIDTH, 2 * INNER)
        self.dt_proj = nn.Linear(INNER, ways * INNER)
        self.bc_proj = nn.Linear(INNER, 2 * STATES)
        self.A = nn.Parameter(-torch.rand(INNER, STATES))
        self.bias = nn.Parameter(torch.randn(INNER))

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        return self.mix(self, u, z)

    def scan(self, u: Tensor, delta: Tensor, **options: object) -> Tensor:
        """The plain scan of token-major values."""
        B, C = (part.transpose(1, 2) for part in self.bc_proj(u).chunk(2, -1))
        y = scan.selective_scan_fn(
            u.transpose(1, 2), delta.transpose(1, 2), self.A, B, C, **options
        )
        return y.transpose(1, 2)


def _token_major(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    return m.scan(u, functional.softplus(m.dt_proj(u))) * functional.silu(z)


def _bias_apart(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    delta = functional.softplus((m.dt_proj.weight @ u.transpose(1, 2)).transpose(1, 2) + m.bias)
    return z.sigmoid() * z * m.scan(u, delta)


def _channels_first(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    delta = functional.softplus(m.dt_proj(u).transpose(1, 2)).transpose(1, 2)
    y = m.scan(u, delta).transpose(1, 2)
    return (y * functional.silu(z.transpose(1, 2))).transpose(1, 2)


def _both_ways(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    ahead, back = functional.softplus(m.dt_proj(u)).split(INNER, dim=-1)
    y = m.scan(u, ahead) + m.scan(u.flip(1), back.flip(1)).flip(1)
    return y * functional.silu(z)


def _each_gated(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    ahead, back = functional.softplus(m.dt_proj(u)).chunk(2, dim=-1)
    gate = functional.silu(z)
    return m.scan(u, ahead) * gate + (m.scan(u.flip(1), back.flip(1)) * gate.flip(1)).flip(1)


def _simplified(
    mix: Callable[..., Tensor], ways: int = 1
) -> tuple[list[dict], dict[str, PassReport], list[object]]:
    """Scans, reports and operators; the numbers hold for another batch and for large steps."""
    model, x = _Layer(mix, ways).double(), torch.randn(2, LENGTH, WIDTH).double()
    with quiet():
        shapes = ({0: torch.export.Dim("batch")},)
        program = without_mutation(torch.export.export(model, (x,), dynamic_shapes=shapes))
    reports = {report.name: report for report in simplify(program)}
    again = 30 * torch.randn(3, LENGTH, WIDTH).double()
    torch.testing.assert_close(program.module()(again), model(again), **EXACT)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    scans = [scan_arguments(node) for node in nodes if node.target in SCANS]
    return scans, reports, [node.target for node in nodes]


@pytest.mark.parametrize("mix", [_token_major, _bias_apart, _channels_first])
def test_the_scan_does_it_all(mix: Callable[..., Tensor]) -> None:
    (node,), reports, operators = _simplified(mix)
    assert node["delta_softplus"] == 1
    assert node["z"] is not None
    assert reports["fold biases"].applied == 1
    assert not OUTSIDE & set(operators)
    # The parts of B and C are too narrow for a projection each.
    assert operators.count(ATEN.split_with_sizes.default) == 1


@pytest.mark.parametrize("mix", [_both_ways, _each_gated])
def test_so_does_the_scan_of_two_ways(mix: Callable[..., Tensor]) -> None:
    (node,), _, operators = _simplified(mix, ways=2)
    assert node["delta_softplus"] == 1
    assert node["z"] is not None
    assert not OUTSIDE & set(operators)


def _other_beta(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    return m.scan(u, functional.softplus(m.dt_proj(u), beta=2)) * z


def _low_threshold(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    return m.scan(u, functional.softplus(m.dt_proj(u), threshold=2)) * z


def _bias_behind(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    return m.scan(u, functional.softplus(m.dt_proj(u)), delta_bias=m.bias) * z


def _twice(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    return m.scan(u, functional.softplus(m.dt_proj(u)), delta_softplus=True) * z


def _read_elsewhere(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    delta = functional.softplus(m.dt_proj(u))
    return m.scan(u, delta) * z + delta


def _also_u(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    delta = functional.softplus(m.dt_proj(u))
    return m.scan(delta, delta) * z


def _negative(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    return m.scan(u, -functional.softplus(m.dt_proj(u)).neg()) * z


@pytest.mark.parametrize(
    ("mix", "refused"),
    [
        (_other_beta, "a softplus has another beta than 1, or a threshold below 20"),
        (_low_threshold, "a softplus has another beta than 1, or a threshold below 20"),
        (_bias_behind, "a scan adds to the step sizes behind their softplus"),
        (_twice, "a scan adds to the step sizes behind their softplus"),
        (_read_elsewhere, None),
        (_also_u, None),
        (_negative, None),
    ],
)
def test_another_softplus_stays(mix: Callable[..., Tensor], refused: str | None) -> None:
    _, reports, operators = _simplified(mix)
    assert reports["fold softplus"].applied == 0
    assert dict(reports["fold softplus"].refused) == ({refused: 1} if refused else {})
    assert ATEN.softplus.default in operators


def _by_sigmoid(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    return m.scan(u, m.dt_proj(u)) * z.sigmoid()


def _read_twice(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    y = m.scan(u, m.dt_proj(u))
    return y * functional.silu(z) + y


def _for_all_channels(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    return m.scan(u, m.dt_proj(u)) * functional.silu(z[..., :1])


@pytest.mark.parametrize("mix", [_by_sigmoid, _read_twice, _for_all_channels])
def test_another_product_is_no_gate(mix: Callable[..., Tensor]) -> None:
    (node,), reports, _ = _simplified(mix)
    assert "z" not in node
    assert reports["fold gates"].applied == reports["fold gates of sums"].applied == 0


def _bias_of_two(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    delta = m.dt_proj(u)
    return m.scan(u, delta) * z + delta


def _one_channel(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    """The axis of directions is the projection's, and the one added is that of channels."""
    delta = functional.linear(u, m.dt_proj.weight[:1], m.bias[:1]).unsqueeze(3)
    rows = m.bc_proj(u)[:, :, None].split(STATES, -1)
    y = ops.selective_scan(
        u[:, :, None, :1],
        delta,
        m.A[None, :1],
        *rows,
        D=torch.zeros(1, 1).double(),
        delta_bias=torch.zeros(1, 1).double(),
        order=torch.arange(LENGTH, dtype=torch.int32)[None, None],
        gap=torch.ones(1, 1, LENGTH, dtype=torch.int32),
    )
    return y * z


def _wider(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    return m.scan(u, (u @ m.dt_proj.weight.T).float() + m.bias) * z


def _bias_of_each_token(m: _Layer, u: Tensor, z: Tensor) -> Tensor:
    return m.scan(u, (u @ m.dt_proj.weight.T) + z)


@pytest.mark.parametrize("mix", [_bias_of_two, _bias_of_each_token, _one_channel, _wider])
def test_another_bias_stays(mix: Callable[..., Tensor]) -> None:
    _, reports, _ = _simplified(mix)
    assert reports["fold biases"].applied == 0
