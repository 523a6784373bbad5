"""PlainMamba for dense prediction: tokens on a grid of any size, read after some blocks.

Source: the numbers of the public code of Yang et al., arXiv:2403.17695. The position table stays
as the checkpoint has it, for images of 224 pixels, and is resized in the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.errors import UnsupportedError, check_choice
from vssm.models.base import BlockCost, ImageSized
from vssm.models.dense.adapter import Interaction, SpatialPrior, centres
from vssm.models.dense.base import (
    DenseModel,
    Levels,
    check_taps,
    classifier_positions,
    only_pruning,
)
from vssm.models.dense.detector import BoxHead, CocoDetector
from vssm.models.dense.heads import Size, upsample
from vssm.models.dense.regions import DetectionRules
from vssm.models.dense.segmenter import Segmenter
from vssm.models.layers import BatchNorm2d, LayerNorm, resize_grid, to_map, to_tokens, wide
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
from vssm.pruning.schedule import PruneSchedule, Schedule, Stage, TokenLayout, plan_stages
from vssm.pruning.select import StageResult, Tokens


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
        super().__post_init__()
        self.check_positive("table_size")
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
        check_taps(self.taps, self.depth)
        self.check_positive("head_width", "auxiliary_width", "num_classes")


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


class PlainMambaDense(DenseModel):
    """What a PlainMamba with a dense head is, whatever the head; it cannot merge."""

    config: PlainMambaBackboneConfig
    schedule: PruneSchedule | None
    stages: dict[int, Stage]
    residual_stream = False
    published_directions = DIRECTIONS

    def __init__(
        self, config: PlainMambaBackboneConfig, schedule: Schedule | None, *, name: str
    ) -> None:
        super().__init__()
        pruning = only_pruning(schedule)
        _refuse_late_convolutions(config, pruning)
        self.name, self.config, self.schedule = name, config, pruning
        self.image_size, self.traced_blocks = config.image_height_width, config.depth
        self.layout = TokenLayout(
            config.plain_mamba.seqlen,
            None,
            keep_odd=False,
            directional=False,
            restores=True,
            full_parameters=True,
        )
        self.stages = plan_stages(pruning, self.layout, config.depth)
        self.walks = GridWalks(config.plain_mamba.grid)

    def block_cost(self) -> BlockCost:
        """Cost of any block, by token."""
        return block_cost(self.config.plain_mamba)


class PlainMambaSegmenter(PlainMambaDense, Segmenter):
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
    auxiliary_level = 3
    own_parts = ("norm_layer",)
    classifier_parts = ("head.",)

    def __init__(
        self,
        config: PlainMambaSegmenterConfig,
        schedule: Schedule | None = None,
        *,
        name: str = "plain_mamba_segmenter",
    ) -> None:
        super().__init__(config, schedule, name=name)
        self.num_classes = config.num_classes
        self.feature_names = tuple(f"level{i}" for i in range(len(config.taps)))
        # Four levels of one stride.
        self.level_sizes = (config.plain_mamba.grid,) * len(config.taps)
        self.backbone = PlainMambaSegmenterBackbone(config)
        self._add_heads((config.d_model,) * 4, config.head_width, config.auxiliary_width)

    def stays_wide(self, name: str) -> bool:
        """Norms, positions, what the scan takes as float32, and what is folded with a norm."""
        if name.startswith("backbone.norm_layer"):
            return True
        return super().stays_wide(name) or (name.startswith("backbone.") and stays_wide(name))

    def blocks_on_maps(self) -> list[tuple[nn.Module, tuple[int, int]]]:
        """Every block on the grid of patches."""
        return [(layer, self.config.plain_mamba.grid) for layer in self.backbone.layers]

    def adapt_classifier(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The table of positions for the grid of the checkpoints.

        Raises:
            CheckpointError: it is of no square grid.
        """
        return classifier_positions(state, self.config.table_grid)

    def _levels(self, images: Tensor, with_blocks: bool) -> Levels:
        trunk = self.backbone
        patches = trunk.patch_embed(images)
        x = patches + trunk.positions()
        tensors = {"patch_embed": patches, "tokens": x}
        restore = "frozen" if self.schedule is None else self.schedule.restore
        restoration = Restoration(restore, backend=self.backend)
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
        *_, chosen = run_blocks(self, trunk.layers, x, tokens, stages=self.stages, see=see)
        return Levels(tensors, chosen, blocks)

    def fixed_cost(self) -> int:
        """Multiply-adds of the stem, the depthwise convolutions of some layers and the head."""
        return stem_cost(self.config.plain_mamba) + self.head_cost()


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


HEADS = ("mask_rcnn", "retinanet")
INJECTORS = ("all", "kept")


@dataclass(frozen=True)
class PlainMambaDetectorConfig(PlainMambaBackboneConfig, DetectionRules):
    """The backbone, the adapter around it, the heads, and what is told.

    `groups` are the last blocks, 1-based, of the four groups that the adapter trades around;
    `injector` says which positions take from the pyramid in a pruned model: "all", or the "kept"
    ones, so that the others stay as they are. `head_convs` are the convolutions of RetinaNet's
    towers, or of Mask R-CNN's box head.
    """

    image_size: int | tuple[int, int] = (800, 1344)
    groups: tuple[int, ...] = (6, 12, 18, 24)
    attention_heads: int = 6
    prior_width: int = 64
    injector: str = "all"
    head: str = "mask_rcnn"
    neck_width: int = 256
    head_convs: int = 4
    region_width: int = 1024
    num_classes: int = 80

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rules()
        check_taps(self.groups, self.depth, "groups")
        self.check_positive("attention_heads", "prior_width", "neck_width", "head_convs")
        self.check_positive("region_width", "num_classes")
        check_choice("head", self.head, HEADS)
        check_choice("injector", self.injector, INJECTORS)
        if self.d_model % self.attention_heads:
            raise ValueError(
                f"attention_heads={self.attention_heads} do not divide d_model={self.d_model}; "
                "give a divisor"
            )
        if any(side % _STRIDE for side in self.image_height_width):
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of {_STRIDE}, the stride of the "
                "adapter's coarsest map; pad the images with zeros at the bottom and the right"
            )

    @property
    def pyramid_sizes(self) -> tuple[Size, ...]:
        """(height, width) of the adapter's maps, of strides 4, 8, 16 and 32."""
        height, width = self.image_height_width
        return tuple((height // s, width // s) for s in (4, 8, 16, 32))


_STRIDE = 32


class PlainMambaAdapter(PlainMambaTrunk):
    """The trunk in four groups, and the pyramid that trades with it before and after each."""

    backend = "auto"  # see VisionModel.use_backend

    def __init__(self, config: PlainMambaDetectorConfig) -> None:
        super().__init__(config)
        self.groups, self.kept_only = config.groups, config.injector == "kept"
        self.sizes = config.pyramid_sizes
        width = config.d_model
        self.level_embed = nn.Parameter(torch.zeros(3, width))
        nn.init.normal_(self.level_embed)
        self.spm = SpatialPrior(config.prior_width, width)
        last = len(config.groups) - 1
        self.interactions = nn.ModuleList(
            Interaction(width, config.attention_heads, last=group == last)
            for group in range(len(config.groups))
        )
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        for level in range(1, 5):
            self.add_module(f"ad_norm{level}", BatchNorm2d(width))

    def trade(
        self, model: PlainMambaDetector, images: Tensor, tokens: Tokens, with_blocks: bool
    ) -> Levels:
        """Four maps `backbone{i}`, and what there was on the way, by official names."""
        finest, *maps = self.spm(images)
        parts = [to_tokens(x) + wide(self.level_embed)[i] for i, x in enumerate(maps)]
        pyramid = torch.cat(parts, dim=1)
        places = torch.cat([centres(size, pyramid) for size in self.sizes[1:]], dim=1)
        tensors = {"spm.c1": finest}
        tensors |= {f"spm.c{i}": to_tokens(x) for i, x in enumerate(maps, start=2)}
        x = self.patch_embed(images) + self.positions()
        chosen: list[StageResult] = []
        blocks: list[tuple[Tensor, Tensor | None]] = []
        first = 0
        for group, last in enumerate(self.groups):
            trade = cast(Interaction, self.interactions[group])
            # Between groups the tokens stand at all positions, those that left as they were then.
            x = self._inject(trade, x, tokens, pyramid)
            x, tokens, results = self._run(model, slice(first, last), x, tokens, blocks)
            chosen += results
            pyramid = trade.extract(pyramid, places, self.sizes[1:], x, self.grid)
            tensors |= {f"interaction{group}.x": x, f"interaction{group}.c": pyramid}
            first = last
        outputs = self._outputs(finest, pyramid, x)
        tensors |= {f"backbone{i}": level for i, level in enumerate(outputs)}
        return Levels(tensors, chosen, blocks if with_blocks else [])

    def _inject(self, trade: Interaction, x: Tensor, tokens: Tokens, pyramid: Tensor) -> Tensor:
        """The tokens at all positions, with what they take from the pyramid."""
        sizes, places = self.sizes[1:], centres(self.grid, x)
        if not self.kept_only or tokens.complete:
            return trade.inject(x, places, pyramid, sizes)
        places = places[0][tokens.position.long()]
        kept = trade.inject(tokens.from_positions(x), places, pyramid, sizes)
        return tokens.onto(x, kept, backend=self.backend)

    def _run(
        self,
        model: PlainMambaDetector,
        group: slice,
        x: Tensor,
        tokens: Tokens,
        blocks: list[tuple[Tensor, Tensor | None]],
    ) -> tuple[Tensor, Tokens, list[StageResult]]:
        """One group of blocks on the tokens present; the stream comes back at all positions."""
        full = x

        def see(number: int, x: Tensor, present: Tokens) -> None:
            nonlocal full
            blocks.append((x, None))
            if number in model.stages:
                full = present.onto(full, x, backend=self.backend)

        x, tokens, results = run_blocks(
            model,
            self.layers[group],
            tokens.from_positions(x),
            tokens,
            stages=model.stages,
            see=see,
            first=group.start,
        )
        return tokens.onto(full, x, backend=self.backend), tokens, results

    def _outputs(self, finest: Tensor, pyramid: Tensor, x: Tensor) -> list[Tensor]:
        """The four maps: the pyramid's, with the tokens' own added, each by a norm of its own."""
        parts = pyramid.split([rows * columns for rows, columns in self.sizes[1:]], dim=1)
        maps = [to_map(part, size) for part, size in zip(parts, self.sizes[1:], strict=True)]
        own = to_map(x, self.grid)
        finest = finest + wide(self.up(maps[0].to(self.up.weight.dtype)))
        maps = [
            finest + upsample(own, self.sizes[0]),
            maps[0] + upsample(own, self.sizes[1]),
            maps[1] + own,
            # Half the size, bilinear: the mean of each four.
            maps[2] + functional.avg_pool2d(own, 2),
        ]
        return [self.get_submodule(f"ad_norm{i}")(x) for i, x in enumerate(maps, start=1)]

    def cost(self) -> int:
        """Multiply-adds of the adapter for one image, dense."""
        tokens = self.grid[0] * self.grid[1]
        areas = [rows * columns for rows, columns in self.sizes]
        pyramid = sum(areas[1:])
        total = self.spm.cost((4 * self.sizes[0][0], 4 * self.sizes[0][1]))
        for trade in self.interactions:
            total += cast(Interaction, trade).cost(tokens, pyramid)
        return total + areas[1] * self.up.weight.numel()


class PlainMambaDetector(PlainMambaDense, CocoDetector):
    """PlainMamba in its adapter, with Mask R-CNN or RetinaNet, under mmdetection's keys.

    Args:
        config: architecture.
        schedule: pruning between blocks, None for the dense model.
        name: for reports and model.json.

    Raises:
        ValueError: a schedule's block lies outside the model.
        UnsupportedError: the schedule merges, or asks for what this model has not.
    """

    config: PlainMambaDetectorConfig

    def __init__(
        self,
        config: PlainMambaDetectorConfig,
        schedule: Schedule | None = None,
        *,
        name: str = "plain_mamba_detector",
    ) -> None:
        super().__init__(config, schedule, name=name)
        self.num_classes = config.num_classes
        if self.schedule is not None and self.schedule.restore != "frozen":
            raise UnsupportedError(
                f"restore={self.schedule.restore!r}: between the adapter's groups the tokens that "
                "left stand as they were; use restore='frozen'"
            )
        self.backbone = PlainMambaAdapter(config)
        widths, convs = (config.d_model,) * 4, config.head_convs
        if config.head == "retinanet":
            self._add_retinanet(widths[1:], config.pyramid_sizes[1:], config.neck_width, convs)
        else:
            box = BoxHead(
                config.neck_width,
                convs=convs,
                linears=1,
                width=config.region_width,
                num_classes=config.num_classes,
            )
            self._add_mask_rcnn(widths, config.pyramid_sizes, box, norm=True)

    def stays_wide(self, name: str) -> bool:
        """Norms, positions, what the scan takes as float32, and what is folded with a norm."""
        prior = ("backbone.spm.stem.", "backbone.spm.conv")
        own = name.startswith(prior) or name.endswith((".gamma", ".level_embed"))
        if own or not name.startswith("backbone."):
            return own or super().stays_wide(name)
        return super().stays_wide(name) or stays_wide(name)

    def _levels(self, images: Tensor, with_blocks: bool) -> Levels:
        tokens = Tokens.dense(self.walks, self.config.plain_mamba.seqlen, images.device)
        found = self.backbone.trade(self, images, tokens, with_blocks)
        maps = [found.tensors[f"backbone{i}"] for i in range(4)]
        if self.config.head == "retinanet":
            maps = maps[1:]
        return replace(found, tensors={**found.tensors, **self._pyramid(maps)})

    def fixed_cost(self) -> int:
        """Multiply-adds of the stem, the adapter, the neck and the dense head."""
        stem = stem_cost(self.config.plain_mamba) + self.backbone.cost()
        return stem + self.neck_cost() + self.head_cost()
