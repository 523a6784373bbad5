"""The reference of an export: float64, whatever the module says of its dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from compat_cases import SlowPath, built
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import vssm
from vssm.compat.exact import FLOAT64, FLOAT64_SCANS, _apart, exact_outputs
from vssm.compat.outputs import module_outputs
from vssm.compat.packages import scan
from vssm.errors import UnsupportedError
from vssm.parity.compare import TOLERANCES

X = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))


class _Around(nn.Module):
    """A scan between what a user's wrapper does with dtypes."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]):
        super().__init__()
        self.body, self.before, self.after = built(SlowPath), before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(self.before(x)))


def _asserts(y: Tensor) -> Tensor:
    assert y.dtype == torch.float
    return y


def _branches(y: Tensor) -> Tensor:
    return y.float() if y.dtype != torch.float32 else y + torch.ones(12, dtype=torch.float32)


def _writes(y: Tensor) -> Tensor:
    out = torch.zeros_like(y, dtype=torch.float32)
    out[:, 1:] = y[:, :-1]
    out[:, 0].add_(y.new_ones(12, dtype=y.dtype))
    return out.to(torch.float32).type(torch.float32).type_as(y)


def _same(y: Tensor) -> Tensor:
    return y


def _exact(model: nn.Module) -> tuple[Tensor, str]:
    found = exact_outputs(model.eval(), X, module_outputs())
    return found.outputs["logits"], found.precision


def _by_hand(check: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """What the check does, in any dtype."""
    if check is _branches:
        return y + 1
    if check is _writes:
        return torch.cat([torch.ones_like(y[:, :1]), y[:, :-1]], 1)
    return y


@pytest.mark.parametrize("check", [_asserts, _branches, _writes, _same])
def test_checks_of_the_user_do_not_stop_float64(check, monkeypatch) -> None:
    model = _Around(check, check)
    got, precision = _exact(model)
    monkeypatch.setattr(Tensor, "float", lambda y: y)  # upstream makes its A by it
    body = copy.deepcopy(model.body).double()
    with torch.inference_mode():
        wanted = _by_hand(check, body(_by_hand(check, X.double())))
    assert precision == FLOAT64
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_was_computed_from_parameters_is_copied_too() -> None:
    model = _Around(_same, _same)
    want, _ = _exact(model)
    model.body.in_proj = nn.utils.weight_norm(model.body.in_proj)
    got, precision = _exact(model)
    assert precision == FLOAT64
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # g / norm(v) * v, in float32


def test_scans_of_streams_in_half_precision_are_exact_too() -> None:
    def scans(x: Tensor) -> Tensor:
        u, rows = x.transpose(1, 2).half(), x[:, :, :2].transpose(1, 2).half()
        y = scan.selective_scan_fn(u, u, -torch.ones(12, 2), rows, rows, delta_softplus=True)
        return y.float()

    got, precision = _exact(_Around(_same, scans))
    assert precision == FLOAT64_SCANS
    assert bool(got.isfinite().all())


def test_a_module_in_training_mode_is_run_in_eval_mode() -> None:
    model = _Around(nn.Dropout(0.5), _same).train()
    first, again = (exact_outputs(model, X, module_outputs()).outputs["logits"] for _ in range(2))
    assert torch.equal(first, again)
    assert model.before.training


def test_the_module_stays_as_it_is() -> None:
    model = _Around(_asserts, _asserts).eval()
    before = copy.deepcopy(model.state_dict())
    _exact(model)
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[key])


def test_the_rest_in_float32_and_the_scans_in_float64(tmp_path) -> None:
    """What reads memory cannot be fed a float64 that calls itself float32."""

    def reads_memory(y: Tensor) -> Tensor:
        if not isinstance(y, FakeTensor):  # not in the trace
            y.numpy()
        return y

    model = _Around(_same, reads_memory)
    got, precision = _exact(model)
    assert (got.dtype, precision) == (torch.float32, FLOAT64_SCANS)
    exact, _ = _exact(_Around(_same, _same))
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
    artifact = vssm.export_module(model, X, tmp_path / "out")
    assert artifact.manifest.config["reference"] == FLOAT64_SCANS
    assert vssm.check_parity(None, artifact).passed


def test_another_function_in_float64_is_refused() -> None:
    def draws(y: Tensor) -> Tensor:
        return y + torch.randn_like(y)

    with pytest.raises(UnsupportedError, match=r"output logits differs between float32 and"):
        _exact(_Around(_same, draws))


def test_a_wrapper_that_asserts_exports(tmp_path) -> None:
    artifact = vssm.export_module(_Around(_asserts, _asserts).eval(), X, tmp_path / "out")
    assert artifact.manifest.config["reference"] == FLOAT64
    assert vssm.check_parity(None, artifact).passed


def test_an_exact_output_of_zeros_does_not_excuse_another() -> None:
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    assert _apart(torch.zeros(2, 3), zeros) == 0
    assert _apart(torch.full((2, 3), 0.5), zeros) == 0.5
    assert _apart(torch.zeros(0), torch.zeros(0, dtype=torch.float64)) == 0


def test_a_module_that_magnifies_rounding_is_allowed_what_torch_is_off(tmp_path) -> None:
    """Its digits are lost in float32 as such: the file is held to twice what PyTorch is off."""

    def cancels(y: Tensor) -> Tensor:
        return (y + 1000) - 1000

    artifact = vssm.export_module(_Around(_same, cancels).eval(), X, tmp_path / "out")
    rounding = artifact.manifest.config["rounding"]
    assert 2e-5 < rounding < 1e-3
    report = vssm.check_parity(None, artifact)
    assert report.passed
    assert 2e-5 < report.forced.relative <= report.forced.tolerance == 2 * rounding
    table = TOLERANCES["float32"]
    assert table.of_module(None) == table.of_module(1e-6) == table
