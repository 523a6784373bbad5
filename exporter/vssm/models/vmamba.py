"""VMamba: the official architecture and state_dict, tokens channels-last between convolutions.

Source: Liu et al., "VMamba: Visual State Space Model", arXiv:2401.10166, and the numbers of its
public code. A map is a list of row-major tokens; the four scan directions are orders of one node.
The official norms "ln2d" and "ln" are one and the same here: they differ in layout only.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.errors import CheckpointError, check_choice, check_least
from vssm.models.base import (
    BlockCost,
    ForwardDetails,
    ImageSized,
    VisionModel,
    blocks_of_stages,
    details,
    refuse_schedule,
)
from vssm.models.cross_scan import WALKS, CrossScanConfig, CrossScanMixer, MapWalks
from vssm.models.layers import (
    Conv2d,
    LayerNorm,
    Linear,
    check_grid,
    to_map,
    to_tokens,
    wide,
)
from vssm.pruning.schedule import Schedule

# The walks of the official forward types: "v05_noz" and "v0", "v051d_noz", "v052d_noz".
SCANS: Final = {
    "cross": WALKS,
    "unidi": ("rows",) * 4,
    "bidi": ("rows", "rows", "rows_back", "rows_back"),
}


@dataclass(frozen=True)
class VMambaConfig(ImageSized):
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
        super().__post_init__()
        check_choice("patch_embed", self.patch_embed, ("v1", "v2"))
        check_choice("downsample", self.downsample, ("v1", "v2", "v3"))
        check_choice("scan", self.scan, SCANS)
        if not self.depths:
            raise ValueError("depths=() has no stage; give the blocks of each")
        self.check_positive("d_model", "d_state", "dt_rank", "depths", "num_classes")
        # `expand` may be a fraction: what counts is the width it comes to.
        check_least(1, d_inner=int(self.expand * self.d_model))
        check_least(0, mlp_ratio=self.mlp_ratio)  # 0 leaves the MLP out
        if self.patch_size < 1 or (self.patch_embed == "v2" and self.patch_size != 4):
            raise ValueError(
                f"patch_size={self.patch_size} with patch_embed={self.patch_embed!r}: v2 halves "
                "the image twice, v1 takes any size from 1; use 4, or v1"
            )
        self.check_patch(self.patch_size)
        if min(min(grid) for grid in self.grids) < 1:
            raise ValueError(
                f"image_size={self.image_size} leaves no token in the last of "
                f"{len(self.depths)} stages; give a larger image"
            )

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


# The first release; then the one-file code of March 2025.
_NAMES: Final = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"^(layers\.\d+\.blocks\.\d+)\.ln_1\.", r"\1.norm."),
    (r"^(layers\.\d+\.blocks\.\d+)\.self_attention\.", r"\1.op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
    (r"\.op\.x_proj\.weight$", ".op.x_proj_weight"),
    (r"\.op\.dt_projs\.weight$", ".op.dt_projs_weight"),
)
_LINEARS: Final = re.compile(
    r"\.(in_proj|out_proj|fc1|fc2|reduction)\.weight$|^classifier\.head\.weight$"
)
_DIRECTIONS: Final = 4


def adapt_keys(state: dict[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of any official VMamba file under today's keys and shapes.

    Args:
        state: tensors by their names in the file.
        grid: (height, width) of the first stage's map, for a position map.

    Raises:
        CheckpointError: two entries come to one name.
    """
    adapted: dict[str, Tensor] = {}
    for old, value in state.items():
        key = old
        # All in turn, not the first that fits: one name may have an old
        # part in front and another at its end.
        for pattern, name in _NAMES:
            key = re.sub(pattern, name, key)
        # Taking either would be a guess about which of two tensors the file means.
        if key in adapted or (key != old and key in state):
            raise CheckpointError(
                f"key={old!r} is an older name of {key!r}, which the file has too; "
                "save one model's state_dict()"
            )
        adapted[key] = _reshaped(key, value, grid)
    return adapted


def _reshaped(key: str, value: Tensor, grid: tuple[int, int]) -> Tensor:
    # By name as well: a patch embedding of patch_size 1 has this shape too and must keep it.
    if value.dim() == 4 and value.shape[2:] == (1, 1) and _LINEARS.search(key):
        return value.flatten(1)
    by_direction = key.endswith(("x_proj_weight", "dt_projs_weight")) and value.dim() == 2
    # What cannot be split stays as it is; the loader then names the shape that was expected.
    if by_direction and value.shape[0] % _DIRECTIONS == 0:
        return value.reshape(_DIRECTIONS, -1, value.shape[1])
    if key == "pos_embed" and value.dim() == 4 and tuple(value.shape[2:]) != grid:
        check_grid(*value.shape[2:])
        # No resize_grid: this table is a map already, channels first, of any two sides.
        table = functional.interpolate(wide(value), size=grid, mode="bicubic", align_corners=False)
        return table.to(value.dtype)
    return value


NORM_EPS: Final = 1e-5
_WIDE_PARAMETERS = ("A_logs", "Ds", "dt_projs_bias", "pos_embed")


class Mlp(nn.Module):
    """fc1, GELU, fc2; gated: half of fc1's output times the GELU of the other half."""

    def __init__(self, width: int, hidden: int, *, gated: bool = False) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = Linear(width, 2 * hidden if gated else hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        x = self.fc1(x)
        if self.gated:
            # The GELU is on the second half; the official order of
            # the halves is part of the weights.
            x, gate = x.chunk(2, dim=-1)
            x = x * functional.gelu(gate)
        else:
            x = functional.gelu(x)
        mixed: Tensor = self.fc2(x)
        return mixed


class VMambaBlock(nn.Module):
    """x + mix(norm(x)), then x + mlp(norm2(x)) where there is an MLP."""

    def __init__(self, config: VMambaConfig, stage: int) -> None:
        super().__init__()
        width, hidden = config.width(stage), config.hidden(stage)
        self.norm = LayerNorm(width, eps=NORM_EPS)
        self.op = CrossScanMixer(config.mixer(stage))
        self.mlp: Mlp | None = None
        if hidden:
            self.norm2 = LayerNorm(width, eps=NORM_EPS)
            self.mlp = Mlp(width, hidden, gated=config.gated_mlp)

    def forward(self, x: Tensor, walks: MapWalks) -> Tensor:
        """(batch, seqlen, width), the residual stream, to the same."""
        # The residual stream stays float32: halves would be rounded again after every block.
        x = x + wide(self.op(self.norm(x), walks))
        if self.mlp is not None:
            x = x + wide(self.mlp(self.norm2(x)))
        return x


class ConvDownsample(nn.ModuleDict):
    """A strided convolution and a norm: 3x3 with padding (v3) or 2x2 (v2)."""

    def __init__(self, width: int, kernel: int) -> None:
        # v2's 2x2 has no padding and so drops an odd side's last row or column.
        conv = Conv2d(width, 2 * width, kernel, 2, padding=kernel // 2 if kernel % 2 else 0)
        # Keys are indices of the official Sequential, where permutes without weights stand between.
        super().__init__({"1": conv, "3": LayerNorm(2 * width, eps=NORM_EPS)})

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (batch, seqlen, width) of a map to those of a map of half its sides."""
        halved: Tensor = self["3"](to_tokens(self["1"](to_map(x, grid))))
        return halved


class MergeDownsample(nn.Module):
    """v1: the four tokens of each 2x2 patch side by side, a norm, a projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = Linear(4 * width, 2 * width, bias=False)
        self.norm = LayerNorm(4 * width, eps=NORM_EPS)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """As ConvDownsample; zeros at the bottom and the right of odd sides."""
        height, width = grid
        x = x.reshape(-1, height, width, x.shape[2])
        if height % 2 or width % 2:
            # functional.pad counts from the last axis: channels first, then width, then height.
            x = functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        half = (math.ceil(height / 2), math.ceil(width / 2))
        x = x.reshape(-1, half[0], 2, half[1], 2, x.shape[3])
        x = x.permute(0, 1, 3, 4, 2, 5)  # columns of a patch before its rows, as the official code
        x = x.reshape(-1, math.prod(half), 4 * x.shape[5])
        return wide(self.reduction(self.norm(x)))


class VMambaStage(nn.Module):
    """Blocks on one map, then the way to the next; the last stage has none."""

    def __init__(self, config: VMambaConfig, stage: int) -> None:
        super().__init__()
        self.walks = MapWalks(config.grids[stage], SCANS[config.scan])
        self.blocks = nn.ModuleList(VMambaBlock(config, stage) for _ in range(config.depths[stage]))
        self.downsample: nn.Module | None = None
        if stage + 1 < len(config.depths):
            width = config.width(stage)
            self.downsample = (
                MergeDownsample(width)
                if config.downsample == "v1"
                else ConvDownsample(width, 3 if config.downsample == "v3" else 2)
            )

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens of this stage to those of the next, and what each block returned."""
        blocks = []
        for block in self.blocks:
            x = block(x, self.walks)
            blocks.append(x)
        return x if self.downsample is None else self.downsample(x, self.walks.grid), blocks


class VMamba(VisionModel):
    """VMamba with its official keys; hierarchical, so dense only.

    Args:
        config: architecture.
        schedule: must be None.
        name: for reports and model.json.

    Raises:
        UnsupportedError: there is a schedule.
    """

    config: VMambaConfig
    published_directions = 4
    residual_stream = False

    def __init__(
        self, config: VMambaConfig, schedule: Schedule | None = None, *, name: str = "vmamba"
    ) -> None:
        super().__init__()
        refuse_schedule("VMamba", schedule)
        self.name, self.config, self.schedule = name, config, None
        self.image_size, self.num_classes = config.image_height_width, config.num_classes
        self.layout, self.stages, self.traced_blocks = None, {}, config.depth
        self.patch_embed = nn.ModuleDict(patch_embed(config))
        if config.pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.d_model, *config.grids[0]))
        stages = range(len(config.depths))
        self.layers = nn.ModuleList(VMambaStage(config, stage) for stage in stages)
        width = config.width(stages[-1])
        head = {"norm": LayerNorm(width, eps=NORM_EPS), "head": Linear(width, config.num_classes)}
        self.classifier = nn.ModuleDict(head)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.pos_embed:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def blocks_on_maps(self) -> list[tuple[nn.Module, tuple[int, int]]]:
        """The blocks of every stage on the grid of that stage."""
        return blocks_of_stages(self, VMambaBlock, self.config.grids, self.config.depths)

    def stays_wide(self, name: str) -> bool:
        """Norms, positions and what the scan takes as float32."""
        return stays_wide(self, name)

    def _forward(self, images: Tensor, with_blocks: bool) -> ForwardDetails:
        x = embed(self.patch_embed, images, self.image_size)
        if self.config.pos_embed:
            x = x + to_tokens(self.pos_embed)
        blocks: list[tuple[Tensor, Tensor | None]] = []
        for stage in self.layers:
            x, streams = stage(x)
            blocks += [(stream, None) for stream in streams]
        # Norm first, then the mean: the other order gives other logits.
        feature = self.classifier["norm"](x).mean(1)
        logits = wide(self.classifier["head"](feature))
        return details(logits, [], blocks if with_blocks else [])

    def fixed_cost(self) -> int:
        """Multiply-adds of the patch embedding, the downsampling and the classifier."""
        c = self.config
        return map_cost(c) + c.width(len(c.depths) - 1) * c.num_classes

    def block_costs(self) -> list[tuple[int, BlockCost]]:
        """Tokens and cost by token of every block; gate and norms are not counted."""
        return block_costs(self.config)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Old and one-file names, 1x1 convolutions as linears, positions of another map.

        Raises:
            CheckpointError: two entries come to one name.
        """
        return adapt_keys(state, self.config.grids[0])


def patch_embed(config: VMambaConfig) -> dict[str, nn.Module]:
    """v1: one convolution as wide as its stride; v2: two of 3x3 that halve the image each."""
    width = config.d_model
    if config.patch_embed == "v1":
        conv = Conv2d(3, width, config.patch_size, config.patch_size)
        # The numbers are indices of the official Sequential; permutes and GELU,
        # which have no weights, are the missing ones.
        return {"0": conv, "2": LayerNorm(width, eps=NORM_EPS)}
    return {
        "0": Conv2d(3, width // 2, 3, 2, padding=1),
        "2": LayerNorm(width // 2, eps=NORM_EPS),
        "5": Conv2d(width // 2, width, 3, 2, padding=1),
        "7": LayerNorm(width, eps=NORM_EPS),
    }


def embed(parts: nn.ModuleDict, images: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Tokens (batch, seqlen, d_model) of the first stage, by what `patch_embed` made."""
    x: Tensor = parts["2"](to_tokens(parts["0"](images)))
    if "5" not in parts:
        return x
    height, width = image_size
    half = (math.ceil(height / 2), math.ceil(width / 2))
    # v2 has a GELU between its two convolutions and none behind the second.
    tokens: Tensor = parts["7"](to_tokens(parts["5"](to_map(functional.gelu(x), half))))
    return tokens


def stays_wide(model: nn.Module, name: str) -> bool:
    """Whether a parameter of a VMamba is a norm's, a position, or one that the scan takes wide."""
    module, _, _ = name.rpartition(".")
    return name.endswith(_WIDE_PARAMETERS) or isinstance(model.get_submodule(module), nn.LayerNorm)


def map_cost(config: VMambaConfig) -> int:
    """Multiply-adds of the patch embedding and the downsampling."""
    if config.patch_embed == "v2":
        half = math.prod(math.ceil(side / 2) for side in config.image_height_width)
        total = half * 3 * 9 * (config.d_model // 2)
        total += math.prod(config.grids[0]) * (config.d_model // 2) * 9 * config.d_model
    else:
        total = math.prod(config.grids[0]) * 3 * config.patch_size**2 * config.d_model
    # v1 is no convolution, but its projection reads the four
    # tokens of a 2x2 patch all the same.
    taps = {"v1": 4, "v2": 4, "v3": 9}[config.downsample]
    for stage, grid in enumerate(config.grids[1:]):
        total += math.prod(grid) * config.width(stage) * taps * config.width(stage + 1)
    return total


def block_costs(config: VMambaConfig) -> list[tuple[int, BlockCost]]:
    """Tokens and cost by token of every block; gate and norms are not counted."""
    costs: list[tuple[int, BlockCost]] = []
    for stage, depth in enumerate(config.depths):
        width, hidden = config.width(stage), config.hidden(stage)
        cost = config.mixer(stage).cost(
            # A gated fc1 is twice as wide, fc2 is not.
            extra=width * hidden * (3 if config.gated_mlp else 2)
        )
        costs += [(math.prod(config.grids[stage]), cost)] * depth
    return costs
