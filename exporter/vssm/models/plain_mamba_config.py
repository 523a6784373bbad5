"""PlainMamba's configuration: the sizes of the official constructor, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

_POSITIVE = (
    *("depth", "d_model", "d_state", "conv_size", "expand", "num_classes", "stem_width"),
    "patch_size",
)


@dataclass(frozen=True)
class PlainMambaConfig:
    """The sizes of the official constructor under this package's names.

    `stem_convs` are the 3x3 convolutions between the first one and the projection to patches;
    `layers_with_dwconv` counts from 0, as the official keys do.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    depth: int = 24
    d_model: int = 192
    d_state: int = 16
    conv_size: int = 7
    expand: int = 2
    dt_rank: int | None = None
    num_classes: int = 1000
    stem_width: int = 64
    stem_convs: int = 2
    layers_with_dwconv: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers_with_dwconv", tuple(self.layers_with_dwconv))
        if not isinstance(self.image_size, int):  # JSON knows lists only
            object.__setattr__(self, "image_size", tuple(self.image_size))
            if len(self.image_size) != 2:
                raise ValueError(
                    f"image_size={self.image_size} has not two sides; give (height, width)"
                )
        for name in (*_POSITIVE, *(() if self.dt_rank is None else ("dt_rank",))):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; give a positive size")
        if min(self.image_height_width) < 1:
            raise ValueError(f"image_size={self.image_size} has no pixels; give a positive size")
        if self.patch_size % 2:
            raise ValueError(
                f"patch_size={self.patch_size} is odd, but the stem halves the image before it is "
                "cut into patches; give an even size"
            )
        if self.conv_size % 2 == 0:
            raise ValueError(
                f"conv_size={self.conv_size} is even, so that the grid convolution has no centre; "
                "give an odd size"
            )
        if self.stem_convs < 0:
            raise ValueError(f"stem_convs={self.stem_convs} is negative; give 0 or more")
        outside = [layer for layer in self.layers_with_dwconv if not 0 <= layer < self.depth]
        if outside:
            raise ValueError(
                f"layers_with_dwconv={self.layers_with_dwconv} names {outside[0]}, outside the "
                f"layers 0 to {self.depth - 1}; layers are counted from 0 here"
            )

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Image size in pixels as (height, width)."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns): the halved image is padded to whole patches."""
        height, width = (
            math.ceil(math.ceil(side / 2) / self.projection_size)
            for side in self.image_height_width
        )
        return height, width

    @property
    def projection_size(self) -> int:
        """Side of a patch in the halved image."""
        return self.patch_size // 2

    @property
    def seqlen(self) -> int:
        """Tokens before pruning."""
        return math.prod(self.grid)

    @property
    def d_inner(self) -> int:
        """Width of the scan."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """Width of the step size's low-rank projection."""
        return self.dt_rank or math.ceil(self.d_model / 16)
