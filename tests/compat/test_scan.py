"""Upstream's scan functions: the reference's numbers, every layout, and what is refused."""

from __future__ import annotations

import pytest
import torch
from official_data import fixture
from torch import Tensor
from torch.nn import functional

from vssm.compat.packages import scan
from vssm.errors import UnsupportedError
from vssm.ops.record import record_backends

CASES = [str(name) for name in fixture("selective_scan_ref")["cases"]]
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def _case(name: str) -> tuple[dict[str, Tensor], bool, Tensor, Tensor]:
    arrays = fixture("selective_scan_ref")
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    given = {
        n: torch.from_numpy(arrays[f"{name}/{n}"]).double()
        for n in names
        if f"{name}/{n}" in arrays
    }
    softplus = bool(arrays[f"{name}/delta_softplus"])
    out, state = (torch.from_numpy(arrays[f"{name}/{n}"]).double() for n in ("out", "last_state"))
    return given, softplus, out, state


@pytest.mark.parametrize("name", CASES)
def test_selective_scan_fn_gives_the_reference(name: str) -> None:
    given, softplus, out, state = _case(name)
    if given["B"].dim() == 2 or given["C"].dim() == 2:
        with pytest.raises(UnsupportedError, match="for all tokens"):
            scan.selective_scan_fn(**given, delta_softplus=softplus)
        return
    got = scan.selective_scan_fn(**given, delta_softplus=softplus)
    torch.testing.assert_close(got, out, rtol=1e-5, atol=1e-5)
    got, last = scan.selective_scan_fn(**given, delta_softplus=softplus, return_last_state=True)
    torch.testing.assert_close(got, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-5, atol=1e-5)


def _by_hand(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The recurrence of (batch, d, l), B and C (batch, groups, n, l); delta is the step."""
    width = u.shape[1] // B.shape[1]
    B, C = (x.repeat_interleave(width, dim=1) for x in (B, C))
    state = u.new_zeros(*u.shape[:2], A.shape[1])
    rows = []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[..., t] * u[:, :, t, None]
        rows.append((state * C[..., t]).sum(-1))
    return torch.stack(rows, dim=-1) + D[:, None] * u


def _operands(groups: int, *, width: int = 3, seqlen: int = 7) -> dict[str, Tensor]:
    channels = groups * width
    return {
        "u": torch.randn(2, channels, seqlen).double(),
        "delta": torch.randn(2, channels, seqlen).double(),
        "A": -torch.rand(channels, 2).double(),
        "B": torch.randn(2, groups, 2, seqlen).double(),
        "C": torch.randn(2, groups, 2, seqlen).double(),
        "D": torch.randn(channels).double(),
        "delta_bias": torch.randn(channels).double(),
    }


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_are_consecutive_channels(groups: int) -> None:
    o = _operands(groups)
    step = functional.softplus(o["delta"] + o["delta_bias"][:, None])
    want = _by_hand(o["u"], step, o["A"], o["B"], o["C"], o["D"])
    torch.testing.assert_close(scan.selective_scan_fn(**o, delta_softplus=True), want, **EXACT)


def test_a_row_that_is_expanded_to_groups_is_one_node() -> None:
    o = _operands(4)
    rows = {name: o[name][:, :1].expand(-1, 4, -1, -1) for name in ("B", "C")}
    want = scan.selective_scan_fn(**{**o, **{k: x.contiguous() for k, x in rows.items()}})
    with record_backends() as ran:
        got, _ = scan.selective_scan_fn(**{**o, **rows}, return_last_state=True)
    assert sum(ran.values()) == 1
    torch.testing.assert_close(got, want, **EXACT)


def test_last_state_without_softplus() -> None:
    o = _operands(2)
    _, state = scan.selective_scan_fn(**o, return_last_state=True)
    step = o["delta"] + o["delta_bias"][:, None]
    B = o["B"].repeat_interleave(3, dim=1)
    want = o["u"].new_zeros(2, 6, 2)
    for t in range(7):
        size = step[:, :, t, None]
        want = torch.exp(size * o["A"]) * want + size * B[..., t] * o["u"][:, :, t, None]
    torch.testing.assert_close(state, want, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_result_has_the_dtype_of_u(dtype: torch.dtype) -> None:
    o = {
        k: v.to(dtype if k in {"u", "delta", "B", "C"} else torch.float32)
        for k, v in _operands(1).items()
    }
    assert scan.selective_scan_fn(**o).dtype == dtype


def test_tokens_first() -> None:
    o = _operands(1)
    step = functional.softplus(o["delta"])
    want = _by_hand(o["u"], step, o["A"], o["B"], o["C"], o["D"])
    got = scan.selective_scan_tokens(
        o["u"].transpose(1, 2),
        step.transpose(1, 2),
        o["A"],
        o["B"][:, 0].transpose(1, 2),
        o["C"][:, 0].transpose(1, 2),
        o["D"],
    )
    torch.testing.assert_close(got.transpose(1, 2), want, **EXACT)


def test_complex_and_odd_operands_are_refused() -> None:
    o = _operands(2)
    with pytest.raises(UnsupportedError, match="complex"):
        scan.selective_scan_fn(**{**o, "A": o["A"].to(torch.complex128)})
    with pytest.raises(ValueError, match="5 axes"):
        scan.selective_scan_fn(**{**o, "B": o["B"][None]})
    with pytest.raises(ValueError, match="4 groups for 6"):
        scan.selective_scan_fn(**{**o, "B": o["B"].repeat(1, 2, 1, 1)})
