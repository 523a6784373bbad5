"""The ViT-Adapter around PlainMamba: a convolutional pyramid that trades with the tokens.

Source: Chen et al., "Vision Transformer Adapter", arXiv:2205.08534; Zhu et al., "Deformable DETR",
arXiv:2010.04159; and the numbers of PlainMamba's public code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.models.dense.heads import Size, conv_weights
from vssm.models.layers import LayerNorm, Linear, fold_batch_norm, wide

NORM_EPS: Final = 1e-6
POINTS: Final = 4  # that a query reads in each level, for every head


class DeformableAttention(nn.Module):
    """Each query reads a few points of every level, near its own place, bilinearly.

    Args:
        width: of queries and values.
        heads: that the width is split into.
        levels: maps that are read.
    """

    def __init__(self, width: int, heads: int, levels: int) -> None:
        super().__init__()
        self.heads, self.levels = heads, levels
        points = heads * levels * POINTS
        self.sampling_offsets = Linear(width, 2 * points)
        self.attention_weights = Linear(width, points)
        self.value_proj = Linear(width, width)
        self.output_proj = Linear(width, width)

    def forward(
        self, query: Tensor, places: Tensor, value: Tensor, sizes: Sequence[Size]
    ) -> Tensor:
        """Read the values, (batch, queries, width).

        Args:
            query: (batch, queries, width).
            places: (1 or batch, queries, 2), x and y of each query in [-1, 1].
            value: (batch, places of all levels, width), one level after another.
            sizes: (height, width) of the levels.
        """
        batch, queries, width = query.shape
        value = self.value_proj(value)
        # Wide: half precision has too few digits for a place in a large map.
        offsets = wide(self.sampling_offsets(query))
        offsets = offsets.reshape(-1, queries, self.heads, self.levels, 2 * POINTS)
        weights = self.attention_weights(query).reshape(-1, queries, self.heads, self._reads)
        # Heads beside the images, as grids have one axis for both.
        weights = wide(weights).softmax(-1).transpose(1, 2).reshape(-1, 1, queries, self._reads)
        parts = value.split([math.prod(size) for size in sizes], dim=1)
        read: list[Tensor] = []
        for level, (size, part) in enumerate(zip(sizes, parts, strict=True)):
            grid = self._grid(offsets[:, :, :, level], places, size)
            maps = wide(part).transpose(1, 2).reshape(-1, width // self.heads, *size)
            read.append(
                functional.grid_sample(maps, grid, "bilinear", "zeros", align_corners=False)
            )
        mixed = (torch.cat(read, dim=3) * weights).sum(3)
        mixed = mixed.reshape(batch, width, queries).transpose(1, 2)
        return wide(self.output_proj(mixed))

    @property
    def _reads(self) -> int:
        return self.levels * POINTS

    def _grid(self, offsets: Tensor, places: Tensor, size: Size) -> Tensor:
        """Where to read: offsets (batch, queries, heads, 2 * points) are in pixels of the level."""
        queries = offsets.shape[1]
        step = torch.tensor([2 / size[1], 2 / size[0]], dtype=offsets.dtype, device=offsets.device)
        offsets = offsets.reshape(-1, queries, self.heads, POINTS, 2) * step
        grid = places[:, :, None, None].to(offsets.dtype) + offsets
        return grid.transpose(1, 2).reshape(-1, queries, POINTS, 2)

    def cost(self, queries: int, values: int) -> int:
        """Multiply-adds for so many queries and places; a bilinear read counts four a channel."""
        linear = (self.sampling_offsets, self.attention_weights, self.output_proj)
        width = self.value_proj.in_features
        reads = queries * self._reads * width * (4 + 1)
        return (
            queries * sum(layer.weight.numel() for layer in linear)
            + values * self.value_proj.weight.numel()
            + reads
        )


def centres(size: Size, like: Tensor) -> Tensor:
    """(1, height * width, 2): x and y of every place's centre, the map from -1 to 1.

    Made in each pass in the dtype and on the device of `like`: a stored table would stay as coarse
    as float32 once the model was in it.
    """
    rows, columns = (
        (2 * torch.arange(n, dtype=like.dtype, device=like.device) + 1) / n - 1 for n in size
    )
    return torch.stack([columns.repeat(size[0]), rows.repeat_interleave(size[1])], dim=1)[None]


class Injector(nn.Module):
    """What the pyramid gives the tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query_norm = LayerNorm(width, eps=NORM_EPS)
        self.feat_norm = LayerNorm(width, eps=NORM_EPS)
        self.attn = DeformableAttention(width, heads, levels=3)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, places: Tensor, pyramid: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Tokens (batch, queries, width) at `places`, with what they read of the pyramid."""
        read: Tensor = self.attn(self.query_norm(x), places, self.feat_norm(pyramid), sizes)
        return x + wide(self.gamma) * read


class DepthwiseFfn(nn.Module):
    """fc1, one depthwise convolution for the pyramid's three maps, GELU, fc2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width // 4
        self.fc1 = Linear(width, hidden)
        conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.dwconv = nn.ModuleDict({"dwconv": conv})
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, sizes: Sequence[Size]) -> Tensor:
        """The pyramid's tokens, one map after another."""
        conv = cast(nn.Conv2d, self.dwconv["dwconv"])
        parts = self.fc1(x).split([math.prod(size) for size in sizes], dim=1)
        mixed = [
            conv(part.transpose(1, 2).reshape(-1, part.shape[2], *size).to(conv.weight.dtype))
            for part, size in zip(parts, sizes, strict=True)
        ]
        x = torch.cat([part.flatten(2) for part in mixed], dim=2).transpose(1, 2)
        return wide(self.fc2(functional.gelu(x)))


class Extractor(nn.Module):
    """What the pyramid takes from the tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query_norm = LayerNorm(width, eps=NORM_EPS)
        self.feat_norm = LayerNorm(width, eps=NORM_EPS)
        self.attn = DeformableAttention(width, heads, levels=1)
        self.ffn = DepthwiseFfn(width)
        self.ffn_norm = LayerNorm(width, eps=NORM_EPS)

    def forward(
        self, pyramid: Tensor, places: Tensor, sizes: Sequence[Size], x: Tensor, grid: Size
    ) -> Tensor:
        """The pyramid's tokens at `places`, of maps of `sizes`, with what they read of x's grid."""
        read = self.attn(self.query_norm(pyramid), places, self.feat_norm(x), [grid])
        pyramid = pyramid + read
        mixed: Tensor = self.ffn(self.ffn_norm(pyramid), sizes)
        return pyramid + mixed


class Interaction(nn.Module):
    """The trade around one group of blocks; the last group's takes three times."""

    def __init__(self, width: int, heads: int, *, last: bool) -> None:
        super().__init__()
        self.injector = Injector(width, heads)
        self.extractor = Extractor(width, heads)
        self.extra_extractors: nn.ModuleList | None = None
        if last:
            self.extra_extractors = nn.ModuleList(Extractor(width, heads) for _ in range(2))

    def inject(self, x: Tensor, places: Tensor, pyramid: Tensor, sizes: Sequence[Size]) -> Tensor:
        """The tokens before the group."""
        injected: Tensor = self.injector(x, places, pyramid, sizes)
        return injected

    def extract(
        self, pyramid: Tensor, places: Tensor, sizes: Sequence[Size], x: Tensor, grid: Size
    ) -> Tensor:
        """The pyramid after the group."""
        for extractor in self._extractors():
            pyramid = extractor(pyramid, places, sizes, x, grid)
        return pyramid

    def _extractors(self) -> list[Extractor]:
        return [self.extractor, *(cast(Extractor, e) for e in self.extra_extractors or ())]

    def cost(self, tokens: int, places: int) -> int:
        """Multiply-adds for so many tokens and places of the pyramid."""
        total = self.injector.attn.cost(tokens, places)
        attention, ffn = self.extractor.attn, self.extractor.ffn
        hidden = ffn.fc1.out_features
        linear = 2 * ffn.fc1.weight.numel() + 9 * hidden
        return total + len(self._extractors()) * (attention.cost(places, tokens) + places * linear)


class SpatialPrior(nn.Module):
    """The pyramid to begin with, of strides 4, 8, 16 and 32, by convolutions of the image."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        # Keys are indices of the official Sequential; relus and the pooling have no weights.
        stem: dict[str, nn.Module] = {}
        for i, (channels, stride) in enumerate(((3, 2), (inner, 1), (inner, 1))):
            stem |= _conv_norm(channels, inner, stride, first=3 * i)
        self.stem = nn.ModuleDict(stem)
        self.conv2 = nn.ModuleDict(_conv_norm(inner, 2 * inner, 2))
        self.conv3 = nn.ModuleDict(_conv_norm(2 * inner, 4 * inner, 2))
        self.conv4 = nn.ModuleDict(_conv_norm(4 * inner, 4 * inner, 2))
        for level, factor in enumerate((1, 2, 4, 4), start=1):
            self.add_module(f"fc{level}", nn.Conv2d(factor * inner, width, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Four maps (batch, width, height, width), finest first."""
        x = images.to(cast(nn.Conv2d, self.get_submodule("fc1")).weight.dtype)
        for first in (0, 3, 6):
            x = _convolve(self.stem, x, first)
        x = functional.max_pool2d(wide(x), 3, 2, padding=1).to(x.dtype)
        maps = [x]
        for layers in (self.conv2, self.conv3, self.conv4):
            maps.append(_convolve(layers, maps[-1]))
        return [wide(self.get_submodule(f"fc{i}")(x)) for i, x in enumerate(maps, start=1)]

    def cost(self, image: Size) -> int:
        """Multiply-adds for one image of this (height, width)."""
        half, *levels = (math.prod(side // s for side in image) for s in (2, 4, 8, 16, 32))
        parts = (self.conv2, self.conv3, self.conv4)
        total = half * conv_weights(self.stem)
        total += sum(
            area * conv_weights(part) for area, part in zip(levels[1:], parts, strict=True)
        )
        fcs = (self.get_submodule(f"fc{i}") for i in range(1, 5))
        return total + sum(area * conv_weights(fc) for area, fc in zip(levels, fcs, strict=True))


def _conv_norm(channels: int, width: int, stride: int, first: int = 0) -> dict[str, nn.Module]:
    conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    return {str(first): conv, str(first + 1): nn.BatchNorm2d(width)}


def _convolve(layers: nn.ModuleDict, x: Tensor, first: int = 0) -> Tensor:
    conv = cast(nn.Conv2d, layers[str(first)])
    folded = fold_batch_norm(conv, cast(nn.BatchNorm2d, layers[str(first + 1)]))
    weight, bias = (part.to(x.dtype) for part in folded)
    return torch.relu(functional.conv2d(x, weight, bias, conv.stride, conv.padding))
