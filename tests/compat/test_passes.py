"""Each graph pass on a small program: what it does, that numbers stay, why it does not apply."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compat_cases import PlainMambaLike, SlowPath, VimLike, built
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

from vssm.compat.packages import scan
from vssm.compat.passes import simplify
from vssm.compat.passes.graph import ATEN, SCANS, PassReport, run_pass, scan_arguments
from vssm.compat.passes.layouts import move_layouts
from vssm.compat.passes.tidy import drop_copies, one_form, share, unfold_projections, unpack

EXACT = {"rtol": 1e-11, "atol": 1e-13}
L, D, N = 6, 3, 2


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor], **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **dict(self.named_parameters()))


def _traced(model: nn.Module, x: Tensor) -> ExportedProgram:
    batch = torch.export.Dim("batch")
    model = model.double() if x.is_floating_point() else model
    return torch.export.export(model, (x,), dynamic_shapes=({0: batch},))


def _changed(
    model: nn.Module, x: Tensor, *passes: Callable
) -> tuple[ExportedProgram, list[PassReport]]:
    """The program after the passes, its numbers compared with those before."""
    program = _traced(model, x)
    want = program.module()(x)
    reports = [run_pass(program, change.__name__, change) for change in passes]
    program.graph_module.recompile()
    torch.testing.assert_close(program.graph_module(*_inputs(program, x))[0], want, **EXACT)
    return program, reports


def _inputs(program: ExportedProgram, x: Tensor) -> list[Tensor]:
    """What the graph itself takes: weights, constants, then x."""
    signature = program.graph_signature
    values = {**program.state_dict, **program.constants}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    places = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    return [values[names[name]] if name in names else x for name in places]


def _targets(program: ExportedProgram) -> list[object]:
    return [n.target for n in program.graph.nodes if n.op == "call_function"]


def _scans(program: ExportedProgram) -> list[dict]:
    return [scan_arguments(n) for n in program.graph.nodes if n.target in SCANS]


def _x(*shape: int) -> Tensor:
    return torch.randn(shape or (2, L, D)).double()


def _weights() -> dict[str, Tensor]:
    return {
        "A_": -torch.rand(D, N) - 0.1,
        "bias": torch.randn(D),
        "skip": torch.randn(D),
        "low": torch.randn(2 * N, D),
    }


def _scan(x: Tensor, weights: dict[str, Tensor], z: Tensor | None = None) -> Tensor:
    """A channels-first call over x (batch, D, L)."""
    B, C = (weights["low"] @ x).split([N, N], dim=1)
    w = weights
    return scan.selective_scan_fn(x, x, w["A_"], B, C, w["skip"], z, w["bias"], True)


def test_copies_go() -> None:
    def copies(x: Tensor) -> Tensor:
        y = x.contiguous().clone().to(x.dtype)[:, :].unsqueeze(1)[:, 0].reshape(x.shape)
        return functional.dropout(y, 0.5, training=False) + 0 + x

    program, (report,) = _changed(_Function(copies), _x(), drop_copies)
    assert _targets(program).count(ATEN.add.Tensor) == 1
    assert report.applied >= 7
    assert len([t for t in _targets(program) if t is not ATEN.sym_size.int]) <= 1 + 1


def test_pairs_are_complex_numbers_without_a_copy() -> None:
    def turns(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.transpose(1, 2).contiguous().unflatten(2, (-1, 2)))
        return torch.view_as_real(pairs * pairs).flatten(2)

    program, _ = _changed(_Function(turns), _x(), drop_copies, one_form)
    assert not {ATEN.contiguous.default, ATEN.view_as_complex.default} & set(_targets(program))


def test_one_form() -> None:
    def forms(x: Tensor) -> Tensor:
        a, b = x.transpose(1, 2).contiguous().view(x.shape[0], D, L).chunk(2, dim=2)
        turned = x.mT.movedim(0, -1).swapaxes(0, 2).moveaxis((0, 1), (1, 2)).swapdims(1, 2)
        return a * b + turned.sum()

    program, _ = _changed(_Function(forms), _x(), one_form)
    found = _targets(program)
    assert ATEN.permute.default in found
    assert ATEN.split_with_sizes.default in found
    gone = {ATEN.transpose.int, ATEN.chunk.default, ATEN.view.default, ATEN.mT.default}
    gone |= {ATEN.movedim.int, ATEN.swapaxes.default, ATEN.swapdims.default}
    assert not (gone | {ATEN.moveaxis.intlist}) & set(found)


def test_size_to_infer_beside_a_symbolic_one_is_a_number() -> None:
    def packed(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 2, -1).view(-1, L, D)

    program, _ = _changed(_Function(packed), _x(), one_form)
    sizes = [n.args[1] for n in program.graph.nodes if n.target is ATEN.reshape.default]
    assert sizes[0][1:] == [2, L * D // 2]
    assert sizes[1] == [-1, L, D]


def test_equal_nodes_are_one() -> None:
    program, (_, report) = _changed(
        _Function(lambda x: x.flip(1) * x.flip(1) + x.unsqueeze(1)[:, 0]), _x(), one_form, share
    )
    assert _targets(program).count(ATEN.flip.default) == 1
    assert report.applied == 1


def test_layouts_move_down_until_they_cancel() -> None:
    def there_and_back(x: Tensor, weight: Tensor) -> Tensor:
        y = functional.silu(x.transpose(1, 2)) * 2
        y = weight @ y
        a, b = y.flip(-1).split([1, D - 1], dim=1)
        a = functional.pad(a[:, :, None].squeeze(2), (2, 0))[:, :, 2:]
        return torch.cat([a.flip(-1).transpose(1, 2), b.flip(2).transpose(1, 2)], dim=2)

    program, _ = _changed(
        _Function(there_and_back, weight=torch.randn(D, D)),
        _x(),
        one_form,
        drop_copies,
        move_layouts,
    )
    found = _targets(program)
    # A slice along a flipped axis is one from its other end.
    assert found.count(ATEN.flip.default) == 0
    assert ATEN.linear.default in found


@pytest.mark.parametrize("operator", ["conv1d", "conv2d"])
def test_flip_goes_through_a_convolution(operator: str) -> None:
    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.flip(-1)
        if operator == "conv1d":
            return functional.conv1d(functional.pad(x, (3, 0)), weight, bias, groups=L).flip(-1)
        x = functional.pad(x[:, :, None], (3, 0))
        return functional.conv2d(x, weight[:, :, None], bias, groups=L).squeeze(2).flip(-1)

    weights = {"weight": torch.randn(L, 1, 4), "bias": torch.randn(L)}
    program, _ = _changed(_Function(convolve, **weights), _x(), move_layouts)
    flips = [n for n in program.graph.nodes if n.target is ATEN.flip.default]
    assert [n.meta["val"].shape[0] for n in flips] == [L]  # of the weight alone


def test_strided_convolution_keeps_its_flip() -> None:
    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return functional.conv1d(x.flip(-1), weight, stride=2)

    model = _Function(convolve, weight=torch.randn(2, L, 2))
    _, (report,) = _changed(model, _x(), move_layouts)
    assert report.applied == 0


def test_projection_is_a_linear_layer() -> None:
    model = built(SlowPath)
    program, reports = _changed(model, _x(2, 5, 12), drop_copies, one_form, unfold_projections)
    assert reports[-1].applied >= 4
    assert not {ATEN.matmul.default, ATEN.mm.default} & set(_targets(program))
    assert _targets(program).count(ATEN.linear.default) == 4  # in, x, dt and out


def test_both_ways_with_the_batch_folded_in_are_one_node() -> None:
    """The path of mamba_ssm's Mamba without its kernels, which repositories copy, both ways."""

    def way(u: Tensor, low: Tensor, high: Tensor, **weights: Tensor) -> Tensor:
        rows = functional.silu(functional.linear(u.transpose(1, 2).reshape(-1, D), low))
        dt, B, C = rows.split([2, N, N], dim=-1)
        dt = (high @ dt.t()).reshape(D, -1, L).permute(1, 0, 2)
        B, C = (t.reshape(-1, L, N).transpose(1, 2).contiguous() for t in (B, C))
        w = weights
        return scan.selective_scan_fn(u, dt, w["A_"], B, C, w["skip"], None, w["bias"], True)

    def both(x: Tensor, **weights: Tensor) -> Tensor:
        u = x.transpose(1, 2)
        y = way(u, **weights) + way(u.flip(-1), **weights).flip(-1)
        return y.transpose(1, 2)

    weights = {**_weights(), "low": torch.randn(2 + 2 * N, D), "high": torch.randn(D, 2)}
    program = _traced(_Function(both, **weights), _x())
    x = _x(5, L, D)
    want = program.module()(x)
    simplify(program)
    torch.testing.assert_close(program.module()(x), want, **EXACT)
    (node,) = _scans(program)
    assert node["order"].meta["val"].shape == (1, 2, L)
    assert node["u"].meta["val"].shape[2] == 1  # x itself, shared by the directions
    assert not {ATEN.permute.default, ATEN.matmul.default} & set(_targets(program))


def test_forward_and_flipped_scans_are_one_node() -> None:
    def both(x: Tensor, **weights: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        z = functional.gelu(x)
        ahead = _scan(x, weights, z)
        back = _scan(x.flip(-1), weights, z.flip(-1)).flip(-1)
        return ((ahead + back) / 2).transpose(1, 2)

    model = _Function(both, **_weights())
    program = _traced(model, _x())
    x = _x()
    want = program.module()(x)
    reports = {report.name: report for report in simplify(program)}
    torch.testing.assert_close(program.module()(x), want, **EXACT)
    (node,) = _scans(program)
    assert node["scale"] == 0.5
    assert node["order"].meta["val"].shape == (1, 2, L)
    assert node["u"].meta["val"].shape[node["direction_axis"]] == 1  # shared by the directions
    assert reports["merge scans"].applied == reports["fold scales"].applied == 1
    permutes = _targets(program).count(ATEN.permute.default)
    assert permutes <= 3  # of B, C and the channels-first product


def test_whole_vim_block_is_one_node() -> None:
    model = built(lambda: VimLike(depth=2))
    program = _traced(model, _x(2, 3, 48, 48))
    x = _x(2, 3, 48, 48)
    want = program.module()(x)
    simplify(program)
    torch.testing.assert_close(program.module()(x), want, **EXACT)
    nodes = _scans(program)
    assert [n["order"].meta["val"].shape[1] for n in nodes] == [2, 2]
    flips = [n for n in program.graph.nodes if n.target is ATEN.flip.default]
    assert all(n.meta["val"].dim() == 4 and n.meta["val"].shape[1] == 1 for n in flips)  # weights


def test_walks_by_index_tables_are_one_node() -> None:
    model = built(PlainMambaLike)
    program = _traced(model, _x(2, 12, 12))
    x = _x(2, 12, 12)
    want = program.module()(x)
    reports = {report.name: report for report in simplify(program)}
    torch.testing.assert_close(program.module()(x), want, **EXACT)
    assert reports["absorb orders"].applied == 4
    (node,) = _scans(program)
    assert node["params_by_step"] == 1
    widths = {name: node[name].meta["val"].shape[2] for name in ("u", "delta", "B", "C")}
    assert widths == {"u": 1, "delta": 1, "B": 4, "C": 1}


def test_packed_parts_are_taken_from_where_they_were() -> None:
    def packed(x: Tensor) -> Tensor:
        parts = [functional.silu(x), functional.gelu(x), x.exp()]
        joined = torch.stack(parts, dim=1).reshape(x.shape[0], 3 * L, D)
        a, b = joined[:, L : 2 * L], joined.unflatten(1, (3, L))[:, 2]
        again = torch.cat([a, b], dim=1).unflatten(1, (2, 2, L // 2)).flatten(2, 3)[:, 1]
        single = x[:, None].unflatten(3, (1, D))[:, 0].flatten(2)
        return a * again.reshape(x.shape) + single

    program, (_, report) = _changed(_Function(packed), _x(), drop_copies, unpack)
    found = _targets(program)
    assert not {ATEN.stack.default, ATEN.cat.default, ATEN.slice.Tensor} & set(found)
    assert report.applied >= 5


def test_parts_across_a_border_stay() -> None:
    def across(x: Tensor) -> Tensor:
        joined = torch.cat([functional.silu(x), functional.gelu(x)], dim=1)
        swapped = torch.stack([x, x.exp()], dim=2)[:, 1].transpose(0, 1)
        return joined[:, 2 : 2 + L] + swapped.sum()

    program, (report,) = _changed(_Function(across), _x(), unpack)
    assert ATEN.cat.default in _targets(program)
    assert report.applied == 0


def _why(model: nn.Module, name: str) -> list[str]:
    program = _traced(model, _x())
    x = _x()
    want = program.module()(x)
    report = next(r for r in simplify(program) if r.name == name)
    torch.testing.assert_close(program.module()(x), want, **EXACT)
    assert report.applied == 0
    assert all(reason in str(report) for reason in report.refused)
    return list(report.refused)


TABLE = (3, 0, 5, 1, 4, 2)
BACK = (1, 3, 5, 0, 4, 2)


def test_reasons_for_not_merging() -> None:
    def gates(x: Tensor, **w: Tensor) -> Tensor:
        t = x.transpose(1, 2)
        return _scan(t, w, t) + _scan(t, w, functional.silu(t))

    def others(x: Tensor, **w: Tensor) -> Tensor:
        t = x.transpose(1, 2)
        return _scan(t, w) + _scan(-t, w) + functional.gelu(t)

    def elsewhere(x: Tensor, **w: Tensor) -> Tensor:
        t = x.transpose(1, 2)
        y = _scan(t, w)
        return (y + _scan(-t, w)) * y

    def softplus(x: Tensor, **w: Tensor) -> Tensor:
        t = x.transpose(1, 2)
        low = (w["low"] @ t).split([N, N], dim=1)
        return _scan(t, w) + scan.selective_scan_fn(t, t, w["A_"], *low, w["skip"])

    for function, reason in (
        (gates, "different gates"),
        (others, "other terms"),
        (elsewhere, "used elsewhere"),
        (softplus, "different attributes"),
    ):
        (why,) = _why(_Function(function, **_weights()), "merge scans")
        assert reason in why


def test_reasons_for_not_absorbing_an_order() -> None:
    def partly(x: Tensor, **w: Tensor) -> Tensor:
        t = x.transpose(1, 2)
        B, C = (w["low"] @ t).split([N, N], dim=1)
        y = scan.selective_scan_fn(t[:, :, TABLE], t[:, :, TABLE], w["A_"], B, C)
        return y[:, :, BACK]

    def unread(x: Tensor, **w: Tensor) -> Tensor:
        t = x.transpose(1, 2)
        B, C = (w["low"] @ t).split([N, N], dim=1)
        return scan.selective_scan_fn(t[:, :, TABLE], t, w["A_"], B, C)

    def gated(x: Tensor, **w: Tensor) -> Tensor:
        t = x.transpose(1, 2)
        B, C = (w["low"] @ t).split([N, N], dim=1)
        return scan.selective_scan_fn(t[:, :, TABLE], t, w["A_"], B, C, z=t)[:, :, BACK]

    def doubled(x: Tensor, **w: Tensor) -> Tensor:
        t = x.transpose(1, 2)
        B, C = (w["low"] @ t).split([N, N], dim=1)
        return scan.selective_scan_fn(t[:, :, (0, 0, 1, 2, 3, 4)], t, w["A_"], B, C)[:, :, BACK]

    for function, reason in (
        (partly, "different tables"),
        (unread, "not read back"),
        (gated, "has a gate"),
        (doubled, "no permutation"),
    ):
        whys = _why(_Function(function, **_weights()), "absorb orders")
        assert any(reason in why for why in whys), (reason, whys)


def test_all_operands_gathered_alike() -> None:
    def walk(x: Tensor, **w: Tensor) -> Tensor:
        t = x[:, TABLE].transpose(1, 2)
        B, C = ((x @ w["low"].t())[:, TABLE]).transpose(1, 2).split([N, N], dim=1)
        y = scan.selective_scan_fn(t, t, w["A_"], B, C, w["skip"])
        return y.transpose(1, 2)[:, BACK]

    program = _traced(_Function(walk, **_weights()), _x())
    x = _x()
    want = program.module()(x)
    simplify(program)
    torch.testing.assert_close(program.module()(x), want, **EXACT)
    (node,) = _scans(program)
    assert node["params_by_step"] in {0, 1}


def test_reason_for_a_scan_flipped_in_part() -> None:
    def part(x: Tensor, **w: Tensor) -> Tensor:
        t = x.transpose(1, 2)
        B, C = (w["low"] @ t).split([N, N], dim=1)
        return scan.selective_scan_fn(t.flip(-1), t, w["A_"], B, C)

    program = _traced(_Function(part, **_weights()), _x())
    reports = simplify(program)
    assert any("flipped u, but not delta, B, C" in str(report) for report in reports)


def test_reasons_for_not_folding_a_scale() -> None:
    def by_tensor(x: Tensor, **w: Tensor) -> Tensor:
        return _scan(x.transpose(1, 2), w).transpose(1, 2) * w["skip"]

    def twice(x: Tensor, **w: Tensor) -> Tensor:
        y = _scan(x.transpose(1, 2), w).transpose(1, 2)
        return (y / 2) * functional.gelu(y)

    for function, reason in ((by_tensor, "by a tensor"), (twice, "used elsewhere")):
        (why,) = _why(_Function(function, **_weights()), "fold scales")
        assert reason in why


def test_batch_stays_dynamic() -> None:
    program = _traced(built(lambda: VimLike(depth=1)), _x(2, 3, 48, 48))
    simplify(program)
    assert program.module()(_x(5, 3, 48, 48)).shape == (5, 7)
