"""PlainMamba's patch embedding: a convolutional stem, then patches of the halved image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.models.layers import fold_batch_norm, wide
from vssm.models.plain_mamba_config import PlainMambaConfig


class PatchEmbed(nn.Module):
    """Convolutions with batch norm and relu at half the image's size, then the projection.

    The official keys: `stem.0`, `stem.1` the first convolution and its norm, `convs.{3i}`,
    `convs.{3i+1}` the others, `projection`.
    """

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        width, side = config.stem_width, config.projection_size
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width)
        )
        convs: list[nn.Module] = []
        for _ in range(config.stem_convs):
            conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
            convs += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.convs = nn.Sequential(*convs)
        self.projection = nn.Conv2d(width, config.d_model, side, stride=side)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) to row-major tokens (batch, seqlen, d_model)."""
        dtype = self.projection.weight.dtype
        x = images.to(dtype)
        for conv, norm in self._normed_convs():
            weight, bias = (t.to(dtype) for t in fold_batch_norm(conv, norm))
            x = functional.conv2d(x, weight, bias, conv.stride, conv.padding)
            x = torch.relu(x)
        below, right = (-side % self.projection.stride[0] for side in x.shape[2:])
        if below or right:
            x = functional.pad(x, (0, right, 0, below))
        return wide(self.projection(x)).flatten(2).transpose(1, 2)

    def _normed_convs(self) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        modules = [*self.stem, *self.convs]
        convs = [m for m in modules if isinstance(m, nn.Conv2d)]
        norms = [m for m in modules if isinstance(m, nn.BatchNorm2d)]
        return zip(convs, norms, strict=True)
