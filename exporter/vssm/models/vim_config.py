"""Vim's configuration: the switches of the official constructor, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vssm.models.vim_mixer import VimMixerConfig

CLASS_TOKENS = ("middle", "head", "double", "none")
POOLS = ("mean", "max", "last")


@dataclass(frozen=True)
class VimConfig:
    """The switches of the official constructor under this package's names.

    `class_token` is the place of the class token; without one `pool` reads the tokens. `divide_out`
    halves the sum of both directions (official if_divide_out; the released models all do).
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    stride: int = 16
    depth: int = 24
    d_model: int = 192
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    num_classes: int = 1000
    class_token: str = "middle"
    pool: str = "mean"
    bimamba: str = "v2"
    bidirectional_layers: bool = False
    divide_out: bool = True
    rms_norm: bool = True
    norm_eps: float = 1e-5
    rope: bool = False
    rope_residual: bool = False
    rope_grid: int = 14
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int):  # JSON knows lists only
            object.__setattr__(self, "image_size", tuple(self.image_size))
            if len(self.image_size) != 2:
                raise ValueError(
                    f"image_size={self.image_size} has not two sides; give (height, width)"
                )
        for name, allowed in (("class_token", CLASS_TOKENS), ("pool", POOLS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}; choose one"
                )
        for name in (
            "patch_size",
            "stride",
            "depth",
            "d_model",
            "d_state",
            "d_conv",
            "expand",
            "num_classes",
            *(() if self.dt_rank is None else ("dt_rank",)),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; give a positive size")
        if min(self.image_height_width) < self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is smaller than patch_size={self.patch_size}; "
                "give a larger image"
            )
        if self.rope and self.class_token == "double":
            raise ValueError("rope=True with class_token='double': no released model; use another")
        if self.rope and self.d_model % 4:
            raise ValueError(
                f"d_model={self.d_model} with rope=True is not a multiple of 4, which rows and "
                "columns need to turn pairs of channels; give one that is"
            )
        if self.bidirectional_layers and (self.bimamba != "none" or self.depth % 2):
            raise ValueError(
                "bidirectional_layers=True needs bimamba='none' and an even depth: layers work in "
                "pairs, one in each direction"
            )

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Image size in pixels as (height, width)."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        height, width = self.image_height_width
        return tuple((side - self.patch_size) // self.stride + 1 for side in (height, width))  # type: ignore[return-value]

    @property
    def patches(self) -> int:
        """Number of patch tokens."""
        return math.prod(self.grid)

    @property
    def class_places(self) -> tuple[int, ...]:
        """Places of the class tokens among all tokens."""
        if self.class_token == "double":
            return 0, self.patches + 1
        return {"middle": (self.patches // 2,), "head": (0,), "none": ()}[self.class_token]

    @property
    def seqlen(self) -> int:
        """Tokens before pruning, class tokens included."""
        return self.patches + len(self.class_places)

    @property
    def mixer(self) -> VimMixerConfig:
        """Sizes of every block's mixer."""
        return VimMixerConfig(
            d_model=self.d_model,
            d_inner=self.expand * self.d_model,
            d_state=self.d_state,
            d_conv=self.d_conv,
            dt_rank=self.dt_rank or math.ceil(self.d_model / 16),
            bimamba=self.bimamba,
            divide_out=self.divide_out,
            layer_scale=self.layer_scale,
        )
