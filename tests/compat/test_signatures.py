"""Scans in a repository's own files: known by what they take and compute, or as the user says."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from compat_cases import MinimalLike
from torch import Tensor
from torch.nn import functional

from vssm.compat import upstream
from vssm.compat.packages import scan
from vssm.compat.packages.signatures import Signature
from vssm.errors import UnsupportedError
from vssm.ops.record import record_backends

REFERENCE = """
import torch
from torch.nn import functional

def {name}(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = functional.softplus(delta) if delta_softplus else delta
    state, rows = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp({decay}) * state + step * B[:, None, :, t] * u[:, :, t, None]
        rows.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(rows, -1)
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * functional.silu(z)
"""
KERNELS = """
import torch
import selective_scan_cuda_core_of_their_own as kernel

class Nrows(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, nrows=1):
        return kernel.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows)[0]

class States(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, D=None, delta_bias=None, delta_softplus=False, lag=0):
        return kernel.fwd(u, delta, A, B, D, delta_bias, delta_softplus, 1, True)[0]

class Fake(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, nrows=1):
        return u

class Other(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x

def combined(x, dt, A, B, C, chunk_size):
    return kernel.fwd(x, dt, A, B, C, chunk_size)
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Writes a module and imports it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> ModuleType:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.relative_to(tmp_path).parents:
            (tmp_path / parent / "__init__.py").touch()
        path.write_text(text)
        return importlib.import_module(name)

    yield write
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def _operands(groups: int = 1) -> dict[str, Any]:
    torch.manual_seed(0)
    rows = (2, 2, 5) if groups == 1 else (2, groups, 2, 5)
    return {
        "u": torch.randn(2, 4, 5),
        "delta": torch.randn(2, 4, 5),
        "A": -torch.rand(4, 2),
        "B": torch.randn(rows),
        "C": torch.randn(rows),
        "D": torch.randn(4),
        "delta_bias": torch.randn(4),
        "delta_softplus": True,
    }


def test_copy_that_computes_the_scan_is_ours(load: Callable[..., ModuleType]) -> None:
    text = REFERENCE.format(name="their_scan", decay="step * A")
    with upstream() as report:
        module = load("copied_whole", text)
    assert "copied_whole.their_scan" in report.patched
    o = _operands()
    torch.testing.assert_close(module.their_scan(**o), scan.selective_scan_fn(**o))
    with upstream() as report:
        found = module.their_scan
    # What was imported inside for the first time never had another, and keeps ours.
    assert found is module.their_scan


def test_what_computes_something_else_is_left(load: Callable[..., ModuleType]) -> None:
    text = REFERENCE.format(name="selective_scan_fn", decay="2 * step * A")
    o = _operands()
    with upstream() as report:
        module = load("copied_changed", text)
        found = module.selective_scan_fn(**o)
    note = "copied_changed.selective_scan_fn does not compute a scan: left as it is"
    assert note in report.notes
    assert not torch.allclose(found, scan.selective_scan_fn(**o))


def test_wrappers_of_compiled_kernels_are_known_by_their_parameters(
    load: Callable[..., ModuleType],
) -> None:
    with upstream() as report:
        module = load("kernels", KERNELS)
        patched = [name.partition(".")[2] for name in report.patched if name.startswith("kernels")]
        assert patched == ["Nrows.apply", "States.apply", "Fake.apply", "combined"]
        o = _operands(groups=2)
        assert torch.equal(module.Fake.apply(*o.values()), o["u"])
    assert "kernels.Fake does not compute a scan: left as it is" in report.notes
    positional = [o[n] for n in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    want = scan.selective_scan_fn(**o)
    torch.testing.assert_close(module.Nrows.apply(*positional, True, 4), want)
    assert module.Other.apply(torch.ones(2), None).tolist() == [1, 1]


def test_scan_without_c_gives_its_states(load: Callable[..., ModuleType]) -> None:
    with upstream():
        states = load("kernels_of_states", KERNELS).States.apply
    o = _operands()
    y = states(o["u"], o["delta"], o["A"], o["B"], None, o["delta_bias"], True)
    assert y.shape == (2, 4, 2, 5)
    _, last = scan.selective_scan_fn(**{**o, "D": None}, return_last_state=True)
    torch.testing.assert_close(y[..., -1], last)
    with pytest.raises(UnsupportedError, match=r"without C gives its states, .*\['D'\]"):
        states(o["u"], o["delta"], o["A"], o["B"], o["D"])


class _Own(torch.nn.Module):
    """Methods in mamba-minimal's style: one is a scan, one is called like it."""

    def forward(self, x: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        A = -torch.ones(4, 2)
        return self.scan(x, x.abs(), A, B, B), self.scan_wrong(x, x.abs(), A, B, B)

    def scan(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        state, rows = x.new_zeros(x.shape[0], x.shape[2], A.shape[1]), []
        for t in range(x.shape[1]):
            step = dt[:, t, :, None]
            state = torch.exp(step * A) * state + step * B[:, t, None] * x[:, t, :, None]
            rows.append((state * C[:, t, None]).sum(-1))
        return torch.stack(rows, 1)

    def scan_wrong(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return x


def test_method_proves_itself_in_its_first_call() -> None:
    module, x, B = _Own(), torch.randn(2, 5, 4), torch.randn(2, 5, 2)
    want = module(x, B)
    with upstream() as report:
        first, then = module(x, B), module(x, B)
    for found in (first, then):
        torch.testing.assert_close(found, want)
    place = f"{__name__}._Own"
    assert f"{place}.scan computes our scan" in report.notes
    assert f"{place}.scan_wrong does not compute a scan: left as it is" in report.notes


class _Turning(torch.nn.Module):
    """One method for both directions: by a parameter of its own, or as its object is made."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        self.back = back

    def scan(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, reverse: bool = False
    ) -> Tensor:
        turn = reverse != self.back
        operands = [t.flip(1) if turn else t for t in (x, dt, B, C)]
        y = _Own().scan(*operands[:2], A, *operands[2:])
        return y.flip(1) if turn else y


def test_a_scan_that_is_only_tried_is_none_of_the_model() -> None:
    module, x, B = _Own(), torch.randn(2, 5, 4), torch.randn(2, 5, 2)
    with upstream(), record_backends() as ran:
        module.scan_wrong(x, x.abs(), -torch.ones(4, 2), B, B)
        assert not ran
        module.scan(x, x.abs(), -torch.ones(4, 2), B, B)
    assert sum(ran.values()) == 1


def test_directions_of_one_method_are_judged_apart() -> None:
    ahead, back = _Turning(False), _Turning(True)
    x, A, B = torch.randn(2, 5, 4), -torch.ones(4, 2), torch.randn(2, 5, 2)
    calls = [(module, turn) for module in (ahead, back) for turn in (False, True)]

    def run() -> list[Tensor]:
        return [m.scan(x, x.abs(), A, B, B, reverse=turn) for m, turn in calls]

    want = run()
    with upstream() as report:
        first, then = run(), run()
    for found in (first, then):
        torch.testing.assert_close(found, want)
    assert f"{__name__}._Turning.scan computes our scan" in report.notes
    assert not [note for note in report.notes if note.endswith("left as it is")]


def test_scan_with_a_choice_of_algorithms_is_ours_in_each(
    load: Callable[..., ModuleType],
) -> None:
    text = REFERENCE.format(name="two_ways", decay="step * A").replace(
        "=False):", "=False, way=1):"
    )
    with upstream() as report:
        module = load("with_a_mode", text)
        o = _operands()
        for way in (1, "fast"):
            for _ in range(2):
                torch.testing.assert_close(
                    module.two_ways(**o, way=way), scan.selective_scan_fn(**o)
                )
    assert "with_a_mode.two_ways computes our scan" in report.notes


def test_named_scan_is_replaced(load: Callable[..., ModuleType]) -> None:
    own = vars(MinimalLike)["selective_scan"]
    text = "def go(q, step, decay, k, r, skip):\n    raise RuntimeError\n"
    o = _operands()
    with upstream(scans={"named_one:go": "tokens:u,delta,A,B,C,D"}) as report:
        module = load("named_one", text)
        turned = [o[n].transpose(1, 2) for n in ("u", "delta", "B", "C")]
        y = module.go(turned[0], turned[1].abs(), o["A"], *turned[2:], o["D"])
    assert "named_one.go" in report.patched
    plain = {k: o[k] for k in ("u", "A", "B", "C", "D")}
    want = scan.selective_scan_fn(delta=o["delta"].abs(), **plain)
    torch.testing.assert_close(y.transpose(1, 2), want)
    method = {f"{MinimalLike.__module__}:MinimalLike.selective_scan": "tokens"}
    with upstream(scans=method) as report:
        assert f"{MinimalLike.__module__}.MinimalLike.selective_scan" in report.patched
    with (
        pytest.raises(ValueError, match="no module of that name"),
        upstream(scans={"a.b:c": "tokens"}),
    ):
        pass
    gone = {"named_one:gone": "tokens"}
    with pytest.raises(ValueError, match="defines no such function"), upstream(scans=gone):
        pass
    # What was replaced before that was found out is put back too.
    assert vars(MinimalLike)["selective_scan"] is own


@pytest.mark.parametrize("text", ["rows", "tokens:u,delta,A", "tokens:u,delta,A,B,C,E"])
def test_signatures_are_checked(text: str) -> None:
    with pytest.raises(ValueError, match="is not LAYOUT or LAYOUT:NAME"):
        Signature.parse(text)


def test_package_carried_inside_another_gets_our_functions(load: Callable[..., ModuleType]) -> None:
    load("own_copy.mamba_ssm.ops.selective_scan_interface", "def selective_scan_fn():\n    pass\n")
    for name in [n for n in sys.modules if n.startswith("own_copy")]:
        del sys.modules[name]
    with upstream() as report:
        user = load(
            "vendoring",
            "from own_copy.mamba_ssm.ops.selective_scan_interface import selective_scan_fn as f\n",
        )
        local = load("layers.causal_conv1d", "def mine():\n    return 1\n")  # merely called so
    assert user.f is scan.selective_scan_fn
    assert local.mine() == 1
    assert "own_copy.mamba_ssm.ops.selective_scan_interface" in report.provided


HELD = """
import functools
import torch

def _loop(u, delta, A, B, C, D=None):
    state, rows = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for step, x, b, c in zip(*(t.unbind(-1) for t in (delta, u, B, C))):
        state = torch.exp(step[..., None] * A) * state + (step * x)[..., None] * b[:, None]
        rows.append((state @ c[..., None]).squeeze(-1))
    y = torch.stack(rows, -1)
    return y if D is None else y + D[:, None] * u

class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D):
        return _loop(u, delta, A, B, C, D)

class New(torch.autograd.Function):
    @staticmethod
    def forward(u, delta, A, B, C, D):
        return _loop(u, delta, A, B, C, D)
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

def _through(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)
    return call

@_through
def decorated(u, delta, A, B, C, D):
    return _loop(u, delta, A, B, C, D)

@torch.jit.script
def scripted(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
             C: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    rows = torch.jit.annotate(list[torch.Tensor], [])
    state = torch.zeros(u.shape[0], u.shape[1], A.shape[1])
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * u[:, :, t, None] * B[:, None, :, t]
        rows.append((state * C[:, None, :, t]).sum(-1))
    return torch.stack(rows, -1) + D[:, None] * u

@torch.compile(fullgraph=True)
def compiled(u, delta, A, B, C, D):
    return _loop(u, delta, A, B, C, D)

old, new = Old.apply, New.apply
part = functools.partial(decorated)
TABLE = {"scripted": scripted, "compiled": compiled}

def by_default(*operands, scan=_loop):
    return scan(*operands)

def partly(u, delta, A, B, C, D):
    return functools.partial(_loop, D=D)(u, delta, A, B, C)
"""


def test_scans_are_ours_wherever_they_are_held(load: Callable[..., ModuleType]) -> None:
    o = _operands()
    o["delta"] = functional.softplus(o["delta"])
    row = [o[name] for name in ("u", "delta", "A", "B", "C", "D")]
    want = scan.selective_scan_fn(*row)
    with upstream():
        module = load("held", HELD)
        held = [module.old, module.new, module.part, *module.TABLE.values()]
        for call in (*held, module.by_default, module.partly, module.Old.apply):
            for _ in range(2):  # the first call may judge
                with record_backends() as ran:
                    torch.testing.assert_close(call(*row), want)
                assert sum(ran.values()) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_function_that_was_there_before_is_itself_again(load: Callable[..., ModuleType]) -> None:
    module = load("held_before", HELD)
    o = _operands()
    row = [o[name] for name in ("u", "delta", "A", "B", "C", "D")]
    want = [call(*row) for call in (module._loop, module.old, module.new)]
    compiled = dict(torch._dynamo.utils.counters["frames"])
    with upstream(), record_backends() as ran:
        for call in (module._loop, module.old, module.new, module.compiled):
            call(*row)
    assert sum(ran.values()) == 4
    assert torch._dynamo.utils.counters["frames"] == compiled
    with record_backends() as ran:
        for call, before in zip((module._loop, module.old, module.new), want, strict=True):
            assert torch.equal(call(*row), before)
    assert not ran


# A loop over operands of some layout; `body` says what is done with the step sizes and A.
WAY = """
import torch
from torch.nn import functional

def scan({parameters}):
    {body}
    steps = range(x.shape[{dim}])
    state, rows = 0, [None] * len(steps)
    for t in {steps}:
        step, b, c, u = (v.select({dim}, t) for v in (dt, B, C, x))
        state = torch.exp(step[..., None] * A) * state + (step * u)[..., None] * b[..., None, :]
        rows[t] = (state * c[..., None, :]).sum(-1)
    return {result}
"""
TOKENS = {
    "parameters": "x, dt, A, B, C, D",
    "body": "pass",
    "dim": 1,
    "steps": "steps",
    "result": "torch.stack(rows, 1) + D * x",
}
WAYS = {
    "tokens": {},
    "the kernel's names": {"parameters": "u, delta, A, B, C, D", "body": "x, dt = u, delta"},
    "another order": {"parameters": "x, A, B, C, D, dt"},
    "softplus inside": {"body": "dt = functional.softplus(dt)"},
    "a logarithm": {"parameters": "x, dt, A_log, B, C, D", "body": "A = -torch.exp(A_log)"},
    "from the end": {"steps": "reversed(steps)"},
    "the state too": {"result": "(torch.stack(rows, 1) + D * x, state)"},
    "all of it": {
        "parameters": "us, dts, As, Bs, Cs, Ds",
        "body": "x, dt, A, B, C, D = us, functional.softplus(dts), -As.exp(), Bs, Cs, Ds",
        "steps": "reversed(steps)",
        "result": "(torch.stack(rows, 1) + D * x, state)",
    },
    "heads": {"dim": 2, "result": "torch.stack(rows, 2) + D[:, None] * x"},
    "heads behind the sequence": {},
    "steps of heads": {"body": "dt, A = dt[..., None], A[:, None, None]"},
    # As Mamba-2 by chunks has it: x holds the steps already, and A is the decay of each.
    "no steps": {
        "parameters": "x, A, B, C, block_len",
        "body": "dt, A, x = A[..., None], 1, x / A[..., None]",
        "result": "(torch.stack(rows, 1), state)",
    },
}


def _of_way(way: str) -> dict[str, Tensor | int]:
    torch.manual_seed(0)
    heads = (3,) if "heads" in way or way == "no steps" else ()
    lengths = (*heads, 5) if way == "heads" else (5, *heads)
    x, dt = torch.randn(2, *lengths, 4), torch.rand(2, *lengths, 4)
    B, C = torch.randn(2, 2, *lengths, 2)
    A, D = -torch.rand(*heads, 4, 2), torch.randn(*heads, 4)
    if way == "steps of heads":
        dt, A = dt[..., 0], A[:, 0, 0]
    if way == "no steps":
        A = -dt[..., 0]
    given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "A_log": A, "u": x, "delta": dt}
    return {
        **given,
        **{f"{name}s": given[name] for name in ("u", "dt", "A", "B", "C", "D")},
        "block_len": 5,
    }


@pytest.mark.parametrize("way", WAYS)
def test_the_way_of_a_scan_is_found_out(load: Callable[..., ModuleType], way: str) -> None:
    module = load(f"way_{list(WAYS).index(way)}", WAY.format(**{**TOKENS, **WAYS[way]}))
    operands = {name: _of_way(way)[name] for name in inspect.signature(module.scan).parameters}
    want = module.scan(**operands)
    with upstream() as report:
        for _ in range(2):
            with record_backends() as ran:
                torch.testing.assert_close(module.scan(**operands), want)
            assert ran
    assert f"{module.__name__}.scan computes our scan" in report.notes


class _Recurrence(torch.nn.Module):
    """A scan that is a module, and methods without an object."""

    def forward(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return _Own().scan_wrong(x, dt, A, B, C) + self.ssm(x, A, B, C, dt)

    @staticmethod
    def ssm(x: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> Tensor:
        state, rows = 0, []
        for t in range(x.shape[1]):
            step = dt[:, t, :, None]
            state = torch.exp(step * A) * state + step * B[:, t, None] * x[:, t, :, None]
            rows.append((state * C[:, t, None]).sum(-1))
        return torch.stack(rows, 1)


def test_methods_of_any_name_are_looked_at() -> None:
    x, A, B = torch.randn(2, 5, 4), -torch.ones(4, 2), torch.randn(2, 5, 2)
    module = _Recurrence()
    want = module(x, x.abs(), A, B, B)
    with upstream() as report, record_backends() as ran:
        torch.testing.assert_close(module(x, x.abs(), A, B, B), want)
    assert sum(ran.values()) == 1
    place = f"{__name__}._Recurrence"
    assert f"{place}.ssm computes our scan" in report.notes
    assert f"{place}.forward does not compute a scan: left as it is" in report.notes
