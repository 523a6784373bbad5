"""Walks over a map in every spelling become the order of one scan; what is no walk stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.compat.packages import scan
from vssm.compat.passes import simplify
from vssm.compat.passes.graph import ATEN, SCANS, PassReport, scan_arguments
from vssm.compat.passes.writes import without_mutation
from vssm.onnx.trace import quiet

HEIGHT, WIDTH = 4, 6
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def _stacked(x: Tensor) -> Tensor:
    """Rows and columns stacked, then both reversed behind them."""
    rows = x.flatten(2)
    columns = x.transpose(2, 3).contiguous().view(rows.shape)
    two = torch.stack([rows, columns], dim=1)
    return torch.cat([two, two.flip(-1)], dim=1)


def _unstacked(y: Tensor) -> Tensor:
    back = y[:, 2:].flip(-1)

    def upright(t: Tensor) -> Tensor:
        return t.view(*t.shape[:2], WIDTH, HEIGHT).transpose(2, 3).flatten(2)

    return y[:, 0] + back[:, 0] + upright(y[:, 1]) + upright(back[:, 1])


def _written(x: Tensor) -> Tensor:
    """The same, each assigned into an empty tensor."""
    xs = x.new_empty((x.shape[0], 4, x.shape[1], HEIGHT * WIDTH))
    xs[:, 0] = x.flatten(2)
    xs[:, 1] = x.transpose(2, 3).flatten(2)
    xs[:, 2:] = xs[:, :2].flip(-1)
    return xs


def _added_in_pairs(y: Tensor) -> Tensor:
    two = y[:, :2] + y[:, 2:].flip(-1)
    columns = two[:, 1].view(y.shape[0], -1, WIDTH, HEIGHT).transpose(2, 3)
    return two[:, 0] + columns.reshape(two[:, 0].shape)


def _windows(x: Tensor) -> Tensor:
    """Windows of two by two, row by row inside, and the same from the end; and rolled rows."""
    inside = x.view(*x.shape[:2], HEIGHT // 2, 2, WIDTH // 2, 2).permute(0, 1, 2, 4, 3, 5)
    inside = inside.reshape(*x.shape[:2], -1)
    rolled = x.flatten(2).roll(5, dims=-1)
    return torch.stack([inside, inside.flip(-1), x.flatten(2), rolled], dim=1)


def _from_windows(y: Tensor) -> Tensor:
    def out(t: Tensor) -> Tensor:
        t = t.view(*t.shape[:2], HEIGHT // 2, WIDTH // 2, 2, 2).permute(0, 1, 2, 4, 3, 5)
        return t.reshape(*t.shape[:2], -1)

    parts = [out(y[:, 0]), out(y[:, 1].flip(-1)), y[:, 2], y[:, 3].roll(-5, dims=-1)]
    return torch.stack(parts).sum(0)


def _apart(y: Tensor) -> Tensor:
    """Every walk's result has a use of its own before the sum."""
    first, *others = (y[:, k] for k in range(3))
    third = others[1].flip(-1)
    return first.sigmoid() * y[:, 0] + others[0].flip(-1).sum() + third.tanh()


def _turned(x: Tensor) -> Tensor:
    """Quarter turns of the map, and the same from the end."""
    once = x.rot90(1, dims=(2, 3)).reshape(*x.shape[:2], -1)
    back = x.rot90(-1, dims=(2, 3)).swapaxes(2, 3).reshape(*x.shape[:2], -1)
    return torch.stack([once, once.flip(-1), back, back.flip(-1)], dim=1)


def _turned_back(y: Tensor) -> Tensor:
    def out(t: Tensor, turned: bool) -> Tensor:
        t = t.reshape(*t.shape[:2], HEIGHT, WIDTH) if turned else t.view(*t.shape[:2], WIDTH, -1)
        return (t.swapaxes(2, 3) if turned else t).rot90(1 if turned else 3, dims=(2, 3)).flatten(2)

    first, *others = (y[:, k] if k % 2 == 0 else y[:, k].flip(-1) for k in range(4))
    return out(first, False) + out(others[0], False) + out(others[1], True) + out(others[2], True)


def _slanted(x: Tensor) -> Tensor:
    """The entries of a gathered row of the map, which moves by one with every row."""
    index = (torch.arange(WIDTH) + torch.arange(HEIGHT)[:, None]) % WIDTH
    return index[None, None].expand(*x.shape[:2], -1, -1)


class _Tables(nn.Module):
    """Walks that are kept as integers that learn nothing, and diagonals made on the way."""

    def __init__(self) -> None:
        super().__init__()
        order = torch.randperm(HEIGHT * WIDTH, generator=torch.Generator().manual_seed(0))
        self.order = nn.Parameter(order, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2)
        # Token t goes to step order[t].
        sent = torch.zeros_like(rows).scatter_(2, self.order.expand(rows.shape), rows)
        slanted = x.gather(3, _slanted(x)).transpose(-1, -2).reshape(rows.shape)
        return torch.stack([sent, sent.flip(-1), slanted, slanted.flip(-1)], dim=1)

    def back(self, y: Tensor) -> Tensor:
        ahead = [y[:, 0], y[:, 1].flip(-1)]
        found = sum(t.gather(2, self.order.expand(t.shape)) for t in ahead)
        for t in (y[:, 2], y[:, 3].flip(-1)):
            upright = t.reshape(*t.shape[:2], WIDTH, HEIGHT).transpose(-1, -2)
            found = found + torch.zeros_like(upright).scatter_(
                3, _slanted(upright), upright
            ).flatten(2)
        return found


def _placed(x: Tensor) -> Tensor:
    """Every second token first, by an assignment at indices."""
    steps = torch.arange(HEIGHT * WIDTH).view(-1, 2).t().flatten()
    rows = x.flatten(2)
    placed = rows.new_empty(rows.shape)
    placed[:, :, steps] = rows
    return torch.stack([placed, placed.flip(-1), rows, rows.flip(-1)], dim=1)


def _picked(y: Tensor) -> Tensor:
    steps = torch.arange(HEIGHT * WIDTH).view(-1, 2).t().flatten()
    return (y[:, 0] + y[:, 1].flip(-1))[..., steps] + y[:, 2] + y[:, 3].flip(-1)


def _averaged(y: Tensor) -> Tensor:
    """The mean of all results, each a map again, by the short spellings of a transpose."""
    back = torch.cat([y[:, :2], y[:, 2:].flip(-1)], dim=1).unflatten(-1, (HEIGHT, WIDTH))
    upright = back[:, 1::2].reshape(*y[:, :2].shape[:3], WIDTH, HEIGHT).mT
    maps = torch.stack([back[:, 0], upright[:, 0], back[:, 2], upright[:, 1]], dim=1)
    return maps.movedim(1, 0).mean(0).flatten(2)


_TABLES = _Tables()
STYLES = {
    "turned": (_turned, _turned_back),
    "tables": (_TABLES, _TABLES.back),
    "placed": (_placed, _picked),
    "stacked": (_stacked, _unstacked),
    "written": (_written, _added_in_pairs),
    "windows": (_windows, _from_windows),
    "averaged": (_stacked, _averaged),
}


class _Mixer(nn.Module):
    """A map scanned along four walks, with projections of each."""

    def __init__(self, cross_scan, cross_merge, width: int = 3, states: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cross_scan, self.cross_merge = cross_scan, cross_merge
        self.states, self.width = states, width
        self.project = nn.Parameter(torch.randn(4, 2 * states + width, width) / 2)
        self.bias = nn.Parameter(torch.randn(4 * width))
        self.A_log = nn.Parameter(torch.rand(4 * width, states))
        self.D = nn.Parameter(torch.ones(4 * width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(x)
        xs = self.cross_scan(x)
        low = torch.einsum("bkdl,kcd->bkcl", xs, self.project)
        delta, B, C = low.split([self.width, self.states, self.states], dim=2)
        seqlen = HEIGHT * WIDTH
        y = scan.selective_scan_fn(
            xs.reshape(x.shape[0], -1, seqlen),
            delta.reshape(x.shape[0], -1, seqlen),
            -self.A_log.exp(),
            B,
            C,
            self.D,
            delta_bias=self.bias,
            delta_softplus=True,
        )
        y = self.cross_merge(y.view(x.shape[0], 4, -1, seqlen))
        return self.norm(y.transpose(1, 2)).view(x.shape[0], HEIGHT, WIDTH, -1)


def _simplified(model: nn.Module) -> tuple[list[dict], dict[str, PassReport], set[object]]:
    """Scan nodes, reports and other operators; the numbers hold for another batch."""
    x = torch.randn(2, 3, HEIGHT, WIDTH).double()
    shapes = ({0: torch.export.Dim("batch")},)
    with quiet():
        traced = torch.export.export(model.double(), (x,), dynamic_shapes=shapes)
        program = without_mutation(traced)
    reports = {report.name: report for report in simplify(program)}
    again = torch.randn(5, 3, HEIGHT, WIDTH).double()
    torch.testing.assert_close(program.module()(again), model(again), **EXACT)
    scans = [scan_arguments(n) for n in program.graph.nodes if n.target in SCANS]
    return scans, reports, {n.target for n in program.graph.nodes}


@pytest.mark.parametrize("style", STYLES)
def test_walks_are_the_order_of_one_scan(style: str) -> None:
    scans, reports, _ = _simplified(_Mixer(*STYLES[style]))
    (node,) = scans
    assert node["order"].meta["val"].shape == (1, 4, HEIGHT * WIDTH)
    assert node["u"].meta["val"].shape[2] == 1  # the map itself, once
    assert node["params_by_step"] == 1
    assert reports["follow walks"].applied == 4


def test_results_used_apart_stay_scans_of_their_own_with_orders() -> None:
    scans, reports, operators = _simplified(_Mixer(_written, _apart))
    # Two of them are no inverse of the walk that was read: nothing is claimed of those.
    assert len(scans) == 3
    assert reports["follow walks"].applied == 1
    assert ATEN.sigmoid.default in operators


def _padded(x: Tensor) -> Tensor:
    rows = functional.pad(x[..., :-1], (0, 1)).flatten(2)
    return torch.stack([rows, rows.flip(-1), rows, rows.flip(-1)], dim=1)


def _mixed_channels(x: Tensor) -> Tensor:
    rows = x.flip(1).flatten(2)
    return torch.stack([rows, rows.flip(-1), rows, rows.flip(-1)], dim=1)


def _merged(y: Tensor) -> Tensor:
    return y[:, 0] + y[:, 1].flip(-1) + y[:, 2] + y[:, 3].flip(-1)


def _cut(y: Tensor) -> Tensor:
    return y[:, 0] + y[:, 1].flip(-1) + y[:, 2] + functional.pad(y[:, 3, :, 1:], (1, 0))


def test_what_is_no_walk_stays() -> None:
    _, reports, _ = _simplified(_Mixer(_mixed_channels, _cut))
    assert reports["follow walks"].applied == 0
    assert reports["follow walks"].refused == {
        "a walk moves images or channels too": 3,
        "a part of a scan's result is left out": 1,
    }


def test_a_map_with_added_places_is_a_map() -> None:
    (node,), _, _ = _simplified(_Mixer(_padded, _merged))
    assert node["order"].meta["val"].shape[1] == 4
