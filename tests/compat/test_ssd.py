"""Mamba-2 over our scans: against a loop over heads, and against its parts in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compat_cases import Mamba2Like, built
from torch import Tensor, nn
from torch.nn import functional

import vssm
from vssm.compat.packages import norms, ssd
from vssm.compat.packages.blocks import causal_conv1d_fn
from vssm.errors import UnsupportedError

EXACT = {"rtol": 1e-10, "atol": 1e-12}
NHEADS, HEADDIM, STATES, SEQLEN = 6, 3, 4, 7


def _by_hand(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Mamba-2 by its definition, head by head: y of ready step sizes, and the last states."""
    batch, seqlen, nheads, headdim = x.shape
    share = nheads // B.shape[2]
    rows, last = [], []
    for b in range(batch):
        for h in range(nheads):
            state = x.new_zeros(headdim, B.shape[3])
            for t in range(seqlen):
                outer = torch.outer(x[b, t, h], B[b, t, h // share])
                state = torch.exp(step[b, t, h] * A[h]) * state + step[b, t, h] * outer
                rows.append(state @ C[b, t, h // share])
            last.append(state)
    y = torch.stack(rows).view(batch, nheads, seqlen, headdim).transpose(1, 2)
    return y, torch.stack(last).view(batch, nheads, headdim, -1)


def _operands(groups: int = 2) -> dict[str, Any]:
    return {
        "x": torch.randn(2, SEQLEN, NHEADS, HEADDIM).double(),
        "dt": torch.randn(2, SEQLEN, NHEADS).double(),
        "A": -torch.rand(NHEADS).double(),
        "B": torch.randn(2, SEQLEN, groups, STATES).double(),
        "C": torch.randn(2, SEQLEN, groups, STATES).double(),
        "chunk_size": 4,
    }


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_consecutive_heads_share_a_group(groups: int) -> None:
    o = _operands(groups)
    bias, D = torch.randn(NHEADS).double(), torch.randn(NHEADS).double()
    step = functional.softplus(o["dt"] + bias)
    want, _ = _by_hand(o["x"], step, o["A"], o["B"], o["C"])
    want = want + D[:, None] * o["x"]
    got = ssd.mamba_chunk_scan_combined(**o, D=D, dt_bias=bias, dt_softplus=True)
    torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.3, 1.1)])
@pytest.mark.parametrize("softplus", [False, True])
def test_every_argument(gated: bool, limit: tuple[float, float], softplus: bool) -> None:
    o = _operands()
    bias, D = torch.randn(NHEADS).double(), torch.randn(NHEADS, HEADDIM).double()
    z = torch.randn_like(o["x"]) if gated else None
    raw = o["dt"] + bias
    # Upstream clamps with and without softplus, so that no step is negative.
    step = (functional.softplus(raw) if softplus else raw).clamp(*limit)
    want, states = _by_hand(o["x"], step, o["A"], o["B"], o["C"])
    want = want + D * o["x"]
    want = want * functional.silu(z) if z is not None else want
    options: dict[str, Any] = {"D": D, "z": z, "dt_bias": bias, "state_dtype": torch.bfloat16}
    options |= {"dt_softplus": softplus, "dt_limit": limit}
    torch.testing.assert_close(ssd.mamba_chunk_scan_combined(**o, **options), want, **EXACT)
    y, last = ssd.mamba_chunk_scan_combined(**o, **options, return_final_states=True)
    torch.testing.assert_close(y, want, **EXACT)
    torch.testing.assert_close(last, states, **EXACT)


def test_gradients() -> None:
    o = _operands()
    leaves = [o[n].requires_grad_() for n in ("x", "dt", "A", "B", "C")]
    y = ssd.mamba_chunk_scan_combined(**o, dt_softplus=True)
    want, _ = _by_hand(o["x"], functional.softplus(o["dt"]), o["A"], o["B"], o["C"])
    weight = torch.randn_like(want)
    pairs = zip(
        torch.autograd.grad((y * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        strict=True,
    )
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, **EXACT)


def test_half_precision_keeps_the_digits_of_its_steps() -> None:
    o = {k: v.float() if isinstance(v, Tensor) else v for k, v in _operands().items()}
    half = {**o, **{name: o[name].half() for name in ("x", "B", "C")}}
    got = ssd.mamba_chunk_scan_combined(**half, dt_softplus=True)
    assert got.dtype == torch.float16
    wide = {k: v.float() if k in {"x", "B", "C"} else v for k, v in half.items()}
    want = ssd.mamba_chunk_scan_combined(**wide, dt_softplus=True)
    torch.testing.assert_close(got, want.half(), rtol=0, atol=0)


def _split_operands(mlp: int, groups: int = 2) -> dict[str, Any]:
    inner, rows = NHEADS * HEADDIM, 2 * groups * STATES
    wide = 2 * mlp + 2 * inner + rows + NHEADS
    return {
        "zxbcdt": torch.randn(2, SEQLEN, wide).double(),
        "conv1d_weight": torch.randn(inner + rows, 4).double(),
        "conv1d_bias": torch.randn(inner + rows).double(),
        "dt_bias": torch.randn(NHEADS).double(),
        "A": -torch.rand(NHEADS).double(),
        "D": torch.randn(NHEADS).double(),
        "chunk_size": 256,
        "headdim": HEADDIM,
        "ngroups": groups,
    }


@pytest.mark.parametrize("mlp", [0, 5])
@pytest.mark.parametrize("norm", [None, "before", "behind"])
def test_split_is_its_parts(mlp: int, norm: str | None) -> None:
    o, inner = _split_operands(mlp), NHEADS * HEADDIM
    rows, weight = 2 * 2 * STATES, torch.rand(inner).double()
    out = torch.randn(9, mlp + inner).double()
    sizes = [mlp, mlp, inner, inner + rows, NHEADS]
    z0, x0, z, xbc, dt = torch.split(o["zxbcdt"], sizes, dim=-1)
    xbc = causal_conv1d_fn(
        xbc.transpose(1, 2), o["conv1d_weight"], o["conv1d_bias"], activation="silu"
    ).transpose(1, 2)
    x, B, C = torch.split(xbc, [inner, rows // 2, rows // 2], dim=-1)
    x, z = (t.unflatten(2, (NHEADS, HEADDIM)) for t in (x, z))
    step = functional.softplus(dt + o["dt_bias"])
    y, states = _by_hand(x, step, o["A"], *(t.unflatten(2, (2, STATES)) for t in (B, C)))
    y = (y + o["D"][:, None] * x).flatten(2)
    gate = functional.silu(z.flatten(2))
    y = y * gate if norm != "before" else y
    if norm is not None:
        parts = y.unflatten(2, (2, -1))
        y = (parts / (parts.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(2) * weight
    y = y * gate if norm == "before" else y
    want = torch.cat([functional.silu(z0) * x0, y], dim=-1) @ out.t()
    options: dict[str, Any] = {"outproj_weight": out, "norm_before_gate": norm == "before"}
    if norm is not None:
        options |= {"rmsnorm_weight": weight, "rmsnorm_eps": 1e-3}
    got = ssd.mamba_split_conv1d_scan_combined(**o, **options)
    torch.testing.assert_close(got, want, **EXACT)
    both = ssd.mamba_split_conv1d_scan_combined(**o, **options, return_final_states=True)
    torch.testing.assert_close(both[0], want, **EXACT)
    torch.testing.assert_close(both[1], states, **EXACT)


def test_block_is_the_slow_path_with_its_weights() -> None:
    slow = built(lambda: Mamba2Like(groups=2)).double()
    block = ssd.Mamba2(12, d_state=5, headdim=6, ngroups=2).double()
    # The block norms each group by itself.
    slow.norm.group_size = 12
    block.load_state_dict(slow.state_dict(), strict=True)
    x = torch.randn(2, 9, 12).double()
    # Upstream's style rounds A to float32.
    torch.testing.assert_close(block(x), slow(x), rtol=1e-6, atol=1e-7)
    rows = block(x.flatten(0, 1), seqlen=9)
    torch.testing.assert_close(rows, block(x).flatten(0, 1), **EXACT)


def test_block_with_an_mlp_exports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"d_ssm": 12, "rmsnorm": False, "D_has_hdim": True}
    options |= {"dt_limit": (0.01, 0.05), "bias": True, "conv_bias": False, "conv_init": 0.1}
    block = ssd.Mamba2(12, d_state=5, headdim=3, **options).eval()
    artifact = vssm.export_module(block, torch.randn(2, 9, 12), tmp_path / "out")
    report = vssm.check_parity(None, artifact)
    assert report.passed, report.failures


def test_block_starts_as_upstream_does() -> None:
    block = ssd.Mamba2(64, headdim=8, A_init_range=(2, 3), dtype=torch.float16)
    steps = functional.softplus(block.dt_bias.detach().float())
    assert 0.9e-3 < float(steps.min()) < float(steps.max()) < 1.1e-1
    decay = block.A_log.detach().float().exp()
    assert 1.99 < float(decay.min()) < float(decay.max()) < 3.01
    assert {tuple(p.shape) for p in (block.dt_bias, block.A_log, block.D)} == {(16,)}
    assert block.in_proj.weight.dtype == torch.float16


@pytest.mark.parametrize("make", [norms.GatedRMSNorm, norms.GatedLayerNorm])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("group", [None, 4])
def test_gated_norms(make: Callable[..., nn.Module], before: bool, group: int | None) -> None:
    norm: Any = make(8, eps=1e-3, group_size=group, norm_before_gate=before)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, z = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    gate = functional.silu(z)
    parts = (x if before else x * gate).unflatten(-1, (-1, group or 8))
    if norm.bias is not None:
        parts = parts - parts.mean(-1, keepdim=True)
    want = (parts / (parts.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * norm.weight
    want = want if norm.bias is None else want + norm.bias
    want = want * gate if before else want
    torch.testing.assert_close(norm(x, z), want, rtol=1e-5, atol=1e-6)
    plain = norms.gated_layer_norm(
        x, norm.weight, norm.bias, None, 1e-3, group, before, norm.bias is None
    )
    torch.testing.assert_close(norm(x), plain, rtol=0, atol=0)
    assert norm(x.half(), z.half()).dtype == torch.float16


def test_what_is_refused() -> None:
    o = _operands()
    scan = ssd.mamba_chunk_scan_combined
    with pytest.raises(UnsupportedError, match="initial_states continue"):
        scan(**o, initial_states=torch.zeros(1))
    for name in ("seq_idx", "cu_seqlens"):
        with pytest.raises(UnsupportedError, match=f"{name} packs several"):
            scan(**o, **{name: torch.zeros(1)})
    with pytest.raises(UnsupportedError, match="return_varlen_states=True"):
        scan(**o, return_varlen_states=True)
    with pytest.raises(ValueError, match=r"dt_limit=\(2, 1\)"):
        scan(**o, dt_limit=(2, 1))
    for name, bad in (
        ("dt", o["dt"][:, 1:]),
        ("A", o["A"][:, None]),
        ("B", o["B"][:, :, 0]),
        ("C", o["C"][..., :2]),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.shape="):
            scan(**{**o, name: bad})
    split = _split_operands(0)
    with pytest.raises(ValueError, match="give headdim="):
        ssd.mamba_split_conv1d_scan_combined(**{**split, "headdim": None})
    with pytest.raises(ValueError, match=r"zxbcdt\.shape=\(2, 7, 57\)"):
        ssd.mamba_split_conv1d_scan_combined(**{**split, "zxbcdt": split["zxbcdt"][..., 1:]})
    with pytest.raises(UnsupportedError, match="process_group"):
        ssd.Mamba2(12, process_group=object())
    with pytest.raises(ValueError, match="headdim=5"):
        ssd.Mamba2(12, headdim=5)
    block = ssd.Mamba2(12, d_state=5, headdim=6)
    with pytest.raises(UnsupportedError, match="token by token"):
        block(torch.zeros(1, 3, 12), inference_params={})
    with pytest.raises(UnsupportedError, match="seq_idx"):
        block(torch.zeros(1, 3, 12), seq_idx=torch.zeros(1, 3))
    with pytest.raises(UnsupportedError, match="whole"):
        block.step()
