"""`prune`: a pruned twin of a model that the user has."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from vssm.compat.exact import evaluating, set_eval
from vssm.compat.packages.norms import layer_norm_fn, rms_norm_fn
from vssm.errors import UnsupportedError, reason
from vssm.models.base import ForwardDetails, details
from vssm.models.vim import VimMixer, VimMixerConfig
from vssm.ops.ambient import known_state
from vssm.ops.record import record_backends
from vssm.pruning.schedule import (
    MergeSchedule,
    PruneSchedule,
    Schedule,
    Stage,
    TokenLayout,
    plan_stages,
)
from vssm.pruning.select import StageResult, Tokens, score_rule
from vssm.pruning.select import prune as prune_stage
from vssm.pruning.walks import LineWalks

_MIXER_KEYS: Final = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")


@dataclass
class _Pass:
    """What the blocks of one forward pass hand on: the tokens present and the decisions."""

    stages: dict[int, Stage]
    depth: int
    directions: int
    tokens: Tokens | None = None
    handed: tuple[Any, Any] = (None, None)
    block: int = 0
    chosen: list[StageResult] = field(default_factory=list)
    seqlen: int = 0
    only_position: int | None = None  # behind the stack, zeros everywhere else

    def start(self) -> None:
        """Forget the pass before."""
        self.tokens, self.handed, self.block, self.chosen = None, (None, None), 0, []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Pass:
        """A copy of the plan alone: tensors of the last pass may be a tracer's."""
        twin = _Pass(self.stages, self.depth, self.directions)
        twin.seqlen, twin.only_position = self.seqlen, self.only_position
        memo[id(self)] = twin
        return twin

    def behind(self, x: Tensor) -> Tensor:
        """What the model sees of a stream (batch, seqlen, d_model) behind its blocks."""
        if self.only_position is None:
            return x
        seen = torch.zeros_like(x)
        seen[:, self.only_position] = x[:, self.only_position]
        return seen


class PrunedModule(nn.Module):
    """A user's model whose blocks prune; made by `prune`. Its weights keep their keys in `model`.

    Attributes:
        model: the user's model, its blocks replaced.
        schedule: the pruning.
        stages: the schedule's stages by block.
        layout: the tokens before pruning.
    """

    layout: TokenLayout | None

    def __init__(
        self, model: nn.Module, blocks: str, schedule: PruneSchedule | None, layout: TokenLayout
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.schedule, self.layout = schedule, layout
        stack = stack_of(self.model, blocks)
        self.stages = plan_stages(schedule, layout, len(stack))
        ours = [PrunedBlock(block, number) for number, block in enumerate(stack, start=1)]
        # The user's model calls its blocks itself, and hands on two tensors; all else that the
        # blocks share goes through this object.
        self._run = _Pass(self.stages, len(ours), ours[0].mixer.directions)
        for position, block in enumerate(ours):
            block.run = self._run
            stack[position] = block
        set_eval(self)

    @property
    def state(self) -> _Pass:
        """What the last forward pass was like."""
        return self._run

    def forward(self, x: Tensor) -> Any:
        """What the user's model returns."""
        self._run.start()
        found = self.model(x)
        # Only the last block puts tokens back in place: a model that leaves the stack early would
        # read pruned streams as if they were whole.
        if self._run.block != self._run.depth:
            raise UnsupportedError(
                f"the model ran {self._run.block} of its {self._run.depth} blocks; prune a model "
                "that runs each once, in order"
            )
        return found

    def forward_details(self, x: Tensor) -> ForwardDetails:
        """The forward pass with its decisions.

        Raises:
            UnsupportedError: the model does not return one tensor.
        """
        logits = self(x)
        if not isinstance(logits, Tensor):
            raise UnsupportedError(
                f"the pruned model returns {type(logits).__name__}, not its logits alone; wrap it"
            )
        return details(logits, self._run.chosen, [])


class _Mixer(VimMixer):
    """Our mixer with the parameters of the user's."""

    def __init__(self, theirs: nn.Module, number: int) -> None:
        super().__init__(_mixer_config(theirs))
        given, own = dict(theirs.named_parameters()), dict(self.named_parameters())
        shapes = [{k: tuple(v.shape) for k, v in p.items()} for p in (given, own)]
        if shapes[0] != shapes[1]:
            odd = sorted(k for k in {**given, **own} if shapes[0].get(k) != shapes[1].get(k))
            raise UnsupportedError(
                f"block {number}: its mixer's weights {', '.join(odd[:4])} are not those of "
                "mamba_ssm's Mamba without projection biases; prune a model with that mixer"
            )
        # The parameters themselves, under their old keys, so that the user's state dicts still
        # load.
        for key, value in given.items():
            owner, _, name = key.rpartition(".")
            setattr(self.get_submodule(owner), name, value)

    @property
    def directions(self) -> int:
        """How many ways its scan goes."""
        return 1 if self.config.bimamba == "none" else 2


class PrunedBlock(nn.Module):
    """Add, norm, mix, and prune where a stage follows; the last puts tokens back in place."""

    run: _Pass

    def __init__(self, block: nn.Module, number: int) -> None:
        super().__init__()
        norm, mixer = getattr(block, "norm", None), getattr(block, "mixer", None)
        if not isinstance(norm, nn.Module) or not isinstance(mixer, nn.Module):
            raise UnsupportedError(
                f"block {number} ({type(block).__name__}) has no `norm` and `mixer`; only "
                "mamba_ssm's and Vim's blocks can be pruned here: hidden and residual in and out. "
                "Export the model dense"
            )
        self.number, self.norm, self.mixer = number, norm, _Mixer(mixer, number)
        _check_same_pruned(block, self)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None
    ) -> tuple[Tensor, Tensor]:
        """(batch, seqlen, d_model) streams to the mixer's output and the residual."""
        if inference_params is not None:
            raise UnsupportedError("inference_params: a pruned model has no cache; leave it out")
        run = self.run
        self._follow(run, hidden_states, residual)
        tokens: Any = run.tokens
        stage = run.stages.get(self.number)
        hidden, residual, score = self.mix(hidden_states, residual, tokens, stage)
        if stage is not None:
            tokens, streams, result = prune_stage(stage, tokens, score, [hidden, residual])
            hidden, residual = streams
            run.chosen.append(result)
        run.tokens, run.block = tokens, self.number
        # The model reads its class token where it always was.
        if self.number == run.depth:
            hidden, residual = (run.behind(tokens.to_positions(x)) for x in (hidden, residual))
        run.handed = (hidden, residual)
        return hidden, residual

    def mix(
        self, hidden: Tensor, residual: Tensor | None, tokens: Tokens, stage: Stage | None
    ) -> tuple[Tensor, Tensor, Any]:
        """The block as it is, and the score where a stage asks for one."""
        norm: Any = self.norm
        # What upstream's blocks compute with `fused_add_norm` and without it. All is float32 here,
        # so their own `residual_in_fp32` changes nothing.
        normalise = layer_norm_fn if isinstance(norm, nn.LayerNorm) else rms_norm_fn
        normed, total = normalise(
            hidden,
            norm.weight,
            norm.bias,
            residual=residual,
            eps=norm.eps,
            prenorm=True,
            residual_in_fp32=True,
        )
        mixed, score = self.mixer(normed, tokens, score_rule(stage))
        return mixed, total, score

    def _follow(self, run: _Pass, hidden: Tensor, residual: Tensor | None) -> None:
        """Refuse blocks out of order, and models that do something between them."""
        if run.block != self.number - 1:
            raise UnsupportedError(
                f"block {self.number} runs after block {run.block}; only a plain stack, each block "
                "once and in order, can be pruned"
            )
        if self.number == 1:
            run.seqlen = hidden.shape[1]
            walks = LineWalks(run.seqlen, run.directions, hidden.device)
            run.tokens = Tokens.dense(walks, run.seqlen, hidden.device)
        # By identity: whatever touches a stream, even a copy, makes another tensor.
        elif hidden is not run.handed[0] or residual is not run.handed[1]:
            raise UnsupportedError(
                f"the model changes the tokens between blocks {run.block} and {self.number} (rope, "
                "a flip, a tap), which knows nothing of pruned positions; prune a model that hands "
                "them on as they are"
            )


def stack_of(model: nn.Module, blocks: str) -> nn.ModuleList:
    """The blocks of a model.

    Raises:
        UnsupportedError: there is no such list of modules.
    """
    stack: Any = model
    for name in blocks.split("."):
        stack = getattr(stack, name, None)
    if not isinstance(stack, nn.ModuleList) or not len(stack):
        lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        raise UnsupportedError(
            f"blocks={blocks!r} is not a list of blocks in {type(model).__name__}, which has "
            f"{', '.join(lists) or 'none'}; name the plain stack whose blocks hand tokens on"
        )
    return stack


def _refuse_unknown_mixers(model: nn.Module, blocks: str, example: Tensor) -> None:
    """Refuse scans whose walks are not known, and say how many there are in a block."""
    for number, block in enumerate(stack_of(model, blocks), start=1):
        mixer = getattr(block, "mixer", None)
        missing = [key for key in _MIXER_KEYS if not hasattr(mixer, key)]
        if mixer is None or not missing:
            continue
        count = _scans_of(mixer, model, example)
        raise UnsupportedError(
            f"block {number}: its mixer ({type(mixer).__name__}) runs {count} selective "
            f"scan{'' if count == 1 else 's'}, and is neither mamba_ssm's Mamba (version 1) nor "
            f"Vim's, as it has no {', '.join(missing)}. Where tokens are gone, a scan has to know "
            "how many places of its walk each step stands for; known here are the walk along the "
            "line and the one back, not those by columns or windows, nor what else a mixer does "
            "with neighbours. Export the model dense, or prune one of `vssm models`, whose walks "
            "are known"
        )


def _scans_of(mixer: nn.Module, model: nn.Module, example: Tensor) -> int:
    """How many selective scans a mixer runs in its first call."""
    marks: list[int] = []
    with evaluating(model), torch.inference_mode(), record_backends() as ran:
        hooks = (
            mixer.register_forward_pre_hook(lambda *_: marks.append(sum(ran.values()))),
            mixer.register_forward_hook(lambda *_: marks.append(sum(ran.values()))),
        )
        try:
            model(example)
        finally:
            for hook in hooks:
                hook.remove()
    # No mark at all of a mixer that the model does not call.
    return marks[1] - marks[0] if marks else 0


def _mixer_config(mixer: nn.Module) -> VimMixerConfig:
    """Sizes and kind of a Mamba mixer, read from its weights."""
    m: Any = mixer
    # By the weights' shapes, as a fork need not keep the attributes; in_proj makes scan and gate.
    d_inner, d_model = m.in_proj.weight.shape[0] // 2, m.in_proj.weight.shape[1]
    # Forks call the attribute otherwise; v1 has an own A for the way back, v2 all weights.
    bimamba = "v2" if hasattr(m, "conv1d_b") else "v1" if hasattr(m, "A_b_log") else "none"
    return VimMixerConfig(
        d_model=d_model,
        d_inner=d_inner,
        d_state=m.A_log.shape[1],
        d_conv=m.conv1d.weight.shape[-1],
        dt_rank=m.dt_proj.weight.shape[1],
        bimamba=bimamba,
        divide_out=bool(getattr(m, "if_divide_out", False)),
        # Any value: the user's `gamma` takes its place.
        layer_scale=1.0 if getattr(m, "gamma", None) is not None else None,
    )


def _check_same_pruned(theirs: nn.Module, ours: PrunedBlock) -> None:
    """Run both on noise: a fork whose block computes something else is not pruned as if it did."""
    generator = torch.Generator().manual_seed(ours.number)
    shape = (1, 5, ours.mixer.config.d_model)
    weight = next(ours.parameters())
    # A residual as well: with None a block that forgets to add it would pass.
    hidden, residual = (
        torch.randn(shape, generator=generator).to(weight.device, weight.dtype) for _ in range(2)
    )
    walks = LineWalks(5, ours.mixer.directions, weight.device)
    twin = copy.deepcopy(theirs)
    set_eval(twin)
    with torch.inference_mode():
        try:
            want = twin(hidden, residual)
            got = ours.mix(hidden, residual, Tokens.dense(walks, 5, weight.device), None)[:2]
            same = all(
                bool(((a - b).abs().max() <= _SAME * b.abs().max()).item())
                for a, b in zip(got, want, strict=True)
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise UnsupportedError(
                f"block {ours.number} ({type(theirs).__name__}) does not take and return (hidden, "
                f"residual): {reason(error)}; only such blocks can be pruned here"
            ) from error
    if not same:
        raise UnsupportedError(
            f"block {ours.number} ({type(theirs).__name__}) computes something else than add, norm "
            "and Mamba mixer; a changed block cannot be pruned here"
        )


# Of the largest value; float32 rounding of the official block is below 1e-6.
_SAME: Final = 1e-4


@known_state()
def prune(
    model: nn.Module,
    schedule: Schedule,
    example_input: Tensor,
    *,
    blocks: str = "layers",
    cls_index: int | None = None,
) -> PrunedModule:
    """A copy of `model` that prunes tokens between its blocks, with hidden-state alignment.

    For models whose blocks form a plain stack: `model.blocks[i](hidden, residual)` returns both,
    every block once and in order with nothing between, the mixer being mamba_ssm's Mamba version 1
    or Vim's bidirectional one. That is tried, not believed: our blocks must give the numbers of the
    model's. Behind the last block the kept tokens are back where they were, the pruned ones zero.

    Args:
        model: left as it was; float32, evaluated as in eval mode.
        schedule: which blocks prune, and how much.
        example_input: one input that the model takes; two for a batch axis that is not 1.
        blocks: attribute that holds the blocks, with dots.
        cls_index: position of the class token, which is kept and read; None: as Vim's
            attributes say.

    Returns:
        A module for `export_module`; called, it returns what the model does.

    Raises:
        UnsupportedError: the model is no such stack, has no class token, or this schedule cannot be
            applied to it.
        ValueError: a block of the schedule, or `cls_index`, lies outside the model.
    """
    if isinstance(schedule, MergeSchedule):
        raise UnsupportedError(
            f"schedule={schedule.describe()!r}: merging needs to know what a model does with its "
            "class token from block to block, and of yours nothing is known; prune with a "
            "PruneSchedule, or merge the tokens of a vim_* model"
        )
    if schedule.step_parameters != "rank":
        raise UnsupportedError(
            f"step_parameters={schedule.step_parameters!r} is PlainMamba's choice; leave it out"
        )
    if not isinstance(example_input, Tensor):
        raise UnsupportedError(
            f"example_input={type(example_input).__name__}: only a model of one input, whose "
            "tokens its blocks hand on, is pruned here; give that tensor, or export it dense"
        )
    # Unpruned first: only then can equal numbers prove that our blocks are the model's. How many
    # tokens there are is known after its first pass, and without stages nobody asks before.
    position = _class_position(model) if cls_index is None else cls_index
    _refuse_unknown_mixers(model, blocks, example_input)
    dense = PrunedModule(model, blocks, None, TokenLayout(1, None, keep_odd=True))
    with torch.inference_mode():
        seqlen = _check_same(model, dense, example_input, position)
    _check_directions(schedule, dense)
    return PrunedModule(model, blocks, schedule, TokenLayout(seqlen, position, keep_odd=True))


def _class_position(model: Any) -> int:
    """Where Vim puts its class token."""
    remedy = "give cls_index=PLACE if the model reads one token, its class token, and no other"
    if not getattr(model, "if_cls_token", False):
        raise UnsupportedError(
            f"{type(model).__name__} has no if_cls_token that says that it reads a class token; "
            f"pooling over all positions would count the pruned ones: {remedy}"
        )
    if getattr(model, "use_double_cls_token", False):
        raise UnsupportedError("two class tokens cannot be pruned around; use the dense model")
    patches = int(model.patch_embed.num_patches)
    # As the official forward pass puts it in: in front of patch M // 2, or of all.
    return patches // 2 if getattr(model, "use_middle_cls_token", False) else 0


def _check_directions(schedule: PruneSchedule, dense: PrunedModule) -> None:
    backward = schedule.score_direction == "backward" or schedule.importance == "as_released"
    if backward and dense.state.directions == 1:
        raise UnsupportedError(
            "score_direction='backward' and importance='as_released' score by a backward "
            "scan, which this model does not have; use score_direction='sum' and another importance"
        )


def _check_same(model: nn.Module, dense: PrunedModule, example: Tensor, position: int) -> int:
    """The unpruned twin must be the model, and read the class token alone; its tokens."""
    with evaluating(model):
        want = model(example)
    name = type(model).__name__
    if not isinstance(want, Tensor):
        raise UnsupportedError(f"{name} returns {type(want).__name__}, not its logits; wrap it")
    if not _close(dense(example), want):
        raise UnsupportedError(
            f"{name} with this package's blocks gives other numbers; its stack does something "
            "that is not known here, and is not pruned as if it were"
        )
    seqlen = dense.state.seqlen
    if not 0 <= position < seqlen:
        raise ValueError(f"cls_index={position} is outside [0, {seqlen}), the model's tokens")
    # Equal logits with all other tokens zero prove what the model reads, whatever its pooling is
    # called.
    dense.state.only_position = position
    if not _close(dense(example), want):
        raise UnsupportedError(
            f"{name} reads more than the token at cls_index={position} behind its blocks; a mean "
            "over all positions would count the pruned ones: give the class token's, or prune a "
            "model that classifies by one token"
        )
    return seqlen


def _close(got: Tensor, want: Tensor) -> bool:
    return float((want - got).abs().max()) <= _SAME * float(want.abs().max())
