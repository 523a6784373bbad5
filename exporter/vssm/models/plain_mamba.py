"""PlainMamba: the official architecture and state_dict, written token-major.

Source: Yang et al., "PlainMamba", arXiv:2403.17695, and the numbers of its public code. Tokens are
a row-major grid without a class token. A pruned model keeps the grid for its convolutions alone:
kept tokens are scattered into it and gathered back.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.errors import CheckpointError, UnsupportedError
from vssm.models.base import BlockCost, ForwardDetails, VisionModel, details
from vssm.models.layers import LayerNorm, fold_batch_norm, over_grid, resize_grid, wide
from vssm.models.plain_mamba_config import PlainMambaConfig
from vssm.models.plain_mamba_mixer import PlainMambaMixer
from vssm.models.plain_mamba_stem import PatchEmbed
from vssm.models.plain_mamba_walks import DIRECTIONS, GridWalks
from vssm.pruning.schedule import PruneSchedule, TokenLayout, plan_stages
from vssm.pruning.select import ScoreRule, StageResult, Tokens, score_rule

_BLOCK_NORM_EPS = 1e-5
_FINAL_NORM_EPS = 1e-6
_POSITIONS = "backbone.pos_embed"
_WIDE_PARAMETERS = ("A_log", "mamba.D", "dt_proj.bias", "pos_embed")
# The stem's convolutions are folded with their norms in float32 and rounded once.
_WIDE_MODULES = (".norm.", ".ln1.", ".dw.", ".stem.", ".convs.")


class PlainMambaBlock(nn.Module):
    """Norm, mix, add; and in some layers a depthwise convolution that replaces the stream."""

    def __init__(self, config: PlainMambaConfig, *, depthwise: bool) -> None:
        super().__init__()
        width = config.d_model
        self.grid = config.grid
        self.norm = LayerNorm(width, eps=_BLOCK_NORM_EPS)
        self.mamba = PlainMambaMixer(config)
        self.dw = (
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                nn.BatchNorm2d(width),
            )
            if depthwise
            else None
        )

    def forward(
        self, x: Tensor, tokens: Tokens, rule: ScoreRule | None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream (batch, seqlen, d_model) after this block, and the score or None."""
        normed = self.norm(x).to(self.mamba.in_proj.weight.dtype)
        mixed, score = self.mamba(normed, tokens, rule)
        x = x + mixed
        return (x if self.dw is None else self._depthwise(self.dw, x, tokens)), score

    def _depthwise(self, dw: nn.Sequential, x: Tensor, tokens: Tokens) -> Tensor:
        weight, bias = fold_batch_norm(cast(nn.Conv2d, dw[0]), cast(nn.BatchNorm2d, dw[1]))

        def convolve(maps: Tensor) -> Tensor:
            return functional.conv2d(maps, weight, bias, padding=1, groups=x.shape[2])

        return functional.gelu(
            tokens.from_places(over_grid(tokens.to_places(x), self.grid, convolve))
        )


class Backbone(nn.Module):
    """What has the prefix `backbone.` in the official keys."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, config.seqlen, config.d_model))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed = PatchEmbed(config)
        self.layers = nn.ModuleList(
            PlainMambaBlock(config, depthwise=layer in config.layers_with_dwconv)
            for layer in range(config.depth)
        )
        self.ln1 = LayerNorm(config.d_model, eps=_FINAL_NORM_EPS)


class Head(nn.Module):
    """The classifier, `head.fc` in the official keys."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.d_model, config.num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features (batch, d_model) to logits (batch, num_classes), float32 or wider."""
        return wide(self.fc(features.to(self.fc.weight.dtype)))


class PlainMamba(VisionModel):
    """PlainMamba with its official keys; `schedule` prunes between blocks.

    Args:
        config: architecture.
        schedule: pruning, None for the dense model.
        name: for reports and model.json.

    Raises:
        ValueError: a schedule's block lies outside the model.
        UnsupportedError: the schedule asks for what only models with a class token or a forward and
            a backward scan have.
    """

    config: PlainMambaConfig
    residual_stream = False
    published_directions = DIRECTIONS

    def __init__(
        self,
        config: PlainMambaConfig,
        schedule: PruneSchedule | None = None,
        *,
        name: str = "plain_mamba",
    ) -> None:
        super().__init__()
        self.name, self.config, self.schedule = name, config, schedule
        self.image_size, self.num_classes = config.image_height_width, config.num_classes
        self.traced_blocks = config.depth
        if schedule is not None and schedule.alignment == "masked":
            raise UnsupportedError(
                "alignment='masked' is how Vim was trained; PlainMamba has no such reference: use "
                "alignment='gap', 'constant' or 'none'"
            )
        self.layout = TokenLayout(config.seqlen, None, keep_odd=False, directional=False)
        self.stages = plan_stages(schedule, self.layout, config.depth)
        self.backbone = Backbone(config)
        self.head = Head(config)
        self.walks = GridWalks(config.grid)

    def stays_wide(self, name: str) -> bool:
        """Norms, positions, the convolutions folded with norms, and the scan's float32 inputs."""
        return name.endswith(_WIDE_PARAMETERS) or any(part in name for part in _WIDE_MODULES)

    def _forward(self, images: Tensor, with_blocks: bool) -> ForwardDetails:
        x = self.backbone.patch_embed(images) + wide(self.backbone.pos_embed)
        tokens = Tokens.dense(self.walks, self.config.seqlen, images.device)
        chosen: list[StageResult] = []
        blocks: list[tuple[Tensor, Tensor | None]] = []
        for number, layer in enumerate(self.backbone.layers, start=1):
            stage = self.stages.get(number)
            x, score = layer(x, tokens, score_rule(stage))
            if with_blocks:
                blocks.append((x, None))
            if stage is not None:
                tokens, streams, result = self.pruner(
                    stage, tokens, score, [x], operators=self.operators
                )
                x = streams[0]
                chosen.append(result)
        return details(self.head(self.backbone.ln1(x).mean(1)), chosen, blocks)

    def fixed_cost(self) -> int:
        """Multiply-adds of the stem, the depthwise convolutions of some layers and the head."""
        c = self.config
        pixels = math.prod(math.ceil(side / 2) for side in c.image_height_width)
        stem = pixels * c.stem_width * (3 * 49 + c.stem_convs * c.stem_width * 9)
        patches = c.seqlen * c.d_model * c.stem_width * c.projection_size**2
        depthwise = len(set(c.layers_with_dwconv)) * c.seqlen * c.d_model * 9
        return stem + patches + depthwise + c.d_model * c.num_classes

    def block_cost(self) -> BlockCost:
        """Cost of any block, by token."""
        c = self.config
        return BlockCost(
            shared=3 * c.d_model * c.d_inner,
            branch=c.d_inner * (c.rank + 2 * c.d_state + c.rank),
            convolution=c.d_inner * c.conv_size**2,
            branches=1,
            directions=DIRECTIONS,
            states=c.d_inner * c.d_state,
            per_token=c.d_inner,
            gate=c.d_inner,
            on_grid=True,
        )

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize a position table of another grid.

        Raises:
            CheckpointError: the table is not a square grid.
        """
        table = state.get(_POSITIONS)
        if table is None or table.dim() != 3 or table.shape[1] == self.config.seqlen:
            return state
        side = math.isqrt(table.shape[1])
        if side * side != table.shape[1]:
            raise CheckpointError(
                f"pos_embed.shape={tuple(table.shape)} is not a square grid; create the model with "
                "the image_size that the checkpoint was trained with"
            )
        return {**state, _POSITIONS: resize_grid(table, (side, side), self.config.grid)}
