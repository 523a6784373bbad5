"""Token pruning with hidden-state alignment, written once for every model.

`Tokens` is what the blocks are told about the tokens still present; a `ScoreRule` turns a scan's
output into scores; `prune` makes one stage. Source: Zhan et al., "Exploring Token Pruning in
Vision State Space Models", NeurIPS 2024, arXiv:2409.18962.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from vssm.ops import operators as ops
from vssm.ops import reference
from vssm.pruning.schedule import Stage
from vssm.pruning.walks import Walks, WalkSteps


@dataclass(frozen=True)
class Tokens:
    """What the blocks are told about the tokens that are present.

    Attributes:
        position: (1 or batch, seqlen) int32, the original position of each token.
        walks: the directions in which layers scan.
        steps: the scan's steps over the tokens present.
        full_seqlen: tokens before any pruning.
        constant_gap: pruned positions decay by delta0 instead of the kept token's step.
        conv_on_grid: convolutions see the full list, with zeros at pruned positions.
        ascending: positions rise from token to token; as_released moves the class token.
        full_parameters: a step has delta, B and C of its position in the full list.
        kept: indices (batch, n) that still count, where pruned tokens stay in place (masked).
        size: (batch, seqlen) float32 or wider, how many original tokens each stands for; None
            where none have been merged.
        owner: (batch, full_seqlen) int64, the original position of the token that each original
            position is now part of; None where nobody asks, or none have been merged.
    """

    position: Tensor
    walks: Walks
    steps: WalkSteps
    full_seqlen: int
    constant_gap: bool = False
    conv_on_grid: bool = False
    ascending: bool = True
    full_parameters: bool = False
    kept: Tensor | None = None
    size: Tensor | None = None
    owner: Tensor | None = None

    @classmethod
    def dense(cls, walks: Walks, seqlen: int, device: torch.device) -> Tokens:
        """All tokens."""
        position = torch.arange(seqlen, dtype=torch.int32, device=device)[None]
        return cls(position, walks, walks.dense(), seqlen)

    @property
    def complete(self) -> bool:
        """Whether every token is still in its position."""
        # The count and not the batch of `position`: a pruned batch of one has one row as well.
        return self.position.shape[1] == self.full_seqlen

    @cached_property
    def row(self) -> Tensor:
        """(batch, seqlen) int64: each token's row in a table (batch * full_seqlen, width)."""
        image = torch.arange(self.position.shape[0], device=self.position.device)
        return self.position.long() + image[:, None] * self.full_seqlen

    def to_positions(self, x: Tensor, *, backend: str = "auto") -> Tensor:
        """Rows x (batch, seqlen, width) at their positions in zeros (batch, full_seqlen, width)."""
        base = x.new_zeros(x.shape[0], self.full_seqlen, x.shape[2])
        return self.onto(base, x, backend=backend)

    def onto(self, base: Tensor, x: Tensor, *, backend: str = "auto") -> Tensor:
        """Rows x (batch, seqlen, width) put over `base` (batch, full_seqlen, width).

        What computes it is `backend`, as for `ops.token_scatter`.
        """
        return x if self.complete else ops.token_scatter(base, x, self.position, backend=backend)

    def from_positions(self, table: Tensor) -> Tensor:
        """The tokens' rows (batch, seqlen, width) of a table (batch, full_seqlen, width)."""
        return table if self.complete else table.reshape(-1, table.shape[2])[self.row]


@dataclass(frozen=True)
class StageResult:
    """What one stage chose: kept_position (batch, n) int32 and the (batch, seqlen) score."""

    kept_position: Tensor
    score: Tensor


@dataclass(frozen=True)
class ScanOutputs:
    """What scores are made from: a scan's y (batch, seqlen, d_inner) and the gate z."""

    y: Tensor
    z: Tensor


@dataclass(frozen=True)
class ScoreRule:
    """What a block must hand over so that a stage after it can score its tokens."""

    importance: str
    score_direction: str
    gated: bool

    @property
    def by_direction(self) -> bool:
        """Whether a single direction is scored, so that it must be scanned by itself too."""
        return self.score_direction != "sum"

    def score(self, outputs: ScanOutputs) -> Tensor:
        """Score (batch, seqlen), float32 or wider, of y (batch, seqlen, d_inner); no gradient."""
        # Scores only choose, and a choice has no gradient; the tokens that stay carry theirs.
        y = outputs.y.detach()
        # A mean in half precision has three digits, and tokens are often closer than that.
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        if self.gated:
            y = y * functional.silu(outputs.z.detach().to(y.dtype))
        if self.importance == "clip":
            return y.relu().mean(-1)
        if self.importance == "l1":
            return y.abs().mean(-1)
        if self.importance == "l2":
            return y.square().sum(-1).sqrt()
        if self.importance == "as_released":
            return y.mean(-1).flip(1)  # token t is given the score of token seqlen - 1 - t
        return y.mean(-1)


def score_rule(stage: Stage | None) -> ScoreRule | None:
    """The rule for the block before `stage`; None where nothing is scored there."""
    if stage is None:
        return None
    schedule = stage.schedule
    if schedule.importance == "as_released":
        # The released code knows this rule alone; the schedule has refused any other.
        return ScoreRule("as_released", "backward", gated=True)
    return ScoreRule(schedule.importance, schedule.score_direction, schedule.gated)


def prune(
    stage: Stage,
    tokens: Tokens,
    score: Tensor,
    streams: Sequence[Tensor],
    *,
    backend: str = "auto",
) -> tuple[Tokens, list[Tensor], StageResult]:
    """Make one stage: choose by `score` (batch, seqlen) and gather every stream alike.

    Args:
        stage: what to do.
        tokens: the tokens present.
        score: (batch, seqlen) from the block's ScoreRule.
        streams: one or two (batch, seqlen, d_model), what the block returned: Vim's mixer output
            and the residual it will be added to, or the sum of both.
        backend: what computes the gather, as for `ops.token_gather`.

    Returns:
        The tokens after the stage, their rows of each stream, and what was chosen.
    """
    position = tokens.position.expand(score.shape[0], -1)
    if tokens.kept is not None:  # what was masked before is not present
        position, score = position.gather(1, tokens.kept), score.gather(1, tokens.kept)
    # Before the early return, so that a stage that keeps everything reports the same scores.
    if stage.schedule.importance == "random":
        score = _random_score(stage, score)
    if stage.num_keep == stage.seqlen:
        return tokens, list(streams), StageResult(position, score)
    if stage.schedule.alignment == "masked":
        # Never exported, so there is no need for a kernel; the
        # rows stay in place.
        kept, _ = reference.token_gather(
            score, position, [], num_keep=stage.num_keep, protected_position=_protected(stage)
        )
        return *_mask(tokens, kept.long(), streams), StageResult(kept, score)
    if stage.schedule.importance == "as_released":
        kept, rows = _gather_recentred(stage, tokens, score, streams, backend=backend)
    else:
        kept, rows = ops.token_gather(
            score,
            tokens.position,
            streams,
            num_keep=stage.num_keep,
            protected_position=_protected(stage),
            backend=backend,
        )
    return _after(stage, tokens, kept), rows, StageResult(kept, score)


def _after(stage: Stage, tokens: Tokens, kept: Tensor) -> Tokens:
    """What is present once only the positions `kept` (batch, num_keep) are left."""
    schedule = stage.schedule
    steps = tokens.walks.among(kept)
    if schedule.alignment == "none":
        # Plain removal is alignment with every gap 1: the same
        # operators, the same graph around them.
        steps = replace(steps, gap=torch.ones_like(steps.order))
    size = tokens.size
    if size is not None:
        # Positions are distinct, so that each kept one is found once.
        same = torch.eq(kept[..., None], tokens.position[:, None])
        size = torch.where(same, size[:, None], torch.zeros_like(size[:, None])).sum(-1)
    return replace(
        tokens,
        position=kept,
        steps=steps,
        size=size,
        constant_gap=schedule.alignment == "constant",
        conv_on_grid=schedule.conv == "position",
        ascending=schedule.importance != "as_released",
        full_parameters=schedule.step_parameters == "full",
    )


def _mask(
    tokens: Tokens, indices: Tensor, streams: Sequence[Tensor]
) -> tuple[Tokens, list[Tensor]]:
    """Zero all but `indices` (batch, n), left in place: a token's index is its position."""
    ones = torch.ones_like(streams[0][..., :1], dtype=torch.bool)
    gone = ones.scatter(1, indices[..., None], False)
    return replace(tokens, kept=indices), [x.masked_fill(gone, 0) for x in streams]


def _gather_recentred(
    stage: Stage, tokens: Tokens, score: Tensor, xs: Sequence[Tensor], *, backend: str
) -> tuple[Tensor, list[Tensor]]:
    """The released code's choice: the best patches in order, the class token in their middle."""
    if stage.cls_keep_index is None:
        raise AssertionError("as_released stages have a static class index")
    index, middle = stage.cls_keep_index, stage.num_keep // 2

    def without_class(x: Tensor) -> Tensor:
        return torch.cat([x[:, :index], x[:, index + 1 :]], dim=1)

    position, rows = ops.token_gather(
        without_class(score),
        without_class(tokens.position),
        [without_class(x) for x in xs],
        num_keep=stage.num_keep - 1,
        backend=backend,
    )

    def with_class(chosen: Tensor, before: Tensor) -> Tensor:
        # The dense table of positions has one row for all images; the streams have one each.
        cls = before[:, index : index + 1].expand(chosen.shape[0], *before[:, :1].shape[1:])
        # From here on positions do not ascend, which is why gaps have no meaning in this mode.
        return torch.cat([chosen[:, :middle], cls, chosen[:, middle:]], dim=1)

    kept = with_class(position, tokens.position)
    return kept, [with_class(row, x) for row, x in zip(rows, xs, strict=True)]


def _protected(stage: Stage) -> int:
    return -1 if stage.layout.cls_index is None else stage.layout.cls_index


def _random_score(stage: Stage, score: Tensor) -> Tensor:
    draw = random.Random(f"{stage.schedule.seed}:{stage.block}")  # a constant of the exported graph
    # Python's generator, seeded by a text: the same numbers on every device and platform.
    drawn = [draw.random() for _ in range(stage.seqlen)]
    return torch.tensor(drawn, dtype=score.dtype, device=score.device).expand_as(score)
