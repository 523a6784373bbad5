"""Vision Mamba (Vim): the official architecture and state_dict, written token-major.

Source: Zhu et al., "Vision Mamba", arXiv:2401.09417, and the numbers of its public code. The
backward direction is a convolution with flipped weight and a scan in reverse `order`: nothing is
flipped at run time. The mixer's output stays apart from the residual stream until the next
block's norm, and pruning gathers both with the same slots.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vssm.errors import CheckpointError, UnsupportedError
from vssm.models.base import BlockCost, ForwardDetails, VisionModel, details
from vssm.models.layers import LayerNorm, RMSNorm, resize_grid, wide
from vssm.models.rope import rope_tables, rotate
from vssm.models.vim_config import VimConfig
from vssm.models.vim_mixer import VimMixer
from vssm.pruning.schedule import PruneSchedule, TokenLayout, plan_stages
from vssm.pruning.select import ScoreRule, StageResult, Tokens, score_rule
from vssm.pruning.walks import LineWalks

_WIDE_PARAMETERS = (
    "A_log",
    "A_b_log",
    "mixer.D",
    "mixer.D_b",
    "dt_proj.bias",
    "dt_proj_b.bias",
    "pos_embed",
    "cls_token",
    "cls_token_head",
    "cls_token_tail",
)


class PatchEmbed(nn.Module):
    """Patches to tokens by a strided convolution, row by row, no norm."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.d_model, config.patch_size, config.stride)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) to (batch, patches, d_model)."""
        return wide(self.proj(images.to(self.proj.weight.dtype))).flatten(2).transpose(1, 2)


class VimBlock(nn.Module):
    """Add, norm, mix: the mixer's output is added by the next block."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.norm = _norm(config)
        self.mixer = VimMixer(config.mixer)

    def forward(
        self, hidden: Tensor | None, residual: Tensor, tokens: Tokens, rule: ScoreRule | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(batch, seqlen, d_model) streams to (mixer output, new residual, score or None)."""
        if hidden is not None:
            residual = residual + hidden
        normed = self.norm(residual).to(self.mixer.in_proj.weight.dtype)
        hidden, score = self.mixer(normed, tokens, rule)
        return hidden, residual, score


class Vim(VisionModel):
    """Vim with its official keys; `schedule` prunes between blocks.

    Args:
        config: architecture.
        schedule: pruning, None for the dense model.
        name: for reports and model.json.

    Raises:
        ValueError: a schedule's block lies outside the model.
        UnsupportedError: these switches cannot be pruned.
    """

    config: VimConfig

    def __init__(
        self, config: VimConfig, schedule: PruneSchedule | None = None, *, name: str = "vim"
    ) -> None:
        super().__init__()
        self.name, self.config, self.schedule = name, config, schedule
        self.image_size, self.num_classes = config.image_height_width, config.num_classes
        # Pairs of layers have no single stream to report.
        self.traced_blocks = 0 if config.bidirectional_layers else config.depth
        self._refuse(config, schedule)
        places = config.class_places
        self.layout = TokenLayout(config.seqlen, places[0] if places else None, keep_odd=True)
        self.stages = plan_stages(schedule, self.layout, config.depth)
        self.patch_embed = PatchEmbed(config)
        for key in self._class_keys():
            self.register_parameter(key, nn.Parameter(torch.zeros(1, 1, config.d_model)))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.seqlen, config.d_model))
        if config.rope:
            self.rope = rope_tables(config.d_model, config.grid, config.rope_grid)
        self.layers = nn.ModuleList(VimBlock(config) for _ in range(config.depth))
        self.norm_f = _norm(config)
        self.head = nn.Linear(config.d_model, config.num_classes)
        self._initialise()

    @staticmethod
    def _refuse(config: VimConfig, schedule: PruneSchedule | None) -> None:
        if schedule is None:
            return
        if config.class_token == "double":
            raise UnsupportedError(
                "class_token='double' cannot be pruned: two class tokens frame the sequence and "
                "the method protects one; use the dense model"
            )
        if config.bidirectional_layers:
            raise UnsupportedError(
                "bidirectional_layers=True cannot be pruned: a pair of layers has no single scan "
                "to score; use the dense model"
            )
        if schedule.step_parameters != "rank":
            raise UnsupportedError(
                f"step_parameters={schedule.step_parameters!r} is PlainMamba's choice; Vim's "
                "steps have the parameters of their own tokens: leave it out"
            )
        backward = schedule.source == "backward" or schedule.importance == "as_released"
        if config.bimamba == "none" and backward:
            raise UnsupportedError(
                "bimamba='none' has no backward scan, which source='backward' and "
                "importance='as_released' score by; use source='sum' and another importance"
            )

    def _class_keys(self) -> tuple[str, ...]:
        if self.config.class_token == "double":
            return "cls_token_head", "cls_token_tail"
        return ("cls_token",) if self.config.class_token != "none" else ()

    def _initialise(self) -> None:
        for key in (*self._class_keys(), "pos_embed"):
            nn.init.trunc_normal_(getattr(self, key), std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def stays_wide(self, name: str) -> bool:
        """Norms, embeddings and what the scan takes as float32."""
        return name.endswith(_WIDE_PARAMETERS) or ".norm." in name or name.startswith("norm_f.")

    def _embed(self, images: Tensor) -> Tensor:
        """Tokens (batch, seqlen, d_model), class tokens in their places, positions added."""
        patches = self.patch_embed(images)
        pieces, start = [], 0
        for before, (key, place) in enumerate(
            zip(self._class_keys(), self.config.class_places, strict=True)
        ):
            end = place - before  # patches in front of this class token
            class_token = wide(getattr(self, key)).expand(patches.shape[0], -1, -1)
            pieces += [patches[:, start:end], class_token]
            start = end
        pieces.append(patches[:, start:])
        x = torch.cat([piece for piece in pieces if piece.shape[1]], dim=1)
        return x + wide(self.pos_embed)

    def _forward(self, images: Tensor, with_blocks: bool) -> ForwardDetails:
        residual = self._embed(images)
        directions = 1 if self.config.bimamba == "none" else 2
        walks = LineWalks(self.config.seqlen, directions, images.device)
        tokens = Tokens.dense(walks, self.config.seqlen, images.device)
        hidden: Tensor | None = None
        chosen: list[StageResult] = []
        blocks: list[tuple[Tensor, Tensor | None]] = []
        if self.config.bidirectional_layers:
            hidden, residual = self._layer_pairs(residual, tokens)
            return details(self._logits(hidden, residual, tokens), chosen, blocks)
        for number, layer in enumerate(self.layers, start=1):
            hidden, residual = self._rotate(hidden, residual, tokens)
            stage = self.stages.get(number)
            hidden, residual, score = layer(hidden, residual, tokens, score_rule(stage))
            if with_blocks:
                blocks.append((hidden, residual))
            if stage is not None:
                tokens, streams, result = self.pruner(
                    stage, tokens, score, [hidden, residual], operators=self.operators
                )
                hidden, residual = streams
                chosen.append(result)
        if hidden is None:
            raise AssertionError("VimConfig asks for at least one block")
        return details(self._logits(hidden, residual, tokens), chosen, blocks)

    def _layer_pairs(self, residual: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """if_bidirectional: each pair of layers runs on the sequence and on its reverse."""
        hidden: Tensor | None = None
        for first in range(0, self.config.depth, 2):
            hidden, residual = self._rotate(hidden, residual, tokens)
            flipped = None if hidden is None else hidden.flip(1)
            ahead, res_ahead, _ = self.layers[first](hidden, residual, tokens, None)
            back, res_back, _ = self.layers[first + 1](flipped, residual.flip(1), tokens, None)
            hidden, residual = ahead + back.flip(1), res_ahead + res_back.flip(1)
        if hidden is None:
            raise AssertionError("VimConfig asks for at least one pair of layers")
        return hidden, residual

    def _rotate(
        self, hidden: Tensor | None, residual: Tensor, tokens: Tokens
    ) -> tuple[Tensor | None, Tensor]:
        """Rotary position embedding before a block, on the streams the official code rotates."""
        if not self.config.rope:
            return hidden, residual
        if hidden is None:  # the first block: the tokens are the hidden stream, no residual yet
            return hidden, rotate(residual, self.rope, tokens)
        hidden = rotate(hidden, self.rope, tokens)
        if self.config.rope_residual:
            residual = rotate(residual, self.rope, tokens)
        return hidden, residual

    def _logits(self, hidden: Tensor, residual: Tensor, tokens: Tokens) -> Tensor:
        x = residual + hidden
        places = self.config.class_places
        if places:
            x = self.norm_f(self._class_tokens(x, tokens))  # the norm is by token: pick first
            return self._classify(x[:, 0] if len(places) == 1 else x.mean(1))
        if tokens.kept is not None:
            x = x.gather(1, tokens.kept[..., None].expand(-1, -1, x.shape[-1]))
        if self.config.pool == "last":
            return self._classify(self.norm_f(x[:, -1]))
        x = self.norm_f(x)
        return (
            self._classify(x.mean(1)) if self.config.pool == "mean" else self._classify(x).amax(1)
        )

    def _classify(self, features: Tensor) -> Tensor:
        return wide(self.head(features.to(self.head.weight.dtype)))

    def _class_tokens(self, x: Tensor, tokens: Tokens) -> Tensor:
        """The class tokens' rows (batch, 1 or 2, d_model), wherever pruning has put them."""
        if tokens.complete:  # nothing has moved
            return torch.cat([x[:, place : place + 1] for place in self.config.class_places], dim=1)
        is_class = torch.eq(tokens.position[..., None], self.config.class_places[0])
        zero = torch.zeros((), dtype=x.dtype, device=x.device)  # from the host: no CUDA graph
        return torch.where(is_class, x, zero).sum(1, keepdim=True)

    def fixed_cost(self) -> int:
        """Multiply-adds of the patch embedding and the classifier."""
        c = self.config
        return c.d_model * (c.patches * 3 * c.patch_size * c.patch_size + c.num_classes)

    def block_cost(self) -> BlockCost:
        """Cost of any block, by token."""
        c, mixer = self.config, self.config.mixer
        inner, low = mixer.d_inner, mixer.dt_rank
        return BlockCost(
            shared=3 * c.d_model * inner,
            branch=inner * (low + 2 * c.d_state + low),
            convolution=inner * c.d_conv,
            branches=2 if c.bimamba == "v2" else 1,
            directions=1 if c.bimamba == "none" else 2,
            states=inner * c.d_state,
            per_token=2 * inner,
        )

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize a position table of another grid, class rows taken out and put back.

        Raises:
            CheckpointError: the table is not a square grid with this model's class tokens.
        """
        table = state.get("pos_embed")
        places = self.config.class_places
        if table is None or table.dim() != 3 or table.shape[1] == self.config.seqlen:
            return state
        side = math.isqrt(max(table.shape[1] - len(places), 0))
        if side * side + len(places) != table.shape[1]:
            raise CheckpointError(
                f"pos_embed.shape={tuple(table.shape)} is not a square grid with "
                f"{len(places)} class tokens; load a checkpoint of the same class-token layout"
            )
        old = {"middle": (side * side // 2,), "double": (0, side * side + 1)}.get(
            self.config.class_token, (0,) * len(places)
        )
        is_patch = torch.ones(table.shape[1], dtype=torch.bool)
        is_patch[list(old)] = False
        grid = resize_grid(table[:, is_patch], (side, side), self.config.grid)
        resized = table.new_empty(1, self.config.seqlen, table.shape[2])
        is_patch = torch.ones(self.config.seqlen, dtype=torch.bool)
        is_patch[list(places)] = False
        resized[:, is_patch] = grid
        resized[:, list(places)] = table[:, list(old)]
        return {**state, "pos_embed": resized}


def _norm(config: VimConfig) -> nn.Module:
    return (RMSNorm if config.rms_norm else LayerNorm)(config.d_model, eps=config.norm_eps)
