"""PlainMamba: the official architecture and state_dict, written token-major.

Source: Yang et al., "PlainMamba", arXiv:2403.17695, and the numbers of its public code. Tokens are
a row-major grid without a class token. The convolutions over it read tokens where they are in the
list, dense or pruned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.errors import CheckpointError, UnsupportedError, check_least
from vssm.models.base import (
    BlockCost,
    ForwardDetails,
    ImageSized,
    VisionModel,
    details,
    refuse_merging,
)
from vssm.models.layers import (
    LayerNorm,
    fold_batch_norm,
    initial_a_log,
    initial_dt_proj,
    over_grid,
    resize_grid,
    to_dtype,
    wide,
)
from vssm.ops import operators as ops
from vssm.pruning.schedule import Schedule, Stage, TokenLayout, plan_stages
from vssm.pruning.select import ScanOutputs, ScoreRule, StageResult, Tokens, score_rule
from vssm.pruning.walks import WalkSteps


@dataclass(frozen=True)
class PlainMambaConfig(ImageSized):
    """The sizes of the official constructor under this package's names.

    `stem_convs` are the 3x3 convolutions between the first one and the projection to patches;
    `layers_with_dwconv` counts from 0, as the official keys do.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    depth: int = 24
    d_model: int = 192
    d_state: int = 16
    conv_size: int = 7
    expand: int = 2
    dt_rank: int | None = None
    num_classes: int = 1000
    stem_width: int = 64
    stem_convs: int = 2
    layers_with_dwconv: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("depth", "d_model", "d_state", "conv_size", "expand", "dt_rank")
        self.check_positive("num_classes", "stem_width", "patch_size")
        # The stem would pad it, and the model see next to nothing.
        self.check_patch(self.patch_size)
        if self.patch_size % 2:
            raise ValueError(
                f"patch_size={self.patch_size} is odd, but the stem halves the image before it is "
                "cut into patches; give an even size"
            )
        if self.conv_size % 2 == 0:
            raise ValueError(
                f"conv_size={self.conv_size} is even, so that the grid convolution has no centre; "
                "give an odd size"
            )
        check_least(0, stem_convs=self.stem_convs)
        outside = [layer for layer in self.layers_with_dwconv if not 0 <= layer < self.depth]
        if outside:
            raise ValueError(
                f"layers_with_dwconv={self.layers_with_dwconv} names {outside[0]}, outside the "
                f"layers 0 to {self.depth - 1}; layers are counted from 0 here"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns): the halved image is padded to whole patches."""
        height, width = (
            # Rounded up twice: the padded stem covers an odd side's last
            # pixel, then patches are made whole.
            math.ceil(math.ceil(side / 2) / self.projection_size)
            for side in self.image_height_width
        )
        return height, width

    @property
    def projection_size(self) -> int:
        """Side of a patch in the halved image."""
        return self.patch_size // 2

    @property
    def seqlen(self) -> int:
        """Tokens before pruning."""
        return math.prod(self.grid)

    @property
    def d_inner(self) -> int:
        """Width of the scan."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """Width of the step size's low-rank projection."""
        return self.dt_rank or math.ceil(self.d_model / 16)


DIRECTIONS = 4
MOVES = 5  # start, right, left, up, down


def grid_walks(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four walks over a grid of row-major positions, and the move that leads to each step.

    A snake over the rows from the top left corner, its reverse, a snake over the columns from
    there, its reverse.

    Returns:
        order (4, positions): the position of each step; move (4, positions): 0 at first, else
        1 right, 2 left, 3 up, 4 down. Both int64.
    """
    positions = torch.arange(height * width).reshape(height, width)
    over_rows, over_columns = (_snake(lines) for lines in (positions, positions.T))
    order = torch.stack([over_rows, over_rows.flip(0), over_columns, over_columns.flip(0)])
    # A snake moves by one place in one axis only, so exactly one of the four terms below is not 0.
    down, right = (order // width).diff(), (order % width).diff()
    move = (right > 0) * 1 + (right < 0) * 2 + (down < 0) * 3 + (down > 0) * 4
    # Nothing leads to the first step, but the official code has a vector for it too: code 0.
    return order, functional.pad(move, (1, 0))


def _snake(lines: Tensor) -> Tensor:
    """The positions of all lines, every other line backwards."""
    lines = lines.clone()
    lines[1::2] = lines[1::2].flip(1)
    return lines.flatten()


class GridWalks(nn.Module):
    """The walks as tables that are no part of a checkpoint.

    Steps are numbered through all walks (those of walk k begin at k * positions), so that one table
    holds the moves of all.
    """

    order: Tensor
    move: Tensor
    entry: Tensor

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        order, move = grid_walks(*grid)
        self.positions = order.shape[1]
        entry = order.argsort(1) + self._first_steps(order.device)[:, None]
        for name, table in (
            ("order", order[None]),  # (1, 4, positions): the position of each step
            ("move", move.flatten()),  # (4 * positions,): the move that leads to each step
            ("entry", entry.T.contiguous()),  # (positions, 4): the step that enters each position
        ):
            # Not persistent: the official state_dict has no such keys,
            # and the grid alone determines them.
            self.register_buffer(name, table.int(), persistent=False)

    def dense(self) -> WalkSteps:
        """The steps over every position."""
        code = self.move.reshape(1, DIRECTIONS, self.positions).transpose(1, 2)
        return WalkSteps(self.order, torch.ones_like(self.order), code)

    def among(self, position: Tensor) -> WalkSteps:
        """The steps over the tokens at `position`: each walk's own, in its own order."""
        entry = self.entry[position.long()]  # (batch, seqlen, 4)
        # topk of all of them is a sort: TopK is the operator of ONNX that sorts.
        step, index = entry.topk(entry.shape[1], dim=1, largest=False, sorted=True)
        last = torch.arange(entry.shape[1], device=step.device) - 1
        # The first step minus itself: 0, which every operator ignores, as
        # there is no state to decay yet.
        gap = step - step.index_select(1, last.clamp(min=0))
        return WalkSteps(
            order=index.int().transpose(1, 2),
            gap=gap.transpose(1, 2),
            # The moves of the full walk: after pruning, the step before may lie anywhere.
            code=self.move[step.long()],
            walked=step - self._first_steps(step.device),
        )

    def _first_steps(self, device: torch.device) -> Tensor:
        """(4,) int32: the number of each walk's first step."""
        return torch.arange(DIRECTIONS, dtype=torch.int32, device=device) * self.positions


class PatchEmbed(nn.Module):
    """Convolutions with batch norm and relu at half the image's size, then the projection.

    The official keys: `stem.0`, `stem.1` the first convolution and its norm, `convs.{3i}`,
    `convs.{3i+1}` the others, `projection`.
    """

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        width, side = config.stem_width, config.projection_size
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width)
        )
        convs: list[nn.Module] = []
        for _ in range(config.stem_convs):
            conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
            convs += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.convs = nn.Sequential(*convs)
        self.projection = nn.Conv2d(width, config.d_model, side, stride=side)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) to row-major tokens (batch, seqlen, d_model)."""
        dtype = self.projection.weight.dtype
        x = images.to(dtype)
        for conv, norm in self._normed_convs():
            weight, bias = (t.to(dtype) for t in fold_batch_norm(conv, norm))
            x = functional.conv2d(x, weight, bias, conv.stride, conv.padding)
            # The first convolution is followed by a relu too, though its Sequential holds none.
            x = torch.relu(x)
        # Zeros at the bottom and the right alone, behind the stem: padding the
        # image instead would give other numbers.
        below, right = (-side % self.projection.stride[0] for side in x.shape[2:])
        if below or right:
            x = functional.pad(x, (0, right, 0, below))
        return wide(self.projection(x)).flatten(2).transpose(1, 2)

    def _normed_convs(self) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        modules = [*self.stem, *self.convs]
        convs = [m for m in modules if isinstance(m, nn.Conv2d)]
        norms = [m for m in modules if isinstance(m, nn.BatchNorm2d)]
        return zip(convs, norms, strict=True)


@dataclass(frozen=True)
class _Operands:
    """The scan's inputs in operator layout; the walks share all but B, or none of delta, B, C."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor


class PlainMambaMixer(nn.Module):
    """in_proj, depthwise convolution over the grid, x_proj, dt_proj, scan, gate, out_proj.

    Only u follows the walks: step t of a walk uses delta, B and C of the t-th token in row-major
    order, and B has a vector added for the move that led to the step. The bias of dt_proj counts
    twice: in dt_proj and again in the scan.
    """

    backend = "auto"  # see VisionModel.use_backend

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.config = config
        width, inner, states = config.d_model, config.d_inner, config.d_state
        # Projections have a bias here, unlike Mamba's and Vim's.
        self.in_proj = nn.Linear(width, 2 * inner)
        side = config.conv_size
        self.conv2d = nn.Conv2d(inner, inner, side, padding=side // 2, groups=inner)
        self.x_proj = nn.Linear(inner, config.rank + 2 * states, bias=False)
        self.dt_proj = initial_dt_proj(config.rank, inner)
        self.A_log = nn.Parameter(initial_a_log(inner, states))
        self.D = nn.Parameter(torch.ones(inner))
        self.direction_Bs = nn.Parameter(torch.zeros(MOVES, states))
        nn.init.trunc_normal_(self.direction_Bs, std=0.02)
        self.out_proj = nn.Linear(inner, width)

    def forward(
        self, x: Tensor, tokens: Tokens, rule: ScoreRule | None
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed (batch, seqlen, d_model), and the (batch, seqlen) score if there is a rule."""
        weight, bias, inner = self.in_proj.weight, self.in_proj.bias, self.config.d_inner
        z = functional.linear(x, weight[inner:], bias[inner:])
        x = functional.linear(x, weight[:inner], bias[:inner])
        y, score = self._scan(self._operands(x, tokens), z, tokens, rule)
        return self.out_proj(y), score

    def _convolve(self, x: Tensor, position: Tensor | None) -> Tensor:
        """Silu of the convolution of x (batch, seqlen, d_inner) over the grid, at its tokens."""
        conv, grid = self.conv2d, self.config.grid
        return over_grid(x, conv.weight, conv.bias, grid, position=position, backend=self.backend)

    def _operands(self, x: Tensor, tokens: Tokens) -> _Operands:
        """The scan's inputs from what the convolution reads, x (batch, seqlen, d_inner)."""
        c = self.config
        if tokens.full_parameters:
            # At pruned positions too: their convolution sees kept neighbours and is not zero.
            convolved = self._convolve(tokens.to_positions(x, backend=self.backend), None)
            u = tokens.from_positions(convolved)
            q = _rows(self.x_proj(convolved), tokens)
        else:
            u = self._convolve(x, None if tokens.complete else tokens.position)
            q = self.x_proj(u)[:, :, None]
        dt, B, C = q.split([c.rank, c.d_state, c.d_state], dim=-1)
        if tokens.steps.code is None:
            raise AssertionError("walks over a grid give the moves")
        moves = self.direction_Bs[tokens.steps.code.long()]
        # Without dt_proj's bias, which the scan adds, twice: see `_node`.
        delta = functional.linear(dt, self.dt_proj.weight)
        # By "rank" B alone gets an axis of four: the moves differ from
        # walk to walk, delta and C do not.
        return _Operands(u[:, :, None], delta, B + moves, C)

    def _scan(
        self, operands: _Operands, z: Tensor, tokens: Tokens, rule: ScoreRule | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gated y (batch, seqlen, d_inner), and the score where one is asked for."""
        # As in Vim: scores read y before the gate, and no operator takes both z and delta0.
        if rule is None and not tokens.constant_gap:
            return self._node(operands, tokens, z=z), None
        y = self._node(operands, tokens, constant=tokens.constant_gap)
        score = None if rule is None else rule.score(ScanOutputs(y, z))
        return y * functional.silu(z), score

    def _node(
        self, o: _Operands, tokens: Tokens, *, z: Tensor | None = None, constant: bool = False
    ) -> Tensor:
        directions = o.delta.shape[2]
        # The official layer applies dt_proj with its bias and hands
        # the same bias to the scan once more.
        bias = 2 * wide(self.dt_proj.bias)
        return ops.selective_scan(
            o.u,
            o.delta,
            -torch.exp(wide(self.A_log))[None],
            o.B,
            o.C,
            D=wide(self.D)[None],
            delta_bias=bias.expand(directions, -1),
            order=tokens.steps.order,
            gap=tokens.steps.gap,
            z=z,
            delta0=self._delta0(bias).expand(directions, -1) if constant else None,
            # The official code permutes u alone: the t-th step of each
            # walk reads row t of delta, B and C.
            params_by_step=True,
            backend=self.backend,
        )

    def _delta0(self, bias: Tensor) -> Tensor:
        """Step size (d_inner,) of an all-zero token: its convolution is the bias alone."""
        if self.conv2d.bias is None:
            raise AssertionError("the convolution over the grid has a bias")
        conv = functional.silu(wide(self.conv2d.bias))
        low = wide(self.x_proj.weight)[: self.config.rank] @ conv
        return functional.softplus(wide(self.dt_proj.weight) @ low + bias)


def _rows(table: Tensor, tokens: Tokens) -> Tensor:
    """Rows (batch, seqlen, 4, width) of a table (batch, full_seqlen, width), by walk and step."""
    walked = tokens.steps.walked
    if walked is None:
        raise AssertionError("walks over a grid number their steps")
    # One row number into the table of all images, so that one Gather does it.
    image = torch.arange(table.shape[0], device=table.device)[:, None, None]
    return table.reshape(-1, table.shape[2])[walked.long() + image * tokens.full_seqlen]


_BLOCK_NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6
_POSITIONS = "backbone.pos_embed"
_WIDE_PARAMETERS = ("A_log", "mamba.D", "dt_proj.bias", "pos_embed")
# The stem's convolutions are folded with their norms in float32 and rounded once.
_WIDE_MODULES = (".norm.", ".ln1.", ".dw.", ".stem.", ".convs.")


def stays_wide(name: str) -> bool:
    """Whether a parameter is a norm's, a position, folded with a norm, or the scan's float32."""
    return name.endswith(_WIDE_PARAMETERS) or any(part in name for part in _WIDE_MODULES)


class PlainMambaBlock(nn.Module):
    """Norm, mix, add; and in some layers a depthwise convolution that replaces the stream."""

    backend = "auto"  # see VisionModel.use_backend

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
        normed = to_dtype(self.norm(x), self.mamba.in_proj.weight.dtype)
        mixed, score = self.mamba(normed, tokens, rule)
        x = x + mixed
        # In place of the stream, not added to it: the official block
        # has no residual around this part.
        return (x if self.dw is None else self._depthwise(self.dw, x, tokens)), score

    def _depthwise(self, dw: nn.Sequential, x: Tensor, tokens: Tokens) -> Tensor:
        weight, bias = fold_batch_norm(cast(nn.Conv2d, dw[0]), cast(nn.BatchNorm2d, dw[1]))
        position = None if tokens.complete else tokens.position
        return functional.gelu(
            over_grid(
                x,
                weight,
                bias,
                self.grid,
                position=position,
                activation=False,
                backend=self.backend,
            )
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
        self.ln1 = LayerNorm(config.d_model, eps=FINAL_NORM_EPS)


class Head(nn.Module):
    """The classifier, `head.fc` in the official keys."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.d_model, config.num_classes)
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features (batch, d_model) to logits (batch, num_classes), float32 or wider."""
        return wide(self.fc(to_dtype(features, self.fc.weight.dtype)))


See = Callable[[int, Tensor, Tokens], None]


def run_blocks(
    model: VisionModel,
    layers: nn.ModuleList,
    x: Tensor,
    tokens: Tokens,
    *,
    stages: Mapping[int, Stage],
    see: See,
    first: int = 0,
) -> tuple[Tensor, Tokens, list[StageResult]]:
    """A model's blocks in a row, with the stages of its schedule between them.

    Args:
        model: says by what it prunes, and with which backend.
        layers: its blocks, or some in a row.
        x: the tokens (batch, seqlen, d_model) in front of them.
        tokens: those that are present.
        stages: those of its schedule.
        see: called after each block and before its stage, with the block's number, 1-based, the
            stream and the tokens present.
        first: blocks in front of `layers`.

    Returns:
        The stream of the tokens that are left, these tokens, and what each stage chose.
    """
    chosen: list[StageResult] = []
    for number, layer in enumerate(layers, start=first + 1):
        stage = stages.get(number)
        x, score = layer(x, tokens, score_rule(stage))
        see(number, x, tokens)
        if stage is not None:
            tokens, (x,), result = model.pruner(stage, tokens, score, [x], backend=model.backend)
            chosen.append(result)
    return x, tokens, chosen


class PlainMamba(VisionModel):
    """PlainMamba with its official keys; `schedule` prunes between blocks.

    Args:
        config: architecture.
        schedule: pruning, None for the dense model.
        name: for reports and model.json.

    Raises:
        ValueError: a schedule's block lies outside the model.
        UnsupportedError: the schedule merges, or asks for what only models with a class token or a
            forward and a backward scan have.
    """

    config: PlainMambaConfig
    stages: dict[int, Stage]  # none of them merges
    residual_stream = False
    published_directions = DIRECTIONS

    def __init__(
        self,
        config: PlainMambaConfig,
        schedule: Schedule | None = None,
        *,
        name: str = "plain_mamba",
    ) -> None:
        super().__init__()
        pruning = refuse_merging(
            "PlainMamba's convolutions and walks need the place of every token in its grid, and a "
            "merged one has none",
            schedule,
        )
        self.name, self.config, self.schedule = name, config, pruning
        self.image_size, self.num_classes = config.image_height_width, config.num_classes
        self.traced_blocks = config.depth
        if pruning is not None and pruning.alignment == "masked":
            raise UnsupportedError(
                "alignment='masked' is how Vim was trained; PlainMamba has no such reference: use "
                "alignment='gap', 'constant' or 'none'"
            )
        # No class token to protect, and four walks of which none is "forward" or "backward".
        self.layout = TokenLayout(
            config.seqlen, None, keep_odd=False, directional=False, full_parameters=True
        )
        self.stages = plan_stages(pruning, self.layout, config.depth)
        self.backbone = Backbone(config)
        self.head = Head(config)
        self.walks = GridWalks(config.grid)

    def blocks_on_maps(self) -> list[tuple[nn.Module, tuple[int, int]]]:
        """Every block on the grid of patches."""
        return [(layer, self.config.grid) for layer in self.backbone.layers]

    def stays_wide(self, name: str) -> bool:
        """Norms, positions, the convolutions folded with norms, and the scan's float32 inputs."""
        return stays_wide(name)

    def _forward(self, images: Tensor, with_blocks: bool) -> ForwardDetails:
        x = self.backbone.patch_embed(images) + wide(self.backbone.pos_embed)
        tokens = Tokens.dense(self.walks, self.config.seqlen, images.device)
        blocks: list[tuple[Tensor, Tensor | None]] = []

        def see(_: int, x: Tensor, __: Tokens) -> None:
            if with_blocks:
                blocks.append((x, None))

        x, _, chosen = run_blocks(
            self, self.backbone.layers, x, tokens, stages=self.stages, see=see
        )
        # The norm comes before the mean, and after pruning the mean is over the kept tokens alone.
        return details(self.head(self.backbone.ln1(x).mean(1)), chosen, blocks)

    def fixed_cost(self) -> int:
        """Multiply-adds of the stem, the depthwise convolutions of some layers and the head."""
        return stem_cost(self.config) + self.config.d_model * self.config.num_classes

    def block_cost(self) -> BlockCost:
        """Cost of any block, by token."""
        return block_cost(self.config)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize a position table of another grid.

        Raises:
            CheckpointError: the table is not a square grid.
        """
        table = state.get(_POSITIONS)
        # What is not a table at all is left as it is: the loader
        # compares shapes and says what is wrong.
        if table is None or table.dim() != 3 or table.shape[1] == self.config.seqlen:
            return state
        side = math.isqrt(table.shape[1])
        if side * side != table.shape[1]:
            raise CheckpointError(
                f"pos_embed.shape={tuple(table.shape)} is not a square grid; create the model with "
                "the image_size that the checkpoint was trained with"
            )
        return {**state, _POSITIONS: resize_grid(table, (side, side), self.config.grid)}


def stem_cost(config: PlainMambaConfig) -> int:
    """Multiply-adds of the stem and of the depthwise convolutions of some layers."""
    pixels = math.prod(math.ceil(side / 2) for side in config.image_height_width)
    stem = pixels * config.stem_width * (3 * 49 + config.stem_convs * config.stem_width * 9)
    patches = config.seqlen * config.d_model * config.stem_width * config.projection_size**2
    # All positions of the grid, whatever is pruned; a set, as a
    # layer named twice has one convolution.
    depthwise = len(set(config.layers_with_dwconv)) * config.seqlen * config.d_model * 9
    return stem + patches + depthwise


def block_cost(config: PlainMambaConfig) -> BlockCost:
    """Cost of any block, by token."""
    return BlockCost(
        shared=3 * config.d_model * config.d_inner,
        branch=config.d_inner * (config.rank + 2 * config.d_state + config.rank),
        convolution=config.d_inner * config.conv_size**2,
        # The four walks share one convolution and one projection; only their scans are four.
        branches=1,
        directions=DIRECTIONS,
        states=config.d_inner * config.d_state,
        per_token=config.d_inner,
        # The gate multiplies the sum of the walks, once.
        gate=config.d_inner,
        on_grid=True,
    )
