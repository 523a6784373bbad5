"""GroupMamba's configuration: the switches of the official constructor, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from vssm.models.cross_scan import CrossScanConfig

GROUPS: Final = 4


@dataclass(frozen=True)
class GroupMambaConfig:
    """The switches of the official constructor under this package's names.

    `widths`, `depths` and `mlp_ratios` have one entry a stage; `distillation` averages two heads.
    The defaults are groupmamba_tiny's.
    """

    image_size: int | tuple[int, int] = 224
    stem_width: int = 32
    widths: tuple[int, ...] = (64, 128, 348, 448)
    depths: tuple[int, ...] = (3, 4, 9, 3)
    mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
    d_state: int = 1
    dt_rank: int | None = None
    reduction: int = 16
    distillation: bool = True
    num_classes: int = 1000

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "mlp_ratios"):  # JSON knows lists only
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
            if len(self.image_size) != 2:
                raise ValueError(
                    f"image_size={self.image_size} has not two sides; give (height, width)"
                )
        if not len(self.widths) == len(self.depths) == len(self.mlp_ratios) > 0:
            raise ValueError(
                f"widths={self.widths}, depths={self.depths}, mlp_ratios={self.mlp_ratios} have "
                "not one entry a stage each; give as many of each"
            )
        sizes = {"height": self.image_height_width[0], "width": self.image_height_width[1]}
        sizes |= {name: getattr(self, name) for name in ("stem_width", "d_state", "num_classes")}
        sizes |= {} if self.dt_rank is None else {"dt_rank": self.dt_rank}
        for name in ("widths", "depths", "mlp_ratios"):
            sizes |= {f"{name}[{i}]": size for i, size in enumerate(getattr(self, name))}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} is below 1; give a positive size")
        for width in self.widths:
            if width % GROUPS:
                raise ValueError(
                    f"widths={self.widths}: {width} is not a multiple of {GROUPS}, the groups of "
                    "channels; give one that is"
                )
            if not 1 <= self.reduction <= width:
                raise ValueError(
                    f"reduction={self.reduction} is outside [1, {width}], the narrowest stage; "
                    "give a smaller one"
                )

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Image size in pixels as (height, width)."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size

    @property
    def depth(self) -> int:
        """Blocks of all stages and the class block."""
        return sum(self.depths) + 1

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Map of every stage as (rows, columns); odd sides are covered, not dropped."""
        shifts = range(2, 2 + len(self.depths))
        height, width = self.image_height_width
        return tuple((math.ceil(height / 2**s), math.ceil(width / 2**s)) for s in shifts)

    def mixer(self, stage: int) -> CrossScanConfig:
        """Sizes of each of the four mixers of a block."""
        width = self.widths[stage] // GROUPS
        return CrossScanConfig(
            d_model=width,
            d_inner=width,
            d_state=self.d_state,
            dt_rank=self.dt_rank or math.ceil(width / 16),
            directions=1,
            conv_bias=True,
            gate=True,
        )
