"""What surrounds a scan in the user's code: autocast, gradient modes, branches, loops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

import vssm
from vssm.compat.packages import scan
from vssm.errors import UnsupportedError

Body = Callable[[Tensor], Tensor]
Step = Callable[[Body, Tensor], Tensor]


def _under(region: Callable[[], Any]) -> Callable[[Body, Tensor], Tensor]:
    def forward(body: Body, x: Tensor) -> Tensor:
        with region():
            return body(x)

    return forward


def _one_in_one_out(body: Body, x: Tensor) -> Tensor:
    y = body(x)
    with torch.autocast("cpu", enabled=False):
        return y + body(y)


def _nested(body: Body, x: Tensor) -> Tensor:
    with torch.autocast("cuda", enabled=False):
        y = body(x)
        with torch.enable_grad():
            z = body(y)
        return y, z * 2


def _one_after_another(*steps: Step) -> Step:
    """Several at once, as an export takes seconds."""

    def forward(body: Body, x: Tensor) -> Tensor:
        for step in steps:
            x = step(body, x)
        return x

    return forward


class _Scan(nn.Module):
    """A projection and a scan: whole mixers make a trace of six of them take seconds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low = nn.Linear(12, 4)
        self.A = nn.Parameter(-torch.rand(12, 2) - 0.1)

    def forward(self, x: Tensor) -> Tensor:
        B, C = self.low(x).transpose(1, 2).split([2, 2], dim=1)
        u = x.transpose(1, 2)
        y = scan.selective_scan_fn(u, u, self.A, B, C, delta_softplus=True)
        return y.transpose(1, 2).tanh()  # of one size, however many follow each other


class _Model(nn.Module):
    def __init__(self, forward: Callable[[Body, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.around, self.head = _Scan(), forward, nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = self.around(self.body, x)
        y = found if isinstance(found, Tensor) else found[0] + found[1]
        return self.head(y.mean(1))


def _deprecated() -> Any:
    return torch.cuda.amp.autocast(enabled=False)


@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast.*:FutureWarning")
@pytest.mark.parametrize(
    ("forward", "scans"),
    [
        (
            _one_after_another(
                _under(lambda: torch.autocast("cpu", enabled=False)),
                _under(_deprecated),
                _under(lambda: torch.set_grad_enabled(True)),
                _under(torch.no_grad),
                _under(torch.inference_mode),
                lambda body, x: checkpoint(body, x, use_reentrant=False),
            ),
            6,
        ),
        (_one_in_one_out, 2),
        (_nested, 2),
        (
            lambda body, x: torch.cond(
                x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (body(x),)
            ),
            1,
        ),
    ],
    ids=[
        *("one after another", "one in, one out", "nested", "a branch behind it"),
    ],
)
def test_regions_that_change_nothing_are_opened(tmp_path, forward, scans) -> None:
    model = _Model(forward).eval()
    artifact = vssm.export_module(model, torch.randn(2, 9, 12), tmp_path / "out")
    graph = onnx.load(str(artifact.model_path)).graph
    found = Counter(node.op_type for node in graph.node if node.domain == "vssm")
    assert sum(number for name, number in found.items() if "Scan" in name) == scans
    assert artifact.manifest.config["reference"] == "float64"
    report = vssm.check_parity(None, artifact)
    assert report.passed, report.failures


def _loop(body: Body, x: Tensor) -> Tensor:
    start = torch.zeros((), dtype=torch.int64)
    return while_loop(lambda i, _: i < 2, lambda i, y: (i + 1, body(y)), (start, x))[1]


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            _under(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
            r"computes under torch.autocast in torch.bfloat16 at .*test_regions.py:\d+, but the",
        ),
        (
            lambda body, x: torch.cond(
                x.sum() > 0, lambda y: 3 * body(y), lambda y: 2 * body(y), (x,)
            ),
            r"a selective scan is inside torch's cond",
        ),
        # As of cond: by the name that torch has for it.
        pytest.param(
            lambda body, x: map_rows(lambda y: body(y[None])[0], x),
            r"inside torch's map",
            marks=pytest.mark.slow,
        ),
        pytest.param(_loop, r"inside torch's while_loop", marks=pytest.mark.slow),
    ],
    ids=["autocast", "cond", "map", "while"],
)
def test_other_regions_are_refused_by_name(tmp_path, forward, message) -> None:
    model = _Model(forward).eval()
    with pytest.raises(UnsupportedError, match=message):
        vssm.export_module(model, torch.randn(2, 9, 12), tmp_path / "out", reference=False)


def test_a_cast_that_a_try_hides_is_refused(tmp_path) -> None:
    """Where the first look is caught by the module's own code, the trace still shows it."""

    def forward(body: Body, x: Tensor) -> Tensor:
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = x @ torch.eye(12)
        except UnsupportedError:
            x = x.float()
        return body(x.float())

    with pytest.raises(UnsupportedError, match=r"computes under torch.autocast in torch.bfloat16"):
        vssm.export_module(
            _Model(forward).eval(), torch.randn(2, 9, 12), tmp_path / "out", reference=False
        )
