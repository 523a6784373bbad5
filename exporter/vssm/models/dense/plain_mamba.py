"""PlainMamba for dense prediction: tokens on a grid of any size, read after some blocks.

Source: the numbers of the public code of Yang et al., arXiv:2403.17695. The position table stays
as the checkpoint has it, for images of 224 pixels, and is resized in the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from vssm.errors import UnsupportedError
from vssm.models.base import BlockCost, ImageSized
from vssm.models.dense.heads import Size
from vssm.models.dense.segmenter import (
    Levels,
    Segmenter,
    check_positive,
    check_taps,
    only_pruning,
)
from vssm.models.layers import LayerNorm, resize_grid, to_map, wide
from vssm.models.plain_mamba import (
    DIRECTIONS,
    FINAL_NORM_EPS,
    GridWalks,
    PatchEmbed,
    PlainMambaBlock,
    PlainMambaConfig,
    block_cost,
    run_blocks,
    stays_wide,
    stem_cost,
)
from vssm.pruning.restore import Restoration
from vssm.pruning.schedule import PruneSchedule, Schedule, TokenLayout, plan_stages
from vssm.pruning.select import Tokens


@dataclass(frozen=True)
class PlainMambaBackboneConfig(ImageSized):
    """The backbone's sizes under this package's names.

    `table_size` is the side of the images that the checkpoint's position table is for.
    """

    image_size: int | tuple[int, int] = 512
    table_size: int = 224
    patch_size: int = 16
    depth: int = 24
    d_model: int = 192
    d_state: int = 16
    conv_size: int = 7
    expand: int = 2
    dt_rank: int | None = None
    stem_width: int = 64
    stem_convs: int = 2
    layers_with_dwconv: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int):  # JSON knows lists only
            object.__setattr__(self, "image_size", tuple(self.image_size))
        object.__setattr__(self, "layers_with_dwconv", tuple(self.layers_with_dwconv))
        check_positive(self, "table_size")
        # For its errors alone.
        _ = self.plain_mamba

    @property
    def plain_mamba(self) -> PlainMambaConfig:
        """The blocks' sizes as a classifier has them."""
        return self._at(self.image_size)

    @property
    def table_grid(self) -> Size:
        """Patches of the checkpoint's images as (rows, columns)."""
        return self._at(self.table_size).grid

    def _at(self, image_size: int | tuple[int, int]) -> PlainMambaConfig:
        own = {"image_size", "num_classes"}
        shared = {f.name for f in fields(PlainMambaConfig)} - own
        return PlainMambaConfig(**{n: getattr(self, n) for n in shared}, image_size=image_size)


@dataclass(frozen=True)
class PlainMambaSegmenterConfig(PlainMambaBackboneConfig):
    """The backbone, where it is read, and the widths of the heads.

    `taps` are the blocks, 1-based, whose outputs are read, the last block among them.
    """

    taps: tuple[int, ...] = (6, 12, 18, 24)
    head_width: int = 512
    auxiliary_width: int = 256
    num_classes: int = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "taps", tuple(self.taps))  # JSON knows lists only
        check_taps(self.taps, self.depth)
        check_positive(self, "head_width", "auxiliary_width", "num_classes")


class PlainMambaTrunk(nn.Module):
    """Stem, positions and blocks under their official keys; the checkpoint's position table."""

    def __init__(self, config: PlainMambaBackboneConfig) -> None:
        super().__init__()
        self.config, sizes = config, config.plain_mamba
        self.grid = sizes.grid
        rows, columns = config.table_grid
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns, config.d_model))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed = PatchEmbed(sizes)
        self.layers = nn.ModuleList(
            PlainMambaBlock(sizes, depthwise=layer in config.layers_with_dwconv)
            for layer in range(config.depth)
        )

    def positions(self) -> Tensor:
        """The position table of this grid, (1, seqlen, d_model)."""
        table = wide(self.pos_embed)
        if self.grid == self.config.table_grid:
            return table
        return resize_grid(table, self.config.table_grid, self.grid)


class PlainMambaSegmenterBackbone(PlainMambaTrunk):
    """The trunk with a norm for each tap: that of the last block is `ln1`."""

    def __init__(self, config: PlainMambaSegmenterConfig) -> None:
        super().__init__(config)
        self._norms = {block: f"norm_layer{block - 1}" for block in config.taps[:-1]}
        self._norms[config.taps[-1]] = "ln1"
        for name in self._norms.values():
            self.add_module(name, LayerNorm(config.d_model, eps=FINAL_NORM_EPS))

    def tap(self, block: int, x: Tensor) -> Tensor:
        """The level of the stream (batch, seqlen, d_model) after a block, as a map."""
        return to_map(self.get_submodule(self._norms[block])(x), self.grid)


class PlainMambaSegmenter(Segmenter):
    """PlainMamba with UPerNet, under the keys of the official segmentation code.

    Args:
        config: architecture.
        schedule: pruning between blocks, None for the dense model.
        name: for reports and model.json.

    Raises:
        ValueError: a schedule's block lies outside the model.
        UnsupportedError: the schedule merges, or asks for what this model has not.
    """

    config: PlainMambaSegmenterConfig
    residual_stream = False
    published_directions = DIRECTIONS
    auxiliary_level = 3

    def __init__(
        self,
        config: PlainMambaSegmenterConfig,
        schedule: Schedule | None = None,
        *,
        name: str = "plain_mamba_segmenter",
    ) -> None:
        super().__init__()
        pruning = only_pruning(schedule)
        self.name, self.config, self.schedule = name, config, pruning
        self.image_size, self.num_classes = config.image_height_width, config.num_classes
        self.traced_blocks = config.depth
        _refuse_late_convolutions(config, pruning)
        self.layout = TokenLayout(
            config.plain_mamba.seqlen, None, keep_odd=False, directional=False, restores=True
        )
        self.stages = plan_stages(pruning, self.layout, config.depth)
        self.feature_names = tuple(f"level{i}" for i in range(len(config.taps)))
        # Four levels of one stride.
        self.level_sizes = (config.plain_mamba.grid,) * len(config.taps)
        self.backbone = PlainMambaSegmenterBackbone(config)
        self.walks = GridWalks(config.plain_mamba.grid)
        self._add_heads((config.d_model,) * 4, config.head_width, config.auxiliary_width)

    def stays_wide(self, name: str) -> bool:
        """Norms, positions, what the scan takes as float32, and what is folded with a norm."""
        if name.startswith("backbone.norm_layer"):
            return True
        return super().stays_wide(name) or (name.startswith("backbone.") and stays_wide(name))

    def _levels(self, images: Tensor, with_blocks: bool) -> Levels:
        trunk = self.backbone
        patches = trunk.patch_embed(images)
        x = patches + trunk.positions()
        tensors = {"patch_embed": patches, "tokens": x}
        restoration = Restoration("frozen" if self.schedule is None else self.schedule.restore)
        blocks: list[tuple[Tensor, Tensor | None]] = []

        def see(number: int, x: Tensor, present: Tokens) -> None:
            if with_blocks:
                blocks.append((x, None))
            if number in self.config.taps:
                (full,) = restoration.full([x], present)
                name = self.feature_names[self.config.taps.index(number)]
                tensors[name] = trunk.tap(number, full)
            if number in self.stages:
                restoration.before_stage([x], present)

        tokens = Tokens.dense(self.walks, self.config.plain_mamba.seqlen, images.device)
        _, chosen = run_blocks(self, trunk.layers, x, tokens, stages=self.stages, see=see)
        return Levels(tensors, chosen, blocks)

    def fixed_cost(self) -> int:
        """Multiply-adds of the stem, the depthwise convolutions of some layers and the head."""
        return stem_cost(self.config.plain_mamba) + self.head_cost()

    def block_cost(self) -> BlockCost:
        """Cost of any block, by token."""
        return block_cost(self.config.plain_mamba)


def _refuse_late_convolutions(
    config: PlainMambaBackboneConfig, schedule: PruneSchedule | None
) -> None:
    """Refuse a convolution over the grid of the stream that would read pruned positions.

    Raises:
        UnsupportedError: a layer with one comes after a stage.
    """
    first = min(schedule.ratios, default=0) if schedule is not None else config.depth
    if late := [layer for layer in config.layers_with_dwconv if layer >= first]:
        raise UnsupportedError(
            f"layers_with_dwconv={list(config.layers_with_dwconv)} with a schedule from block "
            f"{first}: the convolution of layer {late[0]}, counted from 0, would read positions "
            "that are pruned; prune after it"
        )
