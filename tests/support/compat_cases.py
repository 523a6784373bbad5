"""Small modules in the styles of the repositories that users have, written for these tests.

Each is built inside `vssm.compat.upstream()`, from the imports that its style has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from exports import stored
from torch import Tensor, nn
from torch.nn import functional

import vssm
from vssm.artifact.directory import Artifact
from vssm.compat import upstream

CLASSES = 7


class Block(nn.Module):
    """mamba_ssm's and Vim's: add, norm, mix; hidden and residual in and out."""

    def __init__(self, width: int, mixer: Callable[..., nn.Module], norm: nn.Module) -> None:
        super().__init__()
        from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn

        self.mixer, self.norm = mixer(width), norm
        self.add_norm = rms_norm_fn if isinstance(norm, RMSNorm) else layer_norm_fn

    def forward(
        self, hidden: Tensor, residual: Tensor | None = None, inference_params: Any = None
    ) -> tuple[Tensor, Tensor]:
        hidden, residual = self.add_norm(
            hidden,
            self.norm.weight,
            self.norm.bias,
            residual=residual,
            prenorm=True,
            residual_in_fp32=True,
            eps=self.norm.eps,
        )
        return self.mixer(hidden, inference_params=inference_params), residual


class VimLike(nn.Module):
    """Vim's architecture and keys, the class token in the middle (or a mean without one)."""

    def __init__(self, *, bimamba: str = "v2", depth: int = 3, mean: bool = False) -> None:
        super().__init__()
        from mamba_ssm.modules.mamba_simple import Mamba
        from mamba_ssm.ops.triton.layer_norm import RMSNorm

        width = 20
        mixer = partial(Mamba, d_state=5, bimamba_type=bimamba, if_divide_out=True)
        self.if_cls_token, self.use_middle_cls_token = not mean, True
        self.patch_embed = nn.Module()
        self.patch_embed.num_patches = 36
        self.patch_embed.proj = nn.Conv2d(3, width, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 37, width))
        self.layers = nn.ModuleList(Block(width, mixer, RMSNorm(width)) for _ in range(depth))
        self.norm_f = RMSNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        middle = x.shape[1] // 2
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        hidden = torch.cat([x[:, :middle], cls, x[:, middle:]], dim=1) + self.pos_embed
        residual = None
        for layer in self.layers:
            hidden, residual = self.between(*layer(hidden, residual))
        x = self.norm_f(hidden + residual)
        return self.head(x[:, middle] if self.if_cls_token else x.mean(1))

    def between(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, residual


class LanguageModel(nn.Module):
    """Mamba-1 prefill in state-spaces' style: einops, weight @ x, mamba_inner_fn."""

    def __init__(self, *, fast: bool = True) -> None:
        super().__init__()
        from einops import rearrange
        from mamba_ssm import Mamba
        from mamba_ssm.ops.triton.layer_norm import RMSNorm

        self.fast, self.rearrange = fast, rearrange
        self.embedding = nn.Embedding(30, 16)
        self.layers = nn.ModuleList(Block(16, Mamba, RMSNorm(16)) for _ in range(2))
        self.head = nn.Linear(16, 30, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, residual = self.embedding(tokens), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return self.head(hidden + residual)


class SlowPath(nn.Module):
    """state-spaces' slow path: projections with the batch folded in, selective_scan_fn."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        from causal_conv1d import causal_conv1d_fn
        from einops import rearrange
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        self.conv, self.rearrange, self.scan = causal_conv1d_fn, rearrange, selective_scan_fn
        self.inner, self.rank, self.states = 2 * width, 2, 4
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv1d = nn.Conv1d(self.inner, self.inner, 4, groups=self.inner)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * self.states, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner)
        self.A_log = nn.Parameter(torch.rand(self.inner, self.states))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        re, seqlen = self.rearrange, x.shape[1]
        xz = re(self.in_proj.weight @ re(x, "b l d -> d (b l)"), "d (b l) -> b d l", l=seqlen)
        u, z = xz.chunk(2, dim=1)
        weight = re(self.conv1d.weight, "d 1 w -> d w")
        u = self.conv(x=u, weight=weight, bias=self.conv1d.bias, activation="silu")
        low = self.x_proj(re(u, "b d l -> (b l) d"))
        dt, B, C = torch.split(low, [self.rank, self.states, self.states], dim=-1)
        dt = re(self.dt_proj.weight @ dt.t(), "d (b l) -> b d l", l=seqlen)
        B, C = (re(t, "(b l) n -> b n l", l=seqlen).contiguous() for t in (B, C))
        A, bias = -torch.exp(self.A_log.float()), self.dt_proj.bias.float()
        y = self.scan(u, dt, A, B, C, self.D.float(), z=z, delta_bias=bias, delta_softplus=True)
        return self.out_proj(re(y, "b d l -> b l d"))


class TransformersLike(nn.Module):
    """transformers' fast path: causal_conv1d_fn by position, the gate inside the scan."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        self.conv, self.scan = causal_conv1d_fn, selective_scan_fn
        self.inner, self.rank, self.states = 2 * width, 2, 4
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv1d = nn.Conv1d(self.inner, self.inner, 4, groups=self.inner)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * self.states, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner)
        self.A_log = nn.Parameter(torch.rand(self.inner, self.states))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        weight = self.conv1d.weight.view(self.conv1d.weight.size(0), self.conv1d.weight.size(2))
        hidden = self.conv(hidden, weight, self.conv1d.bias, activation="silu")
        low = self.x_proj(hidden.transpose(1, 2))
        dt, B, C = torch.split(low, [self.rank, self.states, self.states], dim=-1)
        dt = self.dt_proj.weight @ dt.transpose(1, 2)
        y, _ = self.scan(
            hidden,
            dt,
            -torch.exp(self.A_log.float()),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D.float(),
            gate,
            self.dt_proj.bias.float(),
            delta_softplus=True,
            return_last_state=True,
        )
        return self.out_proj(y.transpose(1, 2))


class MinimalLike(nn.Module):
    """mamba-minimal's block: a method of its own with a loop over the sequence."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.states = 4
        self.proj = nn.Linear(width, 2 * self.states + width)
        self.A_log = nn.Parameter(torch.rand(width, self.states))
        self.D = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        low = self.proj(x)
        delta, B, C = low.split([x.shape[2], self.states, self.states], dim=-1)
        A, delta = -torch.exp(self.A_log), functional.softplus(delta)
        return self.selective_scan(x, delta, A, B, C, self.D)

    def selective_scan(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> Tensor:
        state = u.new_zeros(u.shape[0], u.shape[2], self.states)
        rows = []
        for i in range(u.shape[1]):
            step = delta[:, i, :, None]
            state = torch.exp(step * A) * state + step * B[:, i, None] * u[:, i, :, None]
            rows.append((state * C[:, i, None]).sum(-1))
        return torch.stack(rows, dim=1) + u * D


class MambaVisionLike(nn.Module):
    """MambaVision's mixer: half of the channels scanned, half only convolved, no gate."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        from einops import rearrange
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        self.rearrange, self.scan = rearrange, selective_scan_fn
        self.half, self.rank, self.states = width // 2, 2, 4
        self.in_proj = nn.Linear(width, width, bias=False)
        self.conv1d_x = nn.Conv1d(self.half, self.half, 3, groups=self.half, bias=False)
        self.conv1d_z = nn.Conv1d(self.half, self.half, 3, groups=self.half, bias=False)
        self.x_proj = nn.Linear(self.half, self.rank + 2 * self.states, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.half)
        self.A_log = nn.Parameter(torch.rand(self.half, self.states))
        self.D = nn.Parameter(torch.ones(self.half))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        re, seqlen = self.rearrange, x.shape[1]
        u, z = re(self.in_proj(x), "b l d -> b d l").chunk(2, dim=1)
        u, z = (
            functional.silu(functional.conv1d(t, c.weight, padding="same", groups=self.half))
            for t, c in ((u, self.conv1d_x), (z, self.conv1d_z))
        )
        low = self.x_proj(re(u, "b d l -> (b l) d"))
        dt, B, C = torch.split(low, [self.rank, self.states, self.states], dim=-1)
        dt = re(self.dt_proj(dt), "(b l) d -> b d l", l=seqlen)
        B, C = (re(t, "(b l) n -> b n l", l=seqlen).contiguous() for t in (B, C))
        A, bias = -torch.exp(self.A_log.float()), self.dt_proj.bias.float()
        y = self.scan(u, dt, A, B, C, self.D.float(), None, bias, True, None)
        return self.out_proj(re(torch.cat([y, z], dim=1), "b d l -> b l d"))


class PlainMambaLike(nn.Module):
    """PlainMamba's layer: four walks by index tuples; delta, B and C stay in raster order."""

    def __init__(self, width: int = 12, grid: tuple[int, int] = (3, 4)) -> None:
        super().__init__()
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        rows = torch.arange(grid[0] * grid[1])
        columns = rows.reshape(grid).t().flatten()
        tables = (rows, rows.flip(0), columns, columns.flip(0))
        self.orders = [tuple(t.tolist()) for t in tables]
        self.inverses = [tuple(t.argsort().tolist()) for t in tables]
        self.scan, self.rank, self.states = selective_scan_fn, 2, 4
        self.in_proj = nn.Linear(width, 2 * width)
        self.x_proj = nn.Linear(width, self.rank + 2 * self.states, bias=False)
        self.dt_proj = nn.Linear(self.rank, width)
        self.A_log = nn.Parameter(torch.rand(width, self.states))
        self.D = nn.Parameter(torch.ones(width))
        self.direction_Bs = nn.Parameter(torch.randn(4, self.states))

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        low = self.x_proj(x)
        dt, B, C = torch.split(low, [self.rank, self.states, self.states], dim=-1)
        dt, B, C = (t.permute(0, 2, 1).contiguous() for t in (self.dt_proj(dt), B, C))
        A, bias = -torch.exp(self.A_log.float()), self.dt_proj.bias.float()
        ys = [
            self.scan(
                x[:, o, :].permute(0, 2, 1).contiguous(),
                dt,
                A,
                (B + direction[None, :, None]).contiguous(),
                C,
                self.D.float(),
                z=None,
                delta_bias=bias,
                delta_softplus=True,
            ).permute(0, 2, 1)[:, inverse, :]
            for o, inverse, direction in zip(
                self.orders, self.inverses, self.direction_Bs, strict=True
            )
        ]
        return sum(ys) * functional.silu(z)


class Mamba2Like(nn.Module):
    """Mamba-2's slow path: its own projections and convolution, the chunked scan, a gated norm.

    `both_ways` is Hydra's way to scan backwards: the reversed sequences as more images.
    """

    def __init__(self, width: int = 12, *, groups: int = 1, both_ways: bool = False) -> None:
        super().__init__()
        from causal_conv1d import causal_conv1d_fn
        from einops import rearrange
        from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        self.conv, self.rearrange, self.scan = (
            causal_conv1d_fn,
            rearrange,
            mamba_chunk_scan_combined,
        )
        self.inner, self.heads, self.states, self.groups = 2 * width, 4, 5, groups
        self.both_ways = both_ways
        self.rows = self.inner + 2 * groups * self.states
        self.in_proj = nn.Linear(width, self.inner + self.rows + self.heads, bias=False)
        self.conv1d = nn.Conv1d(self.rows, self.rows, 4, groups=self.rows)
        self.dt_bias = nn.Parameter(torch.randn(self.heads))
        self.A_log = nn.Parameter(torch.rand(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNormGated(self.inner, norm_before_gate=False)
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        re, batch = self.rearrange, u.shape[0]
        z, xbc, dt = torch.split(self.in_proj(u), [self.inner, self.rows, self.heads], dim=-1)
        weight = re(self.conv1d.weight, "d 1 w -> d w")
        xbc = self.conv(xbc.transpose(1, 2), weight, bias=self.conv1d.bias, activation="silu")
        streams = (xbc.transpose(1, 2), dt)
        if self.both_ways:
            streams = tuple(torch.cat([t, t.flip(1)], dim=0) for t in streams)
        size = self.groups * self.states
        x, B, C = torch.split(streams[0], [self.inner, size, size], dim=-1)
        y = self.scan(
            re(x, "b l (h p) -> b l h p", h=self.heads),
            streams[1],
            -torch.exp(self.A_log.float()),
            re(B, "b l (g n) -> b l g n", g=self.groups),
            re(C, "b l (g n) -> b l g n", g=self.groups),
            chunk_size=256,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
        )
        y = re(y, "b l h p -> b l (h p)")
        y = y[:batch] + y[batch:].flip(1) if self.both_ways else y
        return self.out_proj(self.norm(y, z))


def mamba2_block() -> nn.Module:
    """A Mamba2 as users take it from mamba_ssm."""
    from mamba_ssm import Mamba2

    return Mamba2(12, d_state=5, headdim=6, ngroups=2, norm_before_gate=True)


# A repository's own scan file, as VMamba and GroupMamba have one: what it says cannot run here.
CSMS6S = """
import torch

class SelectiveScanCuda(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, oflex=True,
                backend=None):
        raise RuntimeError("the compiled kernel")

class SelectiveScanCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, nrows=1,
                backnrows=1, oflex=True):
        raise RuntimeError("the compiled kernel")

def selective_scan_fn(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True,
                      backend=None):
    return SelectiveScanCuda.apply(u, delta, A, B, C, D, delta_bias, delta_softplus, oflex, backend)

def cross_scan_fn(x, in_channel_first=True, out_channel_first=True, one_by_one=False, scans=0,
                  force_torch=False):
    raise RuntimeError("the Triton kernel")

def cross_merge_fn(y, in_channel_first=True, out_channel_first=True, one_by_one=False, scans=0,
                   force_torch=False):
    raise RuntimeError("the Triton kernel")

def selective_scan_flop_jit(inputs, outputs):
    return 0
"""


class VMambaLike(nn.Module):
    """VMamba's ss2d (or GroupMamba's one walk) over the functions of a repository's file."""

    def __init__(self, functions: Any, *, core: bool = False, width: int = 6) -> None:
        super().__init__()
        self.walks = 1 if core else 4
        self.cross_scan, self.cross_merge = functions.cross_scan_fn, functions.cross_merge_fn
        self.scan = functions.selective_scan_fn
        # Bound at construction, as GroupMamba does.
        self.apply_core = partial(_apply, functions.SelectiveScanCore)
        self.rank, self.states = 2, 1
        k, low = self.walks, self.rank + 2 * self.states
        self.x_proj_weight = nn.Parameter(torch.randn(k, low, width) / 4)
        self.dt_projs_weight = nn.Parameter(torch.randn(k, width, self.rank) / 4)
        self.dt_projs_bias = nn.Parameter(torch.randn(k, width))
        self.A_logs = nn.Parameter(torch.rand(k * width, self.states))
        self.Ds = nn.Parameter(torch.ones(k * width))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, columns = x.shape
        seqlen, k = height * columns, self.walks
        xs = self.cross_scan(x) if k == 4 else x.flatten(2)[:, None]
        low = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj_weight)
        dt, B, C = torch.split(low, [self.rank, self.states, self.states], dim=2)
        dt = torch.einsum("bkrl,kdr->bkdl", dt, self.dt_projs_weight).contiguous()
        operands = (
            xs.reshape(batch, -1, seqlen),
            dt.view(batch, -1, seqlen),
            -torch.exp(self.A_logs.float()),
            B.contiguous(),
            C.contiguous(),
            self.Ds.float(),
            self.dt_projs_bias.reshape(-1).float(),
        )
        if k == 1:
            return self.apply_core(*operands, True, -1, -1, True)
        ys = self.scan(*operands, True, True, backend=None)
        return self.cross_merge(ys.view(batch, 4, -1, height, columns))


def _apply(function: Any, *operands: Any) -> Tensor:
    return function.apply(*operands)


IMAGES = (2, 3, 48, 48)
# A module of each style, and the shape of its input.
STYLES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vim v2": (lambda: VimLike(depth=1), IMAGES),
    "vim v2, two blocks": (lambda: VimLike(depth=2), IMAGES),
    "vim v1": (lambda: VimLike(bimamba="v1", depth=1), IMAGES),
    "vim none": (lambda: VimLike(bimamba="none", mean=True, depth=1), IMAGES),
    "slow path": (SlowPath, (2, 9, 12)),
    "transformers": (TransformersLike, (2, 9, 12)),
    "mambavision": (MambaVisionLike, (2, 9, 12)),
    "plain mamba": (PlainMambaLike, (2, 12, 12)),
    "mamba-2": (Mamba2Like, (2, 9, 12)),
    "mamba-2, both ways": (lambda: Mamba2Like(both_ways=True), (2, 9, 12)),
    "mamba-2 block, groups": (mamba2_block, (2, 9, 12)),
}


def exported_style(tmp_path: Path, style: str) -> Artifact:
    """The export of a style, made once in a run of pytest; a test may change its files."""
    factory, shape = STYLES[style]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def export(made: Path) -> None:
        vssm.export_module(built(factory), x, made)

    return stored(tmp_path, f"style {style}", export)


def built(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module made inside `upstream`, with weights of a fixed seed, in eval mode."""
    torch.manual_seed(seed)
    with upstream():
        return factory().eval()
