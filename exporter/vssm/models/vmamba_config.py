"""VMamba's configuration: the switches of the official constructor, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from vssm.models.cross_scan import WALKS, CrossScanConfig

# The walks of the official forward types: "v05_noz" and "v0", "v051d_noz", "v052d_noz".
SCANS: Final = {
    "cross": WALKS,
    "unidi": ("rows",) * 4,
    "bidi": ("rows", "rows", "rows_back", "rows_back"),
}
_CHOICES: Final = {
    "patch_embed": ("v1", "v2"),
    "downsample": ("v1", "v2", "v3"),
    "scan": tuple(SCANS),
}


@dataclass(frozen=True)
class VMambaConfig:
    """The switches of the official constructor under this package's names.

    `d_model` is the width of the first stage; each stage has twice that of the one before it.
    `gate` is the official forward type without "_noz". The defaults are vmamba_tiny_s1l8's.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 4
    depths: tuple[int, ...] = (2, 2, 8, 2)
    d_model: int = 96
    d_state: int = 1
    expand: float = 1.0
    dt_rank: int | None = None
    conv_bias: bool = False
    gate: bool = False
    scan: str = "cross"
    mlp_ratio: float = 4.0
    gated_mlp: bool = False
    patch_embed: str = "v2"
    downsample: str = "v3"
    pos_embed: bool = False
    num_classes: int = 1000

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))  # JSON knows lists only
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
            if len(self.image_size) != 2:
                raise ValueError(
                    f"image_size={self.image_size} has not two sides; give (height, width)"
                )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}; choose one"
                )
        sizes = {name: getattr(self, name) for name in ("d_model", "d_state", "num_classes")}
        sizes |= {f"depths[{i}]": depth for i, depth in enumerate(self.depths)}
        sizes |= {"d_inner": int(self.expand * self.d_model)}
        sizes |= {} if self.dt_rank is None else {"dt_rank": self.dt_rank}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} is below 1; give a positive size")
        if not self.depths:
            raise ValueError("depths=() has no stage; give the blocks of each")
        if self.mlp_ratio < 0:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} is negative; 0 leaves the MLP out")
        if self.patch_size < 1 or (self.patch_embed == "v2" and self.patch_size != 4):
            raise ValueError(
                f"patch_size={self.patch_size} with patch_embed={self.patch_embed!r}: v2 halves "
                "the image twice, v1 takes any size from 1; use 4, or v1"
            )
        if min(min(grid) for grid in self.grids) < 1:
            raise ValueError(
                f"image_size={self.image_size} leaves no token in the last of "
                f"{len(self.depths)} stages; give a larger image"
            )

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Image size in pixels as (height, width)."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size

    @property
    def depth(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Map of every stage as (rows, columns)."""
        return tuple(zip(*map(self._sides, self.image_height_width), strict=True))

    def _sides(self, pixels: int) -> list[int]:
        """One side of the map in every stage. Odd sides: v1 pads, v3 covers, v2 drops the last."""
        if self.patch_embed == "v2":
            sides = [math.ceil(math.ceil(pixels / 2) / 2)]
        else:
            sides = [pixels // self.patch_size]
        for _ in self.depths[1:]:
            last = sides[-1]
            sides.append(last // 2 if self.downsample == "v2" else math.ceil(last / 2))
        return sides

    def width(self, stage: int) -> int:
        """Channels of a stage, 0-based."""
        return int(self.d_model * 2**stage)

    def hidden(self, stage: int) -> int:
        """Width inside the MLP of a stage; 0 without one."""
        return int(self.width(stage) * self.mlp_ratio)

    def mixer(self, stage: int) -> CrossScanConfig:
        """Sizes of every mixer of a stage."""
        width = self.width(stage)
        return CrossScanConfig(
            d_model=width,
            d_inner=int(self.expand * width),
            d_state=self.d_state,
            dt_rank=self.dt_rank or math.ceil(width / 16),
            directions=len(SCANS[self.scan]),
            conv_bias=self.conv_bias,
            gate=self.gate,
        )
