"""Vim for dense prediction: one list of tokens, read after some blocks and made into maps.

Source: the numbers of the public code of Zhu et al., arXiv:2401.09417. The small segmenter taps the
stream and turns it by its rotary embedding first, as the next block sees it; the last tap is not
turned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.errors import check_choice
from vssm.models.base import BlockCost, ImageSized
from vssm.models.dense.base import (
    DenseModel,
    Levels,
    check_restoring,
    check_taps,
    classifier_positions,
)
from vssm.models.dense.cascade import (
    CASCADE_WEIGHTS,
    CascadeHeads,
    CascadeProposalHead,
    SimpleFeaturePyramid,
)
from vssm.models.dense.detector import REGION, STRIDES, Detector, final, halved, of_label
from vssm.models.dense.heads import Size
from vssm.models.dense.regions import (
    DetectionRules,
    Detections,
    clipped,
    moved,
    read_regions,
)
from vssm.models.dense.segmenter import Segmenter
from vssm.models.layers import RMSNorm, fold_batch_norm, resize_grid, to_map, wide
from vssm.models.rotary import Rotation, rope_tables
from vssm.models.vim import (
    PatchEmbed,
    VimBlock,
    VimConfig,
    block_cost,
    patch_cost,
    refuse_schedule,
    run_blocks,
    stays_wide,
)
from vssm.pruning.restore import Restoration
from vssm.pruning.schedule import Schedule, TokenLayout, plan_stages
from vssm.pruning.select import Tokens
from vssm.pruning.walks import LineWalks

TAPPED_STREAMS = ("mixer", "sum")
_PATCH_SIZES = (8, 16)


@dataclass(frozen=True)
class VimBackboneConfig(ImageSized):
    """The backbone's switches under this package's names.

    `table_size` is the side of the images that the checkpoint's position tables are for; at another
    `image_size` they are resized in the forward pass. `divide_out` halves the sum of the directions
    (official if_divide_out), `rope` turns both streams before every block.
    """

    image_size: int | tuple[int, int] = 512
    table_size: int = 512
    patch_size: int = 16
    depth: int = 24
    d_model: int = 192
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    divide_out: bool = True
    rope: bool = False
    rope_grid: int = 14

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("table_size", "patch_size")
        if self.table_size % self.patch_size:
            raise ValueError(
                f"table_size={self.table_size} is not a multiple of patch_size={self.patch_size}; "
                "give the side of the images that the checkpoint was trained with"
            )
        # For its errors alone.
        _ = self.vim

    @property
    def vim(self) -> VimConfig:
        """The blocks' sizes as a classifier has them."""
        names = [f.name for f in fields(VimBackboneConfig) if f.name != "table_size"]
        return VimConfig(
            **{name: getattr(self, name) for name in names},
            stride=self.patch_size,
            class_token="none",
            rope_residual=self.rope,
        )

    @property
    def table_grid(self) -> Size:
        """Patches of the checkpoint's images as (rows, columns)."""
        side = self.table_size // self.patch_size
        return side, side


@dataclass(frozen=True)
class VimSegmenterConfig(VimBackboneConfig):
    """The backbone, where it is read, and the widths of the heads.

    `taps` are the blocks, 1-based, whose outputs are read, the last block among them; `tap_stream`
    says what of them: "mixer", the mixer's output alone, or "sum", that and the residual.
    """

    taps: tuple[int, ...] = (6, 12, 18, 24)
    tap_stream: str = "mixer"
    head_width: int = 192
    auxiliary_width: int = 256
    num_classes: int = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        check_taps(self.taps, self.depth)
        self.check_positive("head_width", "auxiliary_width", "num_classes")
        check_choice("tap_stream", self.tap_stream, TAPPED_STREAMS)
        if self.patch_size not in _PATCH_SIZES:
            raise ValueError(
                f"patch_size={self.patch_size}: the neck is made for patches of 8 and 16; give one"
            )
        if min(map(min, self.level_sizes)) < 1:
            raise ValueError(
                f"image_size={self.image_size} leaves no place in the coarsest level, which halves "
                f"the grid of patches; give at least {2 * self.patch_size} a side"
            )

    @property
    def level_sizes(self) -> tuple[Size, ...]:
        """(height, width) of the neck's maps, finest first: strides 4, 8, 16 and 32."""
        rows, columns = self.vim.grid
        scale = {16: 4, 8: 2}[self.patch_size]
        return tuple((rows * scale // s, columns * scale // s) for s in (1, 2, 4, 8))


class VimTrunk(nn.Module):
    """Patches, positions and blocks, under the official keys of a model without class token."""

    def __init__(self, config: VimBackboneConfig) -> None:
        super().__init__()
        self.config, self.vim = config, config.vim
        self.patch_embed = PatchEmbed(self.vim)
        patches = math.prod(config.table_grid)
        self.pos_embed = nn.Parameter(torch.zeros(1, patches, config.d_model))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if config.rope:
            self.rope = rope_tables(config.d_model, config.table_grid, config.rope_grid)
            if self.vim.grid != config.table_grid:
                # The checkpoint's tables are of its own grid and stay as they are.
                self.rope_here = rope_tables(
                    config.d_model, self.vim.grid, config.rope_grid, persistent=False
                )
        self.layers = nn.ModuleList(VimBlock(self.vim) for _ in range(config.depth))

    @property
    def rotation(self) -> Rotation:
        """The rotary embedding of this grid."""
        if not self.config.rope:
            return Rotation(None, with_residual=False)
        here = self.rope if self.vim.grid == self.config.table_grid else self.rope_here
        return Rotation(here, with_residual=True)

    def embed(self, images: Tensor) -> Tensor:
        """Images to tokens (batch, patches, d_model), positions added."""
        positions = wide(self.pos_embed)
        if self.vim.grid != self.config.table_grid:
            positions = resize_grid(positions, self.config.table_grid, self.vim.grid)
        tokens: Tensor = self.patch_embed(images)
        return tokens + positions

    def tapped(
        self, model: DenseModel, images: Tensor, taps: Sequence[int], with_blocks: bool
    ) -> tuple[list[tuple[Tensor, Tensor]], Levels]:
        """Both streams at every position after some blocks, and the pass without maps.

        Args:
            model: says where it prunes, by what and with which backend.
            images: (batch, 3, height, width).
            taps: numbers of blocks, 1-based, ascending.
            with_blocks: whether the blocks' outputs are kept.
        """
        seqlen = self.vim.patches
        tokens = Tokens.dense(LineWalks(seqlen, 2, images.device), seqlen, images.device)
        restore = "frozen" if model.schedule is None else model.schedule.restore
        restoration = Restoration(restore, backend=model.backend)
        tapped: list[tuple[Tensor, Tensor]] = []
        blocks: list[tuple[Tensor, Tensor | None]] = []

        def see(number: int, hidden: Tensor, residual: Tensor, present: Tokens) -> None:
            if with_blocks:
                blocks.append((hidden, residual))
            if number in taps:
                full = restoration.full([hidden, residual], present)
                tapped.append((full[0], full[1]))
            if number in model.stages:
                restoration.before_stage([hidden, residual], present)

        residual = self.embed(images)
        *_, chosen = run_blocks(
            model, self.layers, residual, tokens, rotation=self.rotation, see=see
        )
        return tapped, Levels({}, chosen, blocks)

    def turned(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """The sum of full streams as the next block sees it: turned by the rotary embedding."""
        seqlen = self.vim.patches
        walks = LineWalks(seqlen, 2, hidden.device)
        tokens = Tokens.dense(walks, seqlen, hidden.device)
        turned, residual = self.rotation(hidden, residual, tokens)
        return residual if turned is None else residual + turned


class VimDense(DenseModel):
    """What a Vim with a dense head is, whatever the head."""

    config: VimBackboneConfig

    def __init__(self, config: VimBackboneConfig, schedule: Schedule | None, *, name: str) -> None:
        super().__init__()
        check_restoring(schedule)
        refuse_schedule(config.vim, schedule)
        self.name, self.config, self.schedule = name, config, schedule
        self.image_size, self.traced_blocks = config.image_height_width, config.depth
        # Without a class token there is none that would make the count odd.
        self.layout = TokenLayout(config.vim.patches, None, keep_odd=False, restores=True)
        self.stages = plan_stages(schedule, self.layout, config.depth)

    def fixed_cost(self) -> int:
        """Multiply-adds of the patch embedding, the neck and the head."""
        return patch_cost(self.config.vim) + self.neck_cost() + self.head_cost()

    def block_cost(self) -> BlockCost:
        """Cost of any block, by token."""
        return block_cost(self.config.vim)


class Double(nn.ModuleDict):
    """Twice the sides: one transposed convolution, entry 0 of the official Sequential."""

    def __init__(self, width: int) -> None:
        super().__init__({"0": nn.ConvTranspose2d(width, width, 2, 2)})

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, height, width) to (batch, width, 2 * height, 2 * width)."""
        conv = cast(nn.ConvTranspose2d, self["0"])
        return wide(conv(x.to(conv.weight.dtype)))


class Enlarge(nn.ModuleDict):
    """Four times the sides: two transposed convolutions, a norm and a GELU between them."""

    def __init__(self, width: int) -> None:
        # Keys are indices of the official Sequential, whose GELU has no weights.
        super().__init__(
            {
                "0": nn.ConvTranspose2d(width, width, 2, 2),
                "1": nn.BatchNorm2d(width),
                "3": nn.ConvTranspose2d(width, width, 2, 2),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, height, width) to (batch, width, 4 * height, 4 * width)."""
        first, last = (cast(nn.ConvTranspose2d, self[key]) for key in ("0", "3"))
        dtype = last.weight.dtype
        if self.training:
            return wide(last(functional.gelu(self["1"](first(x.to(dtype))))))
        folded = fold_batch_norm(first, cast(nn.BatchNorm2d, self["1"]))
        weight, bias = (part.to(dtype) for part in folded)
        x = functional.gelu(functional.conv_transpose2d(x.to(dtype), weight, bias, stride=2))
        return wide(last(x))


class VimSegmenterBackbone(VimTrunk):
    """The trunk with its neck; `norm_f` is in the checkpoints, and nothing reads it."""

    def __init__(self, config: VimSegmenterConfig) -> None:
        super().__init__(config)
        width = config.d_model
        self.norm_f = RMSNorm(width, eps=self.vim.norm_eps)
        self.fpn1: Enlarge | Double = Double(width)
        if config.patch_size == 16:
            self.fpn1, self.fpn2 = Enlarge(width), Double(width)

    def neck(self, maps: list[Tensor]) -> list[Tensor]:
        """The four taps as maps of one size to levels of strides 4, 8, 16 and 32."""
        pool = functional.max_pool2d
        first = self.fpn1(maps[0])
        if self.config.patch_size == 16:
            return [first, self.fpn2(maps[1]), maps[2], pool(maps[3], 2)]
        return [first, maps[1], pool(maps[2], 2), pool(maps[3], 4)]

    def neck_cost(self) -> int:
        """Multiply-adds of the transposed convolutions: each pixel made reads one place."""
        area, square = self.vim.patches, self.config.d_model**2
        # Each makes four pixels of a place; the second of fpn1 starts from four times the places.
        return area * square * (4 + 16 + 4 if isinstance(self.fpn1, Enlarge) else 4)


class VimSegmenter(VimDense, Segmenter):
    """Vim with UPerNet, under the keys of the official segmentation code.

    Args:
        config: architecture.
        schedule: pruning or merging between blocks, None for the dense model.
        name: for reports and model.json.

    Raises:
        ValueError: a schedule's block lies outside the model.
        UnsupportedError: the schedule asks for what this model has not.
    """

    config: VimSegmenterConfig
    auxiliary_level = 2
    own_parts = ("fpn", "rope.")  # rotary tables are of a grid, and nothing that was learnt
    classifier_parts = ("cls_token", "head.", "rope.")

    def __init__(
        self,
        config: VimSegmenterConfig,
        schedule: Schedule | None = None,
        *,
        name: str = "vim_segmenter",
    ) -> None:
        super().__init__(config, schedule, name=name)
        self.num_classes = config.num_classes
        self.level_sizes = config.level_sizes
        self.feature_names = tuple(f"neck{i}" for i in range(len(config.taps)))
        self.backbone = VimSegmenterBackbone(config)
        self._add_heads((config.d_model,) * 4, config.head_width, config.auxiliary_width)

    def stays_wide(self, name: str) -> bool:
        """Norms, positions, what the scan takes as float32, and what is folded with a norm."""
        folded = name.startswith("backbone.fpn1.0.") and isinstance(self.backbone.fpn1, Enlarge)
        return folded or stays_wide(name) or super().stays_wide(name)

    def blocks_on_maps(self) -> list[tuple[nn.Module, tuple[int, int]]]:
        """Every block on the grid of patches."""
        return [(layer, self.config.vim.grid) for layer in self.backbone.layers]

    def _levels(self, images: Tensor, with_blocks: bool) -> Levels:
        tapped, found = self.backbone.tapped(self, images, self.config.taps, with_blocks)
        taps = [
            self._tap(block, *streams)
            for block, streams in zip(self.config.taps, tapped, strict=True)
        ]
        # Wide: a mixer's output has the projections' dtype, and pooling has no bfloat16 in ONNX.
        maps = [to_map(wide(tap), self.config.vim.grid) for tap in taps]
        tensors = {f"tap{i}": x for i, x in enumerate(maps)}
        tensors |= zip(self.feature_names, self.backbone.neck(maps), strict=True)
        return replace(found, tensors=tensors)

    def adapt_classifier(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The table of positions for the grid of the checkpoints, without class tokens.

        Raises:
            CheckpointError: it is of no square grid.
        """
        return classifier_positions(state, self.config.table_grid)

    def _tap(self, number: int, hidden: Tensor, residual: Tensor) -> Tensor:
        """What a tap reads of the full streams after a block."""
        if self.config.tap_stream == "mixer":
            return hidden
        # The official code taps the next block's residual, which is turned already.
        if number < self.config.depth:
            return self.backbone.turned(hidden, residual)
        return residual + hidden

    def neck_cost(self) -> int:
        """Multiply-adds between the taps and the head."""
        return self.backbone.neck_cost()


@dataclass(frozen=True)
class VimDetectorConfig(VimBackboneConfig, DetectionRules):
    """The backbone, the widths of the pyramid and of the heads that read regions, and what is told.

    The official configurations leave if_divide_out out, which was false when they were written.
    """

    image_size: int | tuple[int, int] = 1024
    table_size: int = 1024
    divide_out: bool = False
    rope: bool = True
    neck_width: int = 256
    region_width: int = 1024
    num_classes: int = 80

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rules()
        self.check_positive("neck_width", "region_width", "num_classes")
        if min(self.vim.grid) < 2:
            raise ValueError(
                f"image_size={self.image_size} leaves no place in level p5, which halves the grid "
                f"of patches; give at least {2 * self.patch_size} a side"
            )


class VimDetectorBackbone(SimpleFeaturePyramid):
    """The pyramid around the trunk, which has the key `net`."""

    def __init__(self, config: VimDetectorConfig) -> None:
        super().__init__(config.d_model, config.neck_width)
        self.net = VimTrunk(config)


class VimDetector(VimDense, Detector):
    """Vim with a simple feature pyramid and Cascade Mask R-CNN, under detectron2's keys.

    Args:
        config: architecture.
        schedule: pruning or merging between blocks, None for the dense model.
        name: for reports and model.json.

    Raises:
        ValueError: a schedule's block lies outside the model.
        UnsupportedError: the schedule asks for what this model has not.
    """

    config: VimDetectorConfig
    feature_names = tuple(f"p{i}" for i in range(2, 7))
    dense_names = tuple(f"rpn.{part}{i}" for i in range(5) for part in ("logits", "deltas"))

    def __init__(
        self,
        config: VimDetectorConfig,
        schedule: Schedule | None = None,
        *,
        name: str = "vim_detector",
    ) -> None:
        super().__init__(config, schedule, name=name)
        self.num_classes = config.num_classes
        rows, columns = config.vim.grid
        finest = tuple((rows * 4 // s, columns * 4 // s) for s in (1, 2, 4, 8))
        self.level_sizes = halved(finest, 1)
        self.backbone = VimDetectorBackbone(config)
        self.proposal_generator = nn.ModuleDict(
            {"rpn_head": CascadeProposalHead(config.neck_width)}
        )
        self.roi_heads = CascadeHeads(config.neck_width, config.region_width, config.num_classes)

    def stays_wide(self, name: str) -> bool:
        """Norms, positions, and what the scan takes as float32."""
        return super().stays_wide(name) or (name.startswith("backbone.net.") and stays_wide(name))

    def _levels(self, images: Tensor, with_blocks: bool) -> Levels:
        tapped, found = self.backbone.net.tapped(self, images, [self.config.depth], with_blocks)
        hidden, residual = tapped[0]
        last = to_map(residual + hidden, self.config.vim.grid)
        levels = zip(self.feature_names, self.backbone.levels(last), strict=True)
        return replace(found, tensors={"last_feat": last, **dict(levels)})

    @property
    def dense_head(self) -> nn.Module:
        """The region proposals' head."""
        return self.proposal_generator["rpn_head"]

    def _detect(
        self,
        levels: Sequence[Tensor],
        dense: Sequence[tuple[Tensor, Tensor]],
        limits: Tensor,
        rules: DetectionRules,
    ) -> Detections:
        boxes, _ = self._proposals(dense, limits, rules, None)
        heads = self.roi_heads
        shares = []
        for stage, weights in enumerate(CASCADE_WEIGHTS):
            features = heads.box_head[stage](self.read(levels, boxes, REGION))
            classes, deltas = heads.box_predictor[stage](features)
            # Each stage moves the boxes that the one before it gave.
            boxes = clipped(moved(boxes, deltas, least=None, weights=weights), limits)
            shares.append(classes.softmax(1)[:, :-1])
        mean = torch.stack(shares).mean(0)
        box, score, label = final(boxes[:, None], mean, rules)
        masks = heads.mask_head(self.read(levels, box, 2 * REGION)).sigmoid()
        return Detections(box, score, label, of_label(masks, label))

    def read(self, levels: Sequence[Tensor], boxes: Tensor, side: int) -> Tensor:
        """What the region heads read of boxes (n, 4): (n, channels, side, side).

        Args:
            levels: the first four or more of one image, (channels, height, width).
            boxes: in pixels of the image.
            side: 7 for the box head, 14 for the mask head.
        """
        lengths = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        index = (4 + (lengths / 224 + 1e-8).log2()).floor().clamp(2, 5).long() - 2
        return read_regions(levels[:4], STRIDES[:4], boxes, side, index)

    def neck_cost(self) -> int:
        """Multiply-adds of the pyramid."""
        return self.backbone.cost(self.config.vim.grid)
