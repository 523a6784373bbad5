"""Token pruning with hidden-state alignment, written once for every model.

`Tokens` is what the blocks are told about the tokens still present; a `ScoreRule` turns a scan's
output into scores; `prune` makes one stage. Source: Zhan et al., "Exploring Token Pruning in
Vision State Space Models", NeurIPS 2024, arXiv:2409.18962.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from exporter import ops, reference
from exporter.schedule import Stage


@dataclass(frozen=True)
class Tokens:
    """What the blocks are told about the tokens that are present.

    Attributes:
        position: (1 or batch, seqlen) int32, the original place of each token.
        order: (1, K, seqlen) int32, the token of each scan step.
        gap: (1 or batch, K, seqlen) int32, places each step stands for.
        constant_gap: pruned places decay by delta0 instead of the kept token's step.
        full_seqlen: tokens before any pruning.
        conv_on_grid: convolutions see the full list, with zeros at pruned places.
        kept: slots (batch, n) that still count, where pruned tokens stay in place (masked).
    """

    position: Tensor
    order: Tensor
    gap: Tensor
    constant_gap: bool
    full_seqlen: int
    conv_on_grid: bool = False
    kept: Tensor | None = None

    @classmethod
    def dense(cls, seqlen: int, directions: int, device: torch.device) -> Tokens:
        """All tokens of a line, scanned forward (and backward when there are two directions)."""
        position = torch.arange(seqlen, dtype=torch.int32, device=device)[None]
        order = _line_order(position, directions)
        return cls(position, order, torch.ones_like(order), False, seqlen)


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
    source: str
    gated: bool

    @property
    def by_direction(self) -> bool:
        """Whether a single direction is scored, so that it must be scanned by itself too."""
        return self.source != "sum"

    def score(self, outputs: ScanOutputs) -> Tensor:
        """Score (batch, seqlen), float32 or wider, of y (batch, seqlen, d_inner); no gradient."""
        y = outputs.y.detach()
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
        return ScoreRule("as_released", "backward", gated=True)
    return ScoreRule(schedule.importance, schedule.source, schedule.gated)


def prune(
    stage: Stage, tokens: Tokens, score: Tensor, hidden: Tensor, residual: Tensor
) -> tuple[Tokens, Tensor, Tensor, StageResult]:
    """Make one stage: choose by `score` (batch, seqlen) and gather hidden and residual alike.

    Args:
        stage: what to do.
        tokens: the tokens present.
        score: (batch, seqlen) from the block's ScoreRule.
        hidden: (batch, seqlen, d_model), the block's mixer output.
        residual: (batch, seqlen, d_model), the stream it will be added to.

    Returns:
        The tokens after the stage, their hidden and residual rows, and what was chosen.
    """
    position = tokens.position.expand(score.shape[0], -1)
    if tokens.kept is not None:  # what was masked before is not present
        position, score = position.gather(1, tokens.kept), score.gather(1, tokens.kept)
    if stage.schedule.importance == "random":
        score = _random_score(stage, score)
    if stage.num_keep == stage.seqlen:
        return tokens, hidden, residual, StageResult(position, score)
    if stage.schedule.alignment == "masked":
        kept, _ = reference.token_gather(
            score, position, [], num_keep=stage.num_keep, protected_position=_protected(stage)
        )
        return *_mask(tokens, kept.long(), hidden, residual), StageResult(kept, score)
    if stage.schedule.importance == "as_released":
        kept, rows = _gather_recentred(stage, tokens, score, [hidden, residual])
    else:
        kept, rows = ops.token_gather(
            score,
            tokens.position,
            [hidden, residual],
            num_keep=stage.num_keep,
            protected_position=_protected(stage),
        )
    aligned = stage.schedule.alignment in {"gap", "constant"}
    order = _line_order(kept[:1], tokens.order.shape[1])
    gap = _line_gap(kept, tokens.order.shape[1]) if aligned else torch.ones_like(order)
    after = replace(
        tokens,
        position=kept,
        order=order,
        gap=gap,
        constant_gap=stage.schedule.alignment == "constant",
        conv_on_grid=stage.schedule.conv == "grid",
    )
    return after, rows[0], rows[1], StageResult(kept, score)


def _mask(
    tokens: Tokens, slots: Tensor, hidden: Tensor, residual: Tensor
) -> tuple[Tokens, Tensor, Tensor]:
    """Zero all but `slots` (batch, n) and leave them in place: a token's slot is its place."""
    gone = torch.ones_like(hidden[..., :1], dtype=torch.bool).scatter(1, slots[..., None], False)
    return replace(tokens, kept=slots), hidden.masked_fill(gone, 0), residual.masked_fill(gone, 0)


def _gather_recentred(
    stage: Stage, tokens: Tokens, score: Tensor, xs: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The released code's choice: the best patches in order, the class token in their middle."""
    if stage.cls_slot is None:
        raise AssertionError("as_released stages have a static class slot")
    slot, middle = stage.cls_slot, stage.num_keep // 2

    def without_class(x: Tensor) -> Tensor:
        return torch.cat([x[:, :slot], x[:, slot + 1 :]], dim=1)

    position, rows = ops.token_gather(
        without_class(score),
        without_class(tokens.position),
        [without_class(x) for x in xs],
        num_keep=stage.num_keep - 1,
    )

    def with_class(chosen: Tensor, before: Tensor) -> Tensor:
        cls = before[:, slot : slot + 1].expand(chosen.shape[0], *before[:, :1].shape[1:])
        return torch.cat([chosen[:, :middle], cls, chosen[:, middle:]], dim=1)

    kept = with_class(position, tokens.position)
    return kept, [with_class(row, x) for row, x in zip(rows, xs, strict=True)]


def _protected(stage: Stage) -> int:
    return -1 if stage.layout.cls_index is None else stage.layout.cls_index


def _random_score(stage: Stage, score: Tensor) -> Tensor:
    draw = random.Random(f"{stage.schedule.seed}:{stage.block}")  # a constant of the exported graph
    drawn = [draw.random() for _ in range(stage.seqlen)]
    return torch.tensor(drawn, dtype=score.dtype, device=score.device).expand_as(score)


def _line_order(position: Tensor, directions: int) -> Tensor:
    """(1, K, seqlen) int32: first to last, and for two directions last to first."""
    steps = torch.arange(position.shape[1], dtype=torch.int32, device=position.device)
    return torch.stack([steps, steps.flip(0)][:directions])[None]


def _line_gap(position: Tensor, directions: int) -> Tensor:
    """(batch, K, seqlen) int32 from ascending places: the distance to the place stepped from.

    A first step's gap is 0, which every operator ignores. Constant indices instead of a flip, so
    that the exported graph has none.
    """
    last = position.shape[1] - 1
    steps = torch.arange(last + 1, device=position.device)
    before = (steps - 1).clamp(min=0)
    higher = torch.stack([steps, last - before][:directions])
    lower = torch.stack([before, last - steps][:directions])
    ahead, behind = (position.index_select(1, i.flatten()) for i in (higher, lower))
    return (ahead - behind).reshape(-1, directions, last + 1)
