"""Vision Mamba (Vim): the official architecture and state_dict, written token-major.

Source: Zhu et al., "Vision Mamba", arXiv:2401.09417, and the numbers of its public code. The
backward direction is a convolution that looks ahead and a scan in reverse `order`: nothing is
flipped at run time. The mixer's output stays apart from the residual stream until the next
block's norm, and pruning gathers both with the same indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional

from vssm.errors import CheckpointError, UnsupportedError, check_choice, check_least
from vssm.models.base import BlockCost, ForwardDetails, ImageSized, VisionModel, details
from vssm.models.layers import (
    LayerNorm,
    RMSNorm,
    initial_a_log,
    initial_dt_proj,
    resize_grid,
    to_dtype,
    wide,
)
from vssm.models.rotary import Rotation, rope_tables
from vssm.ops import operators as ops
from vssm.pruning.merge import MetricRule, merge, metric_rule
from vssm.pruning.schedule import (
    MergeSchedule,
    MergeStage,
    Schedule,
    Stage,
    TokenLayout,
    plan_stages,
)
from vssm.pruning.select import ScanOutputs, ScoreRule, StageResult, Tokens, score_rule
from vssm.pruning.walks import LineWalks

CLASS_TOKENS = ("middle", "head", "double", "none")
POOLS = ("mean", "max", "last")
BIMAMBA = ("v2", "v1", "none")


@dataclass(frozen=True)
class VimConfig(ImageSized):
    """The switches of the official constructor under this package's names.

    `class_token` says where the class token stands; without one `pool` reads the tokens.
    `divide_out` halves the sum of both directions (official if_divide_out; all released models do).
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
        super().__post_init__()
        check_choice("class_token", self.class_token, CLASS_TOKENS)
        check_choice("pool", self.pool, POOLS)
        check_choice("bimamba", self.bimamba, BIMAMBA)
        # torch takes a width of 0 with a warning and refuses a
        # negative one without naming the option.
        self.check_positive("patch_size", "stride", "depth", "d_model", "d_state", "d_conv")
        self.check_positive("expand", "dt_rank", "num_classes")
        check_least(0, norm_eps=self.norm_eps)
        self.check_patch(self.patch_size)
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
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        height, width = self.image_height_width
        # The convolution has no padding: what is left beyond the last whole patch is not seen.
        return tuple((side - self.patch_size) // self.stride + 1 for side in (height, width))  # type: ignore[return-value]

    @property
    def patches(self) -> int:
        """Number of patch tokens."""
        return math.prod(self.grid)

    @property
    def class_positions(self) -> tuple[int, ...]:
        """Places of the class tokens among all tokens."""
        if self.class_token == "double":
            return 0, self.patches + 1
        # A scan and its reverse both pass the middle with half of the patches behind them.
        return {"middle": (self.patches // 2,), "head": (0,), "none": ()}[self.class_token]

    @property
    def seqlen(self) -> int:
        """Tokens before pruning, class tokens included."""
        return self.patches + len(self.class_positions)

    @property
    def mixer(self) -> VimMixerConfig:
        """Sizes of every block's mixer."""
        return VimMixerConfig(
            d_model=self.d_model,
            d_inner=self.expand * self.d_model,
            d_state=self.d_state,
            d_conv=self.d_conv,
            # Mamba's "auto" rank.
            dt_rank=self.dt_rank or math.ceil(self.d_model / 16),
            bimamba=self.bimamba,
            divide_out=self.divide_out,
            layer_scale=self.layer_scale,
        )


@dataclass(frozen=True)
class VimMixerConfig:
    """Sizes of one mixer.

    `bimamba` is "v2" (own weights for the backward direction), "v1" (an own A only) or "none".
    """

    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    bimamba: str
    divide_out: bool
    layer_scale: float | None

    @property
    def scale(self) -> float:
        """What the sum of the directions is multiplied by; only v2 knows if_divide_out."""
        return 0.5 if self.bimamba == "v2" and self.divide_out else 1.0


@dataclass(frozen=True)
class ScanOperands:
    """Inputs of the scan nodes in operator layout: (batch, Kx, seqlen, width) and (Kx, ...)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    delta_bias: Tensor

    def direction(self, k: int) -> ScanOperands:
        """The operands of direction k alone; shared ones stay as they are."""

        def pick(x: Tensor, axis: int) -> Tensor:
            # v1 has one u, delta, B and C for both directions: an axis of 1 serves any k.
            return x if x.shape[axis] == 1 else x.narrow(axis, k, 1)

        streams = {n: pick(getattr(self, n), 1) for n in ("u", "delta", "B", "C")}
        weights = {n: pick(getattr(self, n), 0) for n in ("A", "D", "delta_bias")}
        return ScanOperands(**streams, **weights)


class VimMixer(nn.Module):
    """in_proj, one causal depthwise convolution a direction, x_proj, dt_proj, scan, gate, out_proj.

    Keys are the official ones: `conv1d`, `x_proj`, `dt_proj`, `A_log`, `D`, and for the backward
    direction `conv1d_b`, `x_proj_b`, `dt_proj_b`, `A_b_log`, `D_b` (v1: `A_b_log` only).
    """

    conv1d: nn.Conv1d
    A_log: nn.Parameter
    A_b_log: nn.Parameter
    D: nn.Parameter
    D_b: nn.Parameter

    backend = "auto"  # see VisionModel.use_backend

    def __init__(self, config: VimMixerConfig) -> None:
        super().__init__()
        self.config = config
        width, inner = config.d_model, config.d_inner
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        for suffix in self._branches():
            self._add_branch(suffix)
        if config.bimamba == "v1":
            # v1's backward scan reads the forward branch's u, delta, B
            # and C; only the decay is its own.
            self.A_b_log = nn.Parameter(initial_a_log(config.d_inner, config.d_state))
        self.out_proj = nn.Linear(inner, width, bias=False)
        if config.layer_scale is not None:
            self.gamma = nn.Parameter(config.layer_scale * torch.ones(width))

    def _branches(self) -> tuple[str, ...]:
        """Key suffixes of the branches that have weights of their own."""
        return ("", "_b") if self.config.bimamba == "v2" else ("",)

    def _add_branch(self, suffix: str) -> None:
        c = self.config
        conv = nn.Conv1d(c.d_inner, c.d_inner, c.d_conv, groups=c.d_inner)
        self.add_module(f"conv1d{suffix}", conv)
        x_proj = nn.Linear(c.d_inner, c.dt_rank + 2 * c.d_state, bias=False)
        self.add_module(f"x_proj{suffix}", x_proj)
        self.add_module(f"dt_proj{suffix}", initial_dt_proj(c.dt_rank, c.d_inner))
        # The official keys put "_b" behind every name but A_log's, where it stands in the middle.
        log, skip = ("A_log", "D") if not suffix else ("A_b_log", "D_b")
        self.register_parameter(log, nn.Parameter(initial_a_log(c.d_inner, c.d_state)))
        self.register_parameter(skip, nn.Parameter(torch.ones(c.d_inner)))

    def _stack(self, name: str) -> Tensor:
        """A parameter of every branch, stacked: (branches, ...)."""
        return torch.stack([attrgetter(name.format(b=b))(self) for b in self._branches()])

    def forward(
        self, x: Tensor, tokens: Tokens, rule: ScoreRule | MetricRule | None
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed (batch, seqlen, d_model), and the score or metric if there is a rule."""
        inner = self.config.d_inner
        x_weight, z_weight = self.in_proj.weight[:inner], self.in_proj.weight[inner:]
        operands = self._operands(self._convolve(functional.linear(x, x_weight), tokens))
        z = functional.linear(x, z_weight)
        if isinstance(rule, MetricRule):
            measured = {"B": operands.B, "C": operands.C, "delta": operands.delta}
            score: Tensor | None = rule.measure(measured, scale=self.config.scale)
            y, _ = self._scan(operands, z, tokens, None)
        else:
            y, score = self._scan(operands, z, tokens, rule)
        out = functional.linear(y, self.out_proj.weight)
        if self.config.layer_scale is not None:
            out = out * self.gamma
        return out, score

    def _convolve(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Each branch's convolution and silu (batch, branches, seqlen, d_inner) of x."""
        position, home = tokens.position, None
        if tokens.conv_on_grid and not tokens.ascending:
            position, order = position.sort(dim=1, stable=True)
            home = order.sort(dim=1, stable=True).indices
            x = x.gather(1, order[..., None].expand_as(x))
        y = ops.token_conv(
            x,
            wide(self._stack("conv1d{b}.weight"))[:, :, 0],
            wide(self._stack("conv1d{b}.bias")),
            position,
            # Neighbours that were pruned are zeros then; a list puts strangers side by side.
            by_position=tokens.conv_on_grid,
            backend=self.backend,
        )
        return y if home is None else y.gather(2, home[:, None, :, None].expand_as(y))

    def _operands(self, u: Tensor) -> ScanOperands:
        """The scan's inputs from u (batch, branches, seqlen, d_inner)."""
        c = self.config
        q = u @ self._stack("x_proj{b}.weight").transpose(1, 2)
        dt, B, C = q.split([c.dt_rank, c.d_state, c.d_state], dim=3)
        # Without dt_proj's bias: the scan adds it in float32, before the softplus.
        delta = dt @ self._stack("dt_proj{b}.weight").transpose(1, 2)
        A_log: list[Tensor] = [self.A_log] if c.bimamba == "none" else [self.A_log, self.A_b_log]
        # A list of one is shared by the directions; v1 has two decays but one skip.
        D: list[Tensor] = [self.D] if c.bimamba != "v2" else [self.D, self.D_b]
        return ScanOperands(
            u=u,
            delta=delta,
            A=-torch.exp(wide(torch.stack(A_log))),
            B=B,
            C=C,
            D=wide(torch.stack(D)),
            delta_bias=wide(self._stack("dt_proj{b}.bias")),
        )

    def _scan(
        self, operands: ScanOperands, z: Tensor, tokens: Tokens, rule: ScoreRule | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gated y (batch, seqlen, d_inner), and the score where one is asked for."""
        # Scores read y before the gate, and no operator takes both z and delta0:
        # only otherwise can the gate go into the scan.
        if rule is None and not tokens.constant_gap:
            return self._node(operands, tokens.steps.order, tokens.steps.gap, z=z), None
        delta0 = self._delta0() if tokens.constant_gap else None
        scored = y = self._node(operands, tokens.steps.order, tokens.steps.gap, delta0=delta0)
        if rule is not None and rule.by_direction and tokens.steps.order.shape[1] > 1:
            # Once more by itself: the layer's own result stays bit for bit the dense model's.
            k = 0 if rule.score_direction == "forward" else 1
            scored = self._direction(operands, k, tokens, delta0)
        score = None if rule is None else rule.score(ScanOutputs(scored, z))
        return y * functional.silu(z), score

    def _direction(
        self, operands: ScanOperands, k: int, tokens: Tokens, delta0: Tensor | None
    ) -> Tensor:
        """One direction of the scan alone, (batch, seqlen, d_inner)."""
        only = slice(k, k + 1)
        if delta0 is not None and delta0.shape[0] > 1:
            delta0 = delta0[only]
        order, gap = tokens.steps.order[:, only], tokens.steps.gap[:, only]
        return self._node(operands.direction(k), order, gap, delta0=delta0)

    def _node(
        self,
        operands: ScanOperands,
        order: Tensor,
        gap: Tensor,
        *,
        z: Tensor | None = None,
        delta0: Tensor | None = None,
    ) -> Tensor:
        o = operands
        return ops.selective_scan(
            o.u,
            o.delta,
            o.A,
            o.B,
            o.C,
            D=o.D,
            delta_bias=o.delta_bias,
            order=order,
            gap=gap,
            z=z,
            delta0=delta0,
            scale=self.config.scale,
            direction_axis=1,
            backend=self.backend,
        )

    def _delta0(self) -> Tensor:
        """Step size (branches, d_inner) of an all-zero token: its convolution is the bias alone."""
        rank = self.config.dt_rank
        conv = functional.silu(wide(self._stack("conv1d{b}.bias")))
        # Only x_proj's rows for dt: a pruned position decays the state and
        # adds nothing to it, so it needs no B and no C.
        low = wide(self._stack("x_proj{b}.weight"))[:, :rank] @ conv[..., None]
        step = (wide(self._stack("dt_proj{b}.weight")) @ low)[..., 0]
        return functional.softplus(step + wide(self._stack("dt_proj{b}.bias")))


_WIDE_PARAMETERS = (
    "A_log",
    "A_b_log",
    "mixer.D",
    "mixer.D_b",
    "conv1d.weight",
    "conv1d.bias",
    "conv1d_b.weight",
    "conv1d_b.bias",
    "dt_proj.bias",
    "dt_proj_b.bias",
    "pos_embed",
    "cls_token",
    "cls_token_head",
    "cls_token_tail",
)


def stays_wide(name: str) -> bool:
    """Whether a parameter of a Vim is a norm's, an embedding's, or one that the scan takes wide."""
    return name.endswith(_WIDE_PARAMETERS) or ".norm." in name or "norm_f." in name


class PatchEmbed(nn.Module):
    """Patches to tokens by a strided convolution, row by row, no norm."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.d_model, config.patch_size, config.stride)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) to (batch, patches, d_model)."""
        return wide(self.proj(to_dtype(images, self.proj.weight.dtype))).flatten(2).transpose(1, 2)


class VimBlock(nn.Module):
    """Add, norm, mix: the mixer's output is added by the next block."""

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.norm = _norm(config)
        self.mixer = VimMixer(config.mixer)

    def forward(
        self,
        hidden: Tensor | None,
        residual: Tensor,
        tokens: Tokens,
        rule: ScoreRule | MetricRule | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(batch, seqlen, d_model) streams to (mixer output, new residual, what is asked)."""
        # The first block gets no mixer output; its residual is the embedding itself.
        if hidden is not None:
            residual = residual + hidden
        normed = to_dtype(self.norm(residual), self.mixer.in_proj.weight.dtype)
        hidden, score = self.mixer(normed, tokens, rule)
        return hidden, residual, score


def refuse_schedule(config: VimConfig, schedule: Schedule | None) -> None:
    """Refuse a schedule that this configuration has no meaning for.

    Raises:
        UnsupportedError: it asks for a scan or a class token that is not there.
    """
    if schedule is None:
        return
    if config.class_token == "double":
        raise UnsupportedError(
            "class_token='double' cannot be pruned or merged: two class tokens frame the "
            "sequence and the method protects one; use the dense model"
        )
    if config.bidirectional_layers:
        raise UnsupportedError(
            "bidirectional_layers=True cannot be pruned or merged: a pair of layers has no "
            "single scan to score, nor one list of tokens; use the dense model"
        )
    if isinstance(schedule, MergeSchedule):
        if schedule.prune is None:
            return
        schedule = schedule.prune
    backward = schedule.score_direction == "backward" or schedule.importance == "as_released"
    if config.bimamba == "none" and backward:
        raise UnsupportedError(
            "bimamba='none' has no backward scan, which score_direction='backward' and "
            "importance='as_released' score by; use score_direction='sum' and "
            "another importance"
        )


See = Callable[[int, Tensor, Tensor, Tokens], None]


def run_blocks(
    model: VisionModel,
    layers: nn.ModuleList,
    residual: Tensor,
    tokens: Tokens,
    *,
    rotation: Rotation,
    see: See,
) -> tuple[Tensor, Tensor, Tokens, list[StageResult]]:
    """A model's blocks in a row, with the stages of its schedule between them.

    Args:
        model: says where it prunes, by what and with which backend.
        layers: its blocks.
        residual: the embedded tokens (batch, seqlen, d_model).
        tokens: all of them.
        rotation: what turns the streams before every block.
        see: called after each block and before its stage, with the block's number, 1-based, both
            streams and the tokens present.

    Returns:
        Both streams, the tokens that are left, and what each stage chose.
    """
    hidden: Tensor | None = None
    chosen: list[StageResult] = []
    for number, layer in enumerate(layers, start=1):
        # The official code turns the stream again before every block,
        # not only once behind the embedding.
        hidden, residual = rotation(hidden, residual, tokens)
        stage = model.stages.get(number)
        rule = metric_rule(stage) if isinstance(stage, MergeStage) else score_rule(stage)
        hidden, residual, score = layer(hidden, residual, tokens, rule)
        see(number, hidden, residual, tokens)
        if stage is not None:
            tokens, (hidden, residual), result = _reduce(
                model, stage, tokens, score, (hidden, residual)
            )
            chosen.append(result)
    if hidden is None:
        raise AssertionError("VimConfig asks for at least one block")
    return hidden, residual, tokens, chosen


def _reduce(
    model: VisionModel,
    stage: Stage | MergeStage,
    tokens: Tokens,
    score: Tensor | None,
    streams: tuple[Tensor, Tensor],
) -> tuple[Tokens, list[Tensor], StageResult]:
    """What a stage leaves; both streams alike, as the next block adds them row by row."""
    if isinstance(stage, MergeStage):
        # The mixer's output alone is compared, without the residual it will be added to.
        return merge(stage, tokens, streams[0] if score is None else score, list(streams))
    if score is None:
        raise AssertionError("a block gives the score that its rule asks for")
    return model.pruner(stage, tokens, score, list(streams), backend=model.backend)


class Vim(VisionModel):
    """Vim with its official keys; `schedule` prunes or merges between blocks.

    Args:
        config: architecture.
        schedule: pruning or merging, None for the dense model.
        name: for reports and model.json.

    Raises:
        ValueError: a schedule's block lies outside the model.
        UnsupportedError: these switches can be neither pruned nor merged.
    """

    config: VimConfig
    merges = True
    list_convolution = True

    def __init__(
        self, config: VimConfig, schedule: Schedule | None = None, *, name: str = "vim"
    ) -> None:
        super().__init__()
        self.name, self.config, self.schedule = name, config, schedule
        self.image_size, self.num_classes = config.image_height_width, config.num_classes
        # Pairs of layers have no single stream to report.
        self.traced_blocks = 0 if config.bidirectional_layers else config.depth
        # Before any parameter is made: a large model would take its time only to be refused.
        refuse_schedule(config, schedule)
        self.class_positions = positions = config.class_positions
        self.layout = TokenLayout(config.seqlen, positions[0] if positions else None, keep_odd=True)
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
        return stays_wide(name)

    def blocks_on_maps(self) -> list[tuple[nn.Module, tuple[int, int]]]:
        """Every block on the grid of patches.

        Raises:
            UnsupportedError: the layers work in pairs.
        """
        if self.config.bidirectional_layers:
            raise UnsupportedError(
                "bidirectional_layers=True: every other layer runs on the reversed sequence, which "
                "no map here shows; use a model without it"
            )
        return [(layer, self.config.grid) for layer in self.layers]

    def _embed(self, images: Tensor) -> Tensor:
        """Tokens (batch, seqlen, d_model), class tokens in their positions, positions added."""
        patches = self.patch_embed(images)
        pieces, start = [], 0
        for before, (key, position) in enumerate(
            zip(self._class_keys(), self.config.class_positions, strict=True)
        ):
            end = position - before  # patches in front of this class token
            class_token = wide(getattr(self, key)).expand(patches.shape[0], -1, -1)
            pieces += [patches[:, start:end], class_token]
            start = end
        pieces.append(patches[:, start:])
        # A class token at the very front or end leaves an empty
        # slice, which has no use in the graph.
        x = torch.cat([piece for piece in pieces if piece.shape[1]], dim=1)
        return x + wide(self.pos_embed)

    def _forward(self, images: Tensor, with_blocks: bool) -> ForwardDetails:
        residual = self._embed(images)
        directions = 1 if self.config.bimamba == "none" else 2
        # Made in each pass and not stored: the device is the
        # images', which can change between calls.
        walks = LineWalks(self.config.seqlen, directions, images.device)
        tokens = Tokens.dense(walks, self.config.seqlen, images.device)
        if self.config.bidirectional_layers:
            hidden, residual = self._layer_pairs(residual, tokens)
            return details(self._logits(hidden, residual, tokens), [], [])
        blocks: list[tuple[Tensor, Tensor | None]] = []

        def see(_: int, hidden: Tensor, residual: Tensor, __: Tokens) -> None:
            if with_blocks:
                blocks.append((hidden, residual))

        hidden, residual, tokens, chosen = run_blocks(
            self, self.layers, residual, tokens, rotation=self._rotation, see=see
        )
        return details(self._logits(hidden, residual, tokens), chosen, blocks)

    @property
    def _rotation(self) -> Rotation:
        return Rotation(self.rope if self.config.rope else None, self.config.rope_residual)

    def _layer_pairs(self, residual: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """if_bidirectional: each pair of layers runs on the sequence and on its reverse."""
        hidden: Tensor | None = None
        for first in range(0, self.config.depth, 2):
            hidden, residual = self._rotation(hidden, residual, tokens)
            flipped = None if hidden is None else hidden.flip(1)
            # Both layers get the same stream and both residuals are added: it
            # doubles with every pair, as in the official code.
            ahead, res_ahead, _ = self.layers[first](hidden, residual, tokens, None)
            back, res_back, _ = self.layers[first + 1](flipped, residual.flip(1), tokens, None)
            hidden, residual = ahead + back.flip(1), res_ahead + res_back.flip(1)
        if hidden is None:
            raise AssertionError("VimConfig asks for at least one pair of layers")
        return hidden, residual

    def _logits(self, hidden: Tensor, residual: Tensor, tokens: Tokens) -> Tensor:
        x = residual + hidden
        positions = self.config.class_positions
        if positions:
            x = self.norm_f(self._class_tokens(x, tokens))  # the norm is by token: pick first
            return self._classify(x[:, 0] if len(positions) == 1 else x.mean(1))
        if tokens.kept is not None:
            # Masked tokens still stand in the sequence, and later blocks
            # made them non-zero: no pool of them.
            x = x.gather(1, tokens.kept[..., None].expand(-1, -1, x.shape[-1]))
        if self.config.pool == "last":
            return self._classify(self.norm_f(x[:, -1]))
        x = self.norm_f(x)
        return (
            # "max" is over the tokens' logits, as in the official code, not over their features.
            self._classify(x.mean(1)) if self.config.pool == "mean" else self._classify(x).amax(1)
        )

    def _classify(self, features: Tensor) -> Tensor:
        return wide(self.head(to_dtype(features, self.head.weight.dtype)))

    def _class_tokens(self, x: Tensor, tokens: Tokens) -> Tensor:
        """The class tokens' rows (batch, 1 or 2, d_model), wherever pruning has put them."""
        if tokens.complete:  # nothing has moved
            return torch.cat(
                [x[:, position : position + 1] for position in self.config.class_positions], dim=1
            )
        # Its index differs from image to image; compare and sum
        # needs no gather with dynamic indices.
        is_class = torch.eq(tokens.position[..., None], self.config.class_positions[0])
        zero = torch.zeros((), dtype=x.dtype, device=x.device)  # from the host: no CUDA graph
        return torch.where(is_class, x, zero).sum(1, keepdim=True)

    def fixed_cost(self) -> int:
        """Multiply-adds of the patch embedding and the classifier."""
        return patch_cost(self.config) + self.config.d_model * self.config.num_classes

    def block_cost(self) -> BlockCost:
        """Cost of any block, by token."""
        return block_cost(self.config)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resize a position table of another grid, class rows taken out and put back.

        Raises:
            CheckpointError: the table is not a square grid with this model's class tokens.
        """
        table = state.get("pos_embed")
        positions = self.config.class_positions
        if table is None or table.dim() != 3 or table.shape[1] == self.config.seqlen:
            return state
        # A table does not say its shape; the released models are all square.
        side = math.isqrt(max(table.shape[1] - len(positions), 0))
        if side * side + len(positions) != table.shape[1]:
            raise CheckpointError(
                f"pos_embed.shape={tuple(table.shape)} is not a square grid with "
                f"{len(positions)} class tokens; load a checkpoint of the same class-token layout"
            )
        # The class rows have no place in the grid; where they stood
        # follows from the old patch count.
        old = {"middle": (side * side // 2,), "double": (0, side * side + 1)}.get(
            self.config.class_token, (0,) * len(positions)
        )
        is_patch = torch.ones(table.shape[1], dtype=torch.bool)
        is_patch[list(old)] = False
        grid = resize_grid(table[:, is_patch], (side, side), self.config.grid)
        resized = table.new_empty(1, self.config.seqlen, table.shape[2])
        is_patch = torch.ones(self.config.seqlen, dtype=torch.bool)
        is_patch[list(positions)] = False
        resized[:, is_patch] = grid
        resized[:, list(positions)] = table[:, list(old)]
        return {**state, "pos_embed": resized}


def patch_cost(config: VimConfig) -> int:
    """Multiply-adds of the patch embedding."""
    return config.d_model * config.patches * 3 * config.patch_size * config.patch_size


def block_cost(config: VimConfig) -> BlockCost:
    """Cost of any block, by token."""
    mixer = config.mixer
    inner, low = mixer.d_inner, mixer.dt_rank
    return BlockCost(
        shared=3 * config.d_model * inner,
        branch=inner * (low + 2 * config.d_state + low),
        convolution=inner * config.d_conv,
        # v1 scans twice, but projects and convolves once for both directions.
        branches=2 if config.bimamba == "v2" else 1,
        directions=1 if config.bimamba == "none" else 2,
        states=inner * config.d_state,
        # Skip and gate, both counted in every direction, by the published rule.
        per_token=2 * inner,
    )


def _norm(config: VimConfig) -> nn.Module:
    return (RMSNorm if config.rms_norm else LayerNorm)(config.d_model, eps=config.norm_eps)
