"""Files whose height and width stay open: where a module's code allows it, and refusals."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import vssm
from vssm.artifact.directory import Artifact
from vssm.commands.user_module import ModuleRequest, dry_run_user_module, read_inputs
from vssm.compat import export
from vssm.compat.packages import cross, scan
from vssm.compat.sizes import FreeAxis, free_axes
from vssm.errors import UnsupportedError


def _cross_scan(x: Tensor) -> Tensor:
    """Rows and columns, and both from the end, in plain torch."""
    rows = x.flatten(2)
    two = torch.stack([rows, x.transpose(2, 3).contiguous().view(rows.shape)], dim=1)
    return torch.cat([two, two.flip(-1)], dim=1)


def _cross_merge(y: Tensor) -> Tensor:
    batch, _, width, height, columns = y.shape
    two = y[:, :2].flatten(3) + y[:, 2:].flatten(3).flip(-1)
    turned = two[:, 1].view(batch, width, columns, height).transpose(2, 3)
    return two[:, 0] + turned.contiguous().view(batch, width, -1)


def _windows(x: Tensor) -> Tensor:
    """By windows of two by two, rows and columns, and both from the end."""
    batch, width, height, columns = x.shape
    inside = x.view(batch, width, height // 2, 2, columns // 2, 2).permute(0, 1, 2, 4, 3, 5)
    across = x.transpose(2, 3).reshape(batch, width, columns // 2, 2, height // 2, 2)
    two = torch.stack(
        [inside.reshape(batch, width, -1), across.permute(0, 1, 2, 4, 3, 5).flatten(2)], dim=1
    )
    return torch.cat([two, two.flip(-1)], dim=1)


def _from_windows(y: Tensor) -> Tensor:
    batch, _, width, height, columns = y.shape
    two = y[:, :2].flatten(3) + y[:, 2:].flatten(3).flip(-1)
    inside = two[:, 0].view(batch, width, height // 2, columns // 2, 2, 2)
    across = two[:, 1].view(batch, width, columns // 2, height // 2, 2, 2)
    back = inside.permute(0, 1, 2, 4, 3, 5).reshape(batch, width, height, columns)
    turned = across.permute(0, 1, 2, 4, 3, 5).reshape(batch, width, columns, height)
    return (back + turned.transpose(2, 3)).flatten(2)


class _Mixer(nn.Module):
    """VMamba's, with the scans given."""

    def __init__(self, cross_scan: Any, cross_merge: Any, width: int = 4) -> None:
        super().__init__()
        self.cross_scan, self.cross_merge = cross_scan, cross_merge
        self.rank, self.states = 2, 3
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.x_proj = nn.Parameter(torch.randn(4, self.rank + 2 * self.states, width) / 2)
        self.dt_proj = nn.Parameter(torch.randn(4, width, self.rank) / 2)
        self.bias = nn.Parameter(torch.randn(4 * width))
        self.A_logs = nn.Parameter(torch.rand(4 * width, self.states))
        self.Ds = nn.Parameter(torch.ones(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.conv(x))
        batch, width, height, columns = x.shape
        seqlen = height * columns
        xs = self.cross_scan(x)
        low = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj)
        dt, B, C = torch.split(low, [self.rank, self.states, self.states], dim=2)
        dt = torch.einsum("bkrl,kdr->bkdl", dt, self.dt_proj)
        y = scan.selective_scan_fn(
            xs.reshape(batch, -1, seqlen),
            dt.reshape(batch, -1, seqlen),
            -self.A_logs.exp(),
            B,
            C,
            self.Ds,
            delta_bias=self.bias,
            delta_softplus=True,
        )
        return self.cross_merge(y.view(batch, 4, width, height, columns)).view(x.shape)


class _Pyramid(nn.Module):
    """A stem, a mixer, half of the size, and another mixer: no size is in its code."""

    def __init__(self, *mixers: tuple[Any, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.down = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 2, 2)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 5)
        self.layers = nn.ModuleList(_Mixer(*pair) for pair in mixers)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = self.stem(images)
        for layer in self.layers:
            x = x + layer(x)
            x = self.down(x) if layer is self.layers[0] else x
        return {"logits": self.head(self.norm(x.mean((2, 3)))), "map": x}


class _Sequence(nn.Module):
    """Patches scanned in rows, with something of a fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 4 + 2 * 2)
        self.table = nn.Parameter(torch.randn(1, 24, 4))

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(self.stem(images))
        delta, B, C = (t.transpose(1, 2) for t in self.low(x).split([4, 2, 2], dim=-1))
        y = scan.selective_scan_fn(x.transpose(1, 2), delta, -torch.ones(4, 2), B, C)
        return y.mean(-1)


class _Positions(_Sequence):
    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x) + self.table


class _Numbers(_Sequence):
    def tokens(self, x: Tensor) -> Tensor:
        rows = torch.linspace(0, 1, len(list(range(x.shape[2]))))
        return super().tokens(x + rows[:, None])


class _FixedWalk(_Sequence):
    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x.view(x.shape[0], 4, 4, 6).transpose(2, 3))


def _exported(directory: Path, model: nn.Module, **options: Any) -> Artifact:
    x = torch.randn(1, 3, 16, 24)
    return vssm.export_module(model.eval(), x, directory, dynamic=["height", "width"], **options)


@pytest.fixture(
    scope="module", params=["in torch", pytest.param("by tables", marks=pytest.mark.slow)]
)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Artifact]:
    styles = [(_windows, _from_windows), (_cross_scan, _cross_merge)]
    if request.param == "by tables":
        styles = [(cross.cross_scan_fn, cross.cross_merge_fn)] * 2
    model = _Pyramid(*styles)
    return model, _exported(tmp_path_factory.mktemp("sizes"), model)


@pytest.mark.parametrize("backend", ["kernel", "body"])
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (3, 3, 32, 24), (2, 3, 40, 16)], ids=str)
def test_sizes_that_the_export_never_saw(
    exported: tuple[nn.Module, Artifact], backend: str, shape: tuple[int, ...]
) -> None:
    model, artifact = exported
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with vssm.open_session(artifact, backend=backend) as session:
        found = session.run(x.numpy())
    with torch.no_grad():
        wanted = model(x)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), value, rtol=1e-4, atol=1e-5)


def test_walks_are_orders_that_the_graph_computes(exported: tuple[nn.Module, Artifact]) -> None:
    _, artifact = exported
    graph = onnx.load(str(artifact.model_path)).graph
    found = Counter(node.op_type for node in graph.node)
    assert found["SelectiveScan"] == 2  # one a mixer, of all its walks
    weights = {initializer.name for initializer in graph.initializer}
    scans = [node for node in graph.node if node.op_type == "SelectiveScan"]
    assert not any(node.input[7] in weights or node.input[8] in weights for node in scans)
    assert vssm.check_parity(None, artifact).passed


def test_what_the_file_says_of_its_sizes(exported: tuple[nn.Module, Artifact]) -> None:
    _, artifact = exported
    (spec,) = artifact.manifest.inputs
    assert spec.shape == ("batch", 3, "height", "width")
    assert artifact.image_shape == (3, 16, 24)
    with (
        vssm.open_session(artifact) as session,
        pytest.raises(ValueError, match="height a multiple of 8"),
    ):
        session.run(np.zeros((1, 3, 3, 24), np.float32))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            _Positions,
            r"== 24 at .*self\.table, which holds for height 16, width 24 and not .*resize",
        ),
        (
            _Numbers,
            r"with the height in Python, which makes it 16 for good, at .*rows = .*without dynamic",
        ),
        (
            _FixedWalk,
            r"the height and the width in Python, .* 16 and 24 for good, .*view\(x\.shape\[0",
        ),
    ],
)
def test_what_is_made_of_a_size_is_refused_by_its_line(
    tmp_path: Path, model: type[_Sequence], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        _exported(tmp_path / "out", model(), reference=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["depth"], "only images .* have height and width; say NAME=AXIS"),
        (["batch=2"], "not a name of a size"),
        (["length=0"], "behind the batch are 1 to 3"),
        (["height", "rows=2"], "twice"),
    ],
)
def test_names_of_free_axes(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        free_axes(names, (1, 3, 16, 24))


def test_names_are_refused_before_the_code_is_imported() -> None:
    request = ModuleRequest("nowhere.py:net", read_inputs(["1x3x16x24"]), dynamic=("depth",))
    with pytest.raises(ValueError, match="dynamic='depth'"):
        dry_run_user_module(request)


def test_steps_of_free_axes() -> None:
    sizes = {224: 32, 64: 32, 48: 16, 40: 8, 12: 4, 4: 2, 7: 1, 1: 1}
    assert {size: FreeAxis("height", 2, size).step for size in sizes} == sizes


def test_a_file_that_fixed_a_size_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(_Sequence):
        """Changes once it was traced, as what a trace cannot see would."""

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * scale

    scale = 1.0
    saved = export.save_model

    def save(*args: Any, **kwargs: Any) -> None:
        nonlocal scale
        saved(*args, **kwargs)
        scale = 2.0

    monkeypatch.setattr(export, "save_model", save)
    with pytest.raises(UnsupportedError, match=r"at height 16, width 24 .* differs in logits by"):
        _exported(tmp_path / "out", Late(), reference=False)
    assert not (tmp_path / "out").exists()
