"""The EViT-style baseline, for comparisons alone: plain removal with one fused leftover token.

EViT appends the leftovers, averaged by their attention, as one more token of a transformer, where
order means nothing. In a scan a token has a position, so here that of the weakest kept token holds
the average of it and of all that was pruned, weighted by score: as many tokens as plain removal
keeps. Source: Liang et al., "EViT", arXiv:2202.07800; the position is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vssm.models.base import VisionModel
from vssm.pruning.schedule import PruneSchedule, Stage
from vssm.pruning.select import StageResult, Tokens, prune

_NEVER_NEGATIVE = ("clip", "l1", "l2")


def fuse_leftovers(model: VisionModel) -> VisionModel:
    """Make a plainly pruned model fuse what it prunes; the model itself comes back.

    Raises:
        ValueError: its schedule is none of plain removal, its scores cannot weigh, or a stage
            leaves the class token alone.
    """
    schedule = model.schedule
    if not isinstance(schedule, PruneSchedule) or schedule.alignment != "none":
        raise ValueError(
            "fused leftovers are a baseline of plain removal; give a schedule with alignment='none'"
        )
    if schedule.importance not in _NEVER_NEGATIVE:
        raise ValueError(
            f"importance={schedule.importance!r} has scores that are no weights of a mean; use "
            f"{', '.join(_NEVER_NEGATIVE)}"
        )
    for stage in model.stages.values():
        if stage.num_keep == 1 and stage.layout.cls_index is not None:
            raise ValueError(
                f"block={stage.block} keeps the class token alone, and nothing can be fused into "
                "it; keep more"
            )
    vars(model)["pruner"] = _prune_and_fuse
    return model


def _prune_and_fuse(
    stage: Stage,
    tokens: Tokens,
    score: Tensor,
    streams: Sequence[Tensor],
    *,
    backend: str = "auto",
) -> tuple[Tokens, list[Tensor], StageResult]:
    """`prune`, with the weakest kept token's rows replaced by the fused ones."""
    after, rows, result = prune(stage, tokens, score, streams, backend=backend)
    if stage.num_keep == stage.seqlen:
        return after, rows, result
    kept, score = result.kept_position, result.score
    position = tokens.position.expand(len(score), -1)
    # `prune` says which positions stay, but scores are found by index among the tokens present.
    present = (position[..., None] == kept[:, None]).any(-1)
    indices = present.nonzero()[:, 1].reshape(kept.shape)  # ascending, as the rows are
    strength = score.gather(1, indices)
    if stage.layout.cls_index is not None:
        # The class token must not be the weakest: it would be
        # overwritten by the mean of the leftovers.
        strength = strength.masked_fill(kept == stage.layout.cls_index, torch.inf)
    weakest = strength.argmin(1, keepdim=True)
    members = (~present).scatter(1, indices.gather(1, weakest), True).to(score.dtype)
    weight = score * members
    # With "clip" all leftovers may score 0, which would divide by 0: then they weigh alike.
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, members)
    weight = weight / weight.sum(1, keepdim=True)
    return (
        after,
        [_put(row, weakest, weight, x) for row, x in zip(rows, streams, strict=True)],
        result,
    )


def _put(row: Tensor, index: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Rows (batch, num_keep, width) with the mean of x (batch, seqlen, width) at `index`."""
    mean = torch.einsum("bt,btd->bd", weight.to(x.dtype), x)[:, None]
    return row.scatter(1, index[..., None].expand(-1, -1, row.shape[-1]), mean)
