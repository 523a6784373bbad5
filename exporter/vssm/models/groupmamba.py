"""GroupMamba: the official architecture and state_dict, tokens channels-last behind the stem.

Source: Shaker et al., "GroupMamba: Efficient Group-Based Visual State Space Model",
arXiv:2407.13772, and the numbers of its public code. Each quarter of the channels has a mixer of
its own that walks the map in one of four ways: one scan node a group, told apart by `order`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.errors import check_least
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
    BatchNorm2d,
    Conv2d,
    LayerNorm,
    Linear,
    over_grid,
    to_dtype,
    to_map,
    to_tokens,
    wide,
)
from vssm.pruning.schedule import Schedule

GROUPS: Final = 4


@dataclass(frozen=True)
class GroupMambaConfig(ImageSized):
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
        super().__post_init__()
        if not len(self.widths) == len(self.depths) == len(self.mlp_ratios) > 0:
            raise ValueError(
                f"widths={self.widths}, depths={self.depths}, mlp_ratios={self.mlp_ratios} have "
                "not one entry a stage each; give as many of each"
            )
        height, width = self.image_height_width
        check_least(1, height=height, width=width)
        self.check_positive("stem_width", "d_state", "dt_rank", "num_classes")
        self.check_positive("widths", "depths", "mlp_ratios")
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
    def depth(self) -> int:
        """Blocks of all stages and the class block."""
        return sum(self.depths) + 1

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Map of every stage as (rows, columns); odd sides are covered, not dropped."""
        shifts = range(2, 2 + len(self.depths))
        height, width = self.image_height_width
        # Halving s times and rounding up each time is the same as one division rounded up.
        return tuple((math.ceil(height / 2**s), math.ceil(width / 2**s)) for s in shifts)

    def mixer(self, stage: int) -> CrossScanConfig:
        """Sizes of each of the four mixers of a block."""
        width = self.widths[stage] // GROUPS
        return CrossScanConfig(
            d_model=width,
            # In all three released models the scan of a quarter is no wider than the quarter.
            d_inner=width,
            d_state=self.d_state,
            dt_rank=self.dt_rank or math.ceil(width / 16),
            directions=1,
            conv_bias=True,
            gate=True,
        )


_EPS = 1e-5
_BLOCK_EPS = 1e-6  # of the norms that the official code makes with its norm_layer
_WIDE_PARAMETERS = ("A_logs", "Ds", "dt_projs_bias", "skip_scale")


class Stem(nn.Module):
    """Three convolutions with batch norm at half the image's sides, a fourth to a quarter."""

    def __init__(self, config: GroupMambaConfig) -> None:
        super().__init__()
        stem = config.stem_width
        layers: list[nn.Module] = []
        for inputs, kernel, stride in ((3, 7, 2), (stem, 3, 1), (stem, 3, 1)):
            conv = Conv2d(inputs, stem, kernel, stride, padding=kernel // 2, bias=False)
            layers += [conv, BatchNorm2d(stem), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.proj = Conv2d(stem, config.widths[0], 3, 2, padding=1)
        self.norm = LayerNorm(config.widths[0], eps=_EPS)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) to tokens (batch, seqlen, width)."""
        tokens: Tensor = self.norm(to_tokens(self.proj(self.conv(images))))
        return tokens


class Downsample(nn.Module):
    """A strided convolution to the next stage's map and width, then a norm."""

    def __init__(self, config: GroupMambaConfig, stage: int) -> None:
        super().__init__()
        self.grid = config.grids[stage - 1]
        self.proj = Conv2d(config.widths[stage - 1], config.widths[stage], 3, 2, padding=1)
        self.norm = LayerNorm(config.widths[stage], eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of the stage before to tokens of this one."""
        tokens: Tensor = self.norm(to_tokens(self.proj(to_map(x, self.grid))))
        return tokens


class GroupMixer(nn.Module):
    """A mixer for each quarter of the channels, then a gate by the tokens' mean."""

    def __init__(self, config: GroupMambaConfig, stage: int) -> None:
        super().__init__()
        width = config.widths[stage]
        low = width // config.reduction
        for group in range(GROUPS):
            self.add_module(f"mamba_g{group + 1}", CrossScanMixer(config.mixer(stage)))
        self.skip_scale = nn.Parameter(torch.ones(1))
        self.fc1, self.fc2 = Linear(width, low), Linear(low, width)
        self.norm = LayerNorm(width, eps=_EPS)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, walks: nn.ModuleList) -> Tensor:
        """(batch, seqlen, width) to the same; `walks` has one walk a group.

        The product goes through the norm that the input went through: one norm, used twice.
        """
        x = self.norm(x)
        # From the normed input, before it is cast to half for the mixers.
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean(1, keepdim=True)))))
        gate = wide(gate) * wide(self.skip_scale)
        quarters = to_dtype(x, self.proj.weight.dtype).chunk(GROUPS, dim=2)
        mixed = [
            self.get_submodule(f"mamba_g{group + 1}")(quarter, walks[group])
            for group, quarter in enumerate(quarters)
        ]
        # Multiplied with the normed input, not added to it: this is what magnifies
        # rounding from block to block (docs/groupmamba.md).
        y: Tensor = self.proj(self.norm(wide(torch.cat(mixed, dim=2)) * x * gate))
        return wide(y)


class DepthwiseConv(nn.Module):
    """A 3x3 depthwise convolution under the official key."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)


class ConvMlp(nn.Module):
    """fc1, 3x3 depthwise convolution (not in the class block), GELU, fc2."""

    backend = "auto"  # see VisionModel.use_backend

    def __init__(self, width: int, hidden: int, *, convolution: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)
        self.dwconv = DepthwiseConv(hidden) if convolution else None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(batch, seqlen, width) to the same."""
        x = self.fc1(x)
        if self.dwconv is not None:
            conv = self.dwconv.dwconv
            x = over_grid(x, conv.weight, conv.bias, grid, activation=False, backend=self.backend)
        return wide(self.fc2(functional.gelu(x)))


class GroupMambaBlock(nn.Module):
    """x + mix(x), whose norm is the mixer's own, then x + mlp(norm2(x))."""

    def __init__(self, config: GroupMambaConfig, stage: int) -> None:
        super().__init__()
        width = config.widths[stage]
        self.attn = GroupMixer(config, stage)
        self.norm2 = LayerNorm(width, eps=_BLOCK_EPS)
        self.mlp = ConvMlp(width, config.mlp_ratios[stage] * width, convolution=True)

    def forward(self, x: Tensor, walks: nn.ModuleList, grid: tuple[int, int]) -> Tensor:
        """(batch, seqlen, width), the residual stream, to the same."""
        # No norm in front: the mixer norms its input itself, and again what it projects.
        x = x + self.attn(x, walks)
        result: Tensor = x + self.mlp(self.norm2(x), grid)
        return result


class ClassBlock(nn.Module):
    """The block of the tokens' mean, a map of 1x1: normed behind the mixer, not before it."""

    def __init__(self, config: GroupMambaConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.norm1 = LayerNorm(width, eps=_BLOCK_EPS)
        self.norm2 = LayerNorm(width, eps=_BLOCK_EPS)
        self.attn = GroupMixer(config, len(config.widths) - 1)
        self.mlp = ConvMlp(width, config.mlp_ratios[-1] * width, convolution=False)

    def forward(self, x: Tensor, walks: nn.ModuleList) -> Tensor:
        """(batch, 1, width) to the same."""
        x = x + self.norm1(self.attn(x, walks))
        result: Tensor = x + self.mlp(self.norm2(x), (1, 1))
        return result


class GroupMamba(VisionModel):
    """GroupMamba with its official keys; hierarchical, so dense only.

    Args:
        config: architecture.
        schedule: must be None.
        name: for reports and model.json.

    Raises:
        UnsupportedError: there is a schedule.
    """

    config: GroupMambaConfig
    published_directions = GROUPS
    scans_per_block = GROUPS
    residual_stream = False

    def __init__(
        self,
        config: GroupMambaConfig,
        schedule: Schedule | None = None,
        *,
        name: str = "groupmamba",
    ) -> None:
        super().__init__()
        refuse_schedule("GroupMamba", schedule)
        self.name, self.config, self.schedule = name, config, None
        self.image_size, self.num_classes = config.image_height_width, config.num_classes
        self.layout, self.stages, self.traced_blocks = None, {}, config.depth
        self.walks = nn.ModuleList(
            nn.ModuleList(MapWalks(grid, [walk]) for walk in WALKS)
            # The class block's map is one token, but its mixers
            # still have a convolution and a scan.
            for grid in (*config.grids, (1, 1))
        )
        # Modules are numbered from 1 and flat on the model, because the official keys are.
        for stage, depth in enumerate(config.depths):
            embed = Downsample(config, stage) if stage else Stem(config)
            self.add_module(f"patch_embed{stage + 1}", embed)
            blocks = nn.ModuleList(GroupMambaBlock(config, stage) for _ in range(depth))
            self.add_module(f"block{stage + 1}", blocks)
            norm = LayerNorm(config.widths[stage], eps=_BLOCK_EPS)
            self.add_module(f"norm{stage + 1}", norm)
        self.post_network = nn.ModuleList([ClassBlock(config)])
        self.head = Linear(config.widths[-1], config.num_classes)
        if config.distillation:
            self.dist_head = Linear(config.widths[-1], config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def blocks_on_maps(self) -> list[tuple[nn.Module, tuple[int, int]]]:
        """The blocks of every stage on the grid of that stage."""
        return blocks_of_stages(self, GroupMambaBlock, self.config.grids, self.config.depths)

    def stays_wide(self, name: str) -> bool:
        """Norms, and what the scan takes as float32."""
        module, _, _ = name.rpartition(".")
        return name.endswith(_WIDE_PARAMETERS) or isinstance(
            self.get_submodule(module), nn.LayerNorm | nn.BatchNorm2d
        )

    def _forward(self, images: Tensor, with_blocks: bool) -> ForwardDetails:
        x, streams = images, []
        for stage, grid in enumerate(self.config.grids):
            x = self.get_submodule(f"patch_embed{stage + 1}")(x)
            for block in self.get_submodule(f"block{stage + 1}").children():
                x = block(x, self.walks[stage], grid)
                streams.append(x)
            # The last stage's norm waits: it norms the class block's result below, not the tokens.
            if stage + 1 < len(self.config.grids):
                x = self.get_submodule(f"norm{stage + 1}")(x)
        feature = self.post_network[0](x.mean(1, keepdim=True), self.walks[-1])
        streams.append(feature)
        last_norm = self.get_submodule(f"norm{len(self.config.grids)}")
        logits = self._classify(last_norm(feature).flatten(1))
        return details(logits, [], [(s, None) for s in streams] if with_blocks else [])

    def _classify(self, feature: Tensor) -> Tensor:
        """Logits of (batch, width): the mean of both heads where there are two."""
        logits = wide(self.head(feature))
        if self.config.distillation:
            # As the official model does in eval mode.
            logits = (logits + wide(self.dist_head(feature))) / 2
        return logits

    def fixed_cost(self) -> int:
        """Multiply-adds of stem, downsampling, the gates by the mean, and the heads."""
        c = self.config
        half = math.prod(math.ceil(side / 2) for side in self.image_size)
        total = half * c.stem_width * (3 * 49 + 2 * 9 * c.stem_width)
        inputs = (c.stem_width, *c.widths)
        for stage, grid in enumerate(c.grids):
            total += math.prod(grid) * 9 * inputs[stage] * c.widths[stage]
        # The gates by the mean work on one token an image, so they
        # count once a block, not by token.
        for width, blocks in zip((*c.widths, c.widths[-1]), (*c.depths, 1), strict=True):
            total += blocks * 2 * width * (width // c.reduction)
        return total + c.widths[-1] * c.num_classes * (2 if c.distillation else 1)

    def block_costs(self) -> list[tuple[int, BlockCost]]:
        """Tokens and cost by token of every block, the class block last; no gates or norms."""
        c = self.config
        stages = [*zip(c.grids, range(len(c.grids)), c.depths, strict=True)]
        costs: list[tuple[int, BlockCost]] = []
        for grid, stage, depth in (*stages, ((1, 1), len(c.grids) - 1, 1)):
            width = c.widths[stage]
            hidden = c.mlp_ratios[stage] * width
            # The last block is the class block, whose MLP has no convolution.
            convolution = 9 * hidden if len(costs) + 1 < c.depth else 0
            mixer = c.mixer(stage)
            # Four mixers: of three of them the projections and the convolution are extra.
            others = (GROUPS - 1) * (3 * mixer.d_model + 9) * mixer.d_inner
            extra = others + width * width + 2 * width * hidden + convolution
            cost = mixer.cost(extra=extra)
            # Each group has one direction and its own projections: four of both, a quarter as wide.
            cost = replace(cost, branches=GROUPS, directions=GROUPS)
            costs += [(math.prod(grid), cost)] * depth
        return costs
