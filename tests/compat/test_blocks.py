"""The fused blocks, norms and the Mamba module: against plain PyTorch and against our own Vim."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from official_data import fill_weights, micro_config
from torch import Tensor
from torch.nn import functional

from vssm.compat import upstream
from vssm.compat.packages import blocks, cross, norms
from vssm.errors import UnsupportedError
from vssm.models.vim import VimMixer
from vssm.pruning.select import Tokens
from vssm.pruning.walks import LineWalks

EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_causal_convolution_sees_no_later_token(activation: str | None) -> None:
    x, weight, bias = torch.randn(2, 3, 9), torch.randn(3, 4), torch.randn(3)
    want = functional.conv1d(x, weight[:, None], bias, padding=3, groups=3)[..., :9]
    want = want if activation is None else functional.silu(want)
    got = blocks.causal_conv1d_fn(x, weight, bias, activation=activation)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    # As callers of the older releases give it.
    torch.testing.assert_close(blocks.causal_conv1d_fn(x, weight, bias, activation), got)


def test_causal_convolution_refuses_states() -> None:
    x, weight = torch.randn(1, 3, 9), torch.randn(3, 4)
    blocks.causal_conv1d_fn(x, weight, None, None, None, False)  # nothing is asked for
    with pytest.raises(UnsupportedError, match=r"causal_conv1d_fn: 'silu' \(states between"):
        blocks.causal_conv1d_fn(x, weight, None, None, "silu")
    with pytest.raises(UnsupportedError, match="initial_states"):
        blocks.causal_conv1d_fn(x, weight, initial_states=torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match="activation='gelu'"):
        blocks.causal_conv1d_fn(x, weight, activation="gelu")
    assert (
        blocks.causal_conv1d_fn(x, weight, None, None, return_final_states=False).shape == x.shape
    )


@pytest.mark.parametrize("bimamba", ["v2", "v1", "none"])
@pytest.mark.parametrize("halved", [True, False])
def test_mamba_is_our_vim_mixer(bimamba: str, halved: bool) -> None:
    config = micro_config("mid_div2", bimamba=bimamba, divide_out=halved, layer_scale=0.5).mixer
    ours = VimMixer(config).double()
    theirs = blocks.Mamba(
        config.d_model,
        d_state=config.d_state,
        d_conv=config.d_conv,
        expand=config.d_inner / config.d_model,
        dt_rank=config.dt_rank,
        bimamba_type=bimamba,
        if_divide_out=halved,
        init_layer_scale=0.5,
    ).double()
    fill_weights(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 11, config.d_model).double()
    tokens = Tokens.dense(LineWalks(11, 1 if bimamba == "none" else 2, x.device), 11, x.device)
    torch.testing.assert_close(theirs(x), ours(x, tokens, None)[0], **EXACT)


def test_mamba_starts_as_upstream_does() -> None:
    model = blocks.Mamba(32, bimamba_type="v2", dt_init="constant", dt_scale=2.0)
    assert model.dt_rank == 2
    steps = functional.softplus(model.dt_proj.bias.detach())
    assert 0.9e-3 < float(steps.min()) < float(steps.max()) < 1.1e-1
    assert model.dt_proj_b.weight.detach().unique().numel() == 1
    torch.testing.assert_close(
        model.A_log.detach().exp(), torch.arange(1.0, 17).expand(64, -1), rtol=1e-6, atol=1e-6
    )
    assert blocks.Mamba(8, bimamba_type=None).bimamba_type == "none"
    forks = r"Mamba\(nslices=4, bimamba_type='v3'\): neither .* with --path"
    with pytest.raises(UnsupportedError, match=forks):
        blocks.Mamba(8, bimamba_type="v3", nslices=4)
    with pytest.raises(ValueError, match="dt_init='zero'"):
        blocks.Mamba(8, dt_init="zero")
    with pytest.raises(UnsupportedError, match="token by token"):
        model(torch.zeros(1, 3, 32), inference_params={})
    with pytest.raises(UnsupportedError, match="whole"):
        model.step(torch.zeros(1, 1, 32))


@pytest.mark.parametrize("bimamba", ["v2", "none"])
def test_other_modules_in_the_place_of_projections_are_called(bimamba: str) -> None:
    torch.manual_seed(0)
    model, x = blocks.Mamba(8, bimamba_type=bimamba), torch.randn(2, 3, 8)
    want, out = model(x), model.out_proj
    # As of two mixers whose sum goes through one projection.
    model.out_proj, model.in_proj = torch.nn.Identity(), torch.nn.Sequential(model.in_proj)
    torch.testing.assert_close(out(model(x)), want)


def test_projection_biases_and_given_parameters() -> None:
    x = {
        name: torch.randn(shape).double()
        for name, shape in {
            "xz": (2, 12, 7),
            "conv1d_weight": (6, 1, 4),
            "conv1d_bias": (6,),
            "x_proj_weight": (8, 6),
            "delta_proj_weight": (6, 2),
            "A": (6, 3),
            "D": (6,),
            "delta_bias": (6,),
            "B_proj_bias": (3,),
            "C_proj_bias": (3,),
        }.items()
    }
    x["A"] = -x["A"].exp()
    both = blocks.mamba_inner_fn_no_out_proj(**x)
    # B given is B computed: the rows of x_proj for it are left out.
    u = functional.silu(
        functional.conv1d(x["xz"][:, :6], x["conv1d_weight"], x["conv1d_bias"], padding=3, groups=6)
    )[..., :7]
    low = x["x_proj_weight"] @ u
    given = {**x, "x_proj_weight": x["x_proj_weight"][[0, 1, 5, 6, 7]], "B_proj_bias": None}
    got = blocks.mamba_inner_fn_no_out_proj(**given, B=low[:, 2:5] + x["B_proj_bias"][:, None])
    torch.testing.assert_close(got, both, **EXACT)
    # As upstream: rows of x_proj for a given B may be there, and its bias is the projection's.
    both_given = {**x, "B": low[:, 2:5] + x["B_proj_bias"][:, None]}
    got = blocks.mamba_inner_fn_no_out_proj(**both_given)
    torch.testing.assert_close(got, both, **EXACT)
    out = {"out_proj_weight": torch.randn(5, 6).double(), "out_proj_bias": torch.randn(5).double()}
    want = functional.linear(both.transpose(1, 2), *out.values())
    torch.testing.assert_close(blocks.mamba_inner_fn(**x, **out), want, **EXACT)
    with pytest.raises(UnsupportedError, match="b_rms_weight"):
        blocks.mamba_inner_fn(**x, **out, b_rms_weight=torch.ones(3))


def test_norms_add_and_keep_the_sum_wide() -> None:
    x, residual, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.rand(8)
    total = x + residual
    want = total * weight / (total.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    y, kept = norms.rms_norm_fn(x, weight, None, residual=residual, eps=1e-3, prenorm=True)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(kept, total)
    got = norms.layer_norm_fn(x, weight, weight, residual=residual, eps=1e-3)
    want = functional.layer_norm(total, (8,), weight, weight, 1e-3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    half = norms.rms_norm_fn(x.half(), weight, None, prenorm=True, residual_in_fp32=True)
    assert [t.dtype for t in half] == [torch.float16, torch.float32]
    module = norms.RMSNorm(8, eps=1e-3)
    module.weight.data = weight
    torch.testing.assert_close(
        module(x, residual),
        norms.layer_norm_fn(x, weight, None, residual, eps=1e-3, is_rms_norm=True),
        rtol=0,
        atol=0,
    )
    with pytest.raises(UnsupportedError, match="rowscale"):
        norms.rms_norm_fn(x, weight, None, rowscale=torch.ones(2) > 0)


def _walk(x: Tensor, scans: int) -> Tensor:
    """(batch, channels, h, w) as four sequences, by the definition."""
    rows, columns = x.flatten(2), x.transpose(2, 3).flatten(2)
    pair = {0: (rows, columns), 1: (rows, rows), 2: (rows, rows)}[scans]
    return torch.stack([*pair, *(p if scans == 1 else p.flip(-1) for p in pair)], dim=1)


@pytest.mark.parametrize("scans", [0, 1, 2])
@pytest.mark.parametrize("first", [True, False])
def test_cross_scan_and_merge(scans: int, first: bool) -> None:
    x = torch.randn(2, 3, 4, 5)
    want = _walk(x, scans)
    given = x if first else x.permute(0, 2, 3, 1)
    options: dict[str, Any] = {"in_channel_first": first, "scans": scans}
    assert torch.equal(cross.cross_scan_fn(given, **options), want)
    other = cross.cross_scan_fn(given, **options, out_channel_first=False)
    assert torch.equal(other, want.permute(0, 3, 1, 2))
    apart = want.reshape(2, 4, 3, 4, 5)
    merged = cross.cross_merge_fn(apart, **options)
    total = 4 * x.flatten(2)
    torch.testing.assert_close(
        merged, total if first else total.transpose(1, 2), rtol=1e-6, atol=1e-6
    )
    last = apart.permute(0, 3, 4, 1, 2)
    torch.testing.assert_close(
        cross.cross_merge_fn(last, **options, out_channel_first=False), merged, rtol=0, atol=0
    )
    each = x[:, None].expand(-1, 4, -1, -1, -1)
    each = each if first else each.permute(0, 3, 4, 1, 2)
    assert torch.equal(cross.cross_scan_fn(each, **options, one_by_one=True), want)
    back = cross.cross_merge_fn(apart, **options, one_by_one=True)
    back = back if first else back.permute(0, 2, 3, 1)
    assert torch.equal(back, x.flatten(2)[:, None].expand_as(back))
    with pytest.raises(ValueError, match="scans=3"):
        cross.cross_scan_fn(x, scans=3)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_one_walk(number: int) -> None:
    x = torch.randn(2, 3, 4, 5)
    scan, merge = cross.one_walk(number)
    assert torch.equal(scan(x)[:, 0], _walk(x, 0)[:, [0, 1, 2, 3][number - 1]])
    assert torch.equal(merge(scan(x).reshape(2, 1, 3, 4, 5)), x.flatten(2))


def test_residual_blocks_add_then_norm_then_mix() -> None:
    torch.manual_seed(0)
    with upstream():
        from mamba_ssm.modules.block import Block as WithMlp
        from mamba_ssm.modules.mamba_simple import Block
        from mamba_ssm.modules.mlp import GatedMLP
        from mamba_ssm.ops.triton.layer_norm import RMSNorm
    options = {"norm_cls": RMSNorm, "residual_in_fp32": True, "fused_add_norm": True}
    mlp = partial(GatedMLP, hidden_features=5, multiple_of=3)
    plain, full = Block(8, blocks.Mamba, **options), WithMlp(8, blocks.Mamba, mlp, **options)
    bare = WithMlp(8, blocks.Mamba, torch.nn.Identity, **options)
    bare.load_state_dict(plain.state_dict())  # the same keys
    assert full.mlp.fc1.weight.shape == (12, 8)
    hidden, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8).to(torch.bfloat16)
    total = hidden + residual
    want = plain.mixer(plain.norm(total))
    for block in (plain, bare):
        found, kept = block(hidden, residual)
        assert kept.dtype == torch.float32
        torch.testing.assert_close((found, kept), (want, total))
    first, _ = plain(hidden)
    torch.testing.assert_close(first, plain.mixer(plain.norm(hidden)))
    found, kept = full(hidden, residual)
    total = total + full.mixer(full.norm(total))
    y, gate = full.mlp.fc1(full.norm2(total)).chunk(2, -1)
    torch.testing.assert_close(kept, total)
    torch.testing.assert_close(found, full.mlp.fc2(y * functional.silu(gate)))


def test_parts_without_a_stand_in_name_the_clone() -> None:
    with upstream():
        from mamba_ssm.models.mixer_seq_simple import MixerModel

        with pytest.raises(UnsupportedError, match=r"a clone of state-spaces/mamba.*--path"):
            MixerModel(8)
