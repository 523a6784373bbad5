"""Token merging: similar tokens become one, their size-weighted mean.

Source: Shi et al., "Faster Vision Mamba is Rebuilt in Minutes via Merged Token Re-training",
arXiv:2412.12496, and the numbers of its public code. Sums are a product with a 0/1 matrix, so that
their order is fixed and the exported graph needs no scatter that adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from vssm.pruning.schedule import MergeStage
from vssm.pruning.select import StageResult, Tokens
from vssm.pruning.walks import WalkSteps


@dataclass(frozen=True)
class MergeResult(StageResult):
    """What one merge chose.

    Attributes:
        pairs: (batch, r, 2) int64, the indices among the tokens present, class token included, of
            each token that joined another and of that other, most similar first.
        size: (batch, num_keep), how many original tokens each token stands for.
        sources: (1 or batch, n) int64, the indices that the rows of `score` belong to.
        destinations: (1 or batch, m) int64, those of its columns.

    `score` is the similarity (batch, n, m) that was chosen by, and `kept_position` has the position
    of the token that the others joined.
    """

    pairs: Tensor
    size: Tensor
    sources: Tensor
    destinations: Tensor


@dataclass(frozen=True)
class MetricRule:
    """What a block must hand over so that its tokens can be compared; None for its output."""

    metric: str

    def measure(self, parts: dict[str, Tensor], *, scale: float) -> Tensor:
        """(batch, seqlen, width) from B, C and delta (batch, branches, seqlen, width).

        As published, the backward branch's is in the order of its own steps, and turned round
        along its last axis too.
        """
        ahead, *behind = parts[self.metric].unbind(1)
        return ahead if not behind else (ahead + behind[0].flip(1, 2)) * scale


def metric_rule(stage: MergeStage) -> MetricRule | None:
    """The rule for the block before a merge; None where its output is compared."""
    metric = stage.schedule.metric
    return None if metric == "hidden" else MetricRule(metric)


def merge(
    stage: MergeStage, tokens: Tokens, metric: Tensor, streams: Sequence[Tensor]
) -> tuple[Tokens, list[Tensor], MergeResult]:
    """Make one merge: pair by `metric` (batch, seqlen, width) and merge every stream alike.

    Args:
        stage: what to do.
        tokens: the tokens present.
        metric: what is compared; a choice has no gradient.
        streams: (batch, seqlen, d_model) each.

    Returns:
        The tokens after the merge, their rows of each stream, and what was chosen.
    """
    sources, destinations = _candidates(stage, tokens)
    similarity = _similarity(stage, metric.detach(), sources, destinations)
    ranked, column = _partners(stage, similarity)
    count = stage.seqlen - stage.num_keep
    leaving = ranked[:, :count]
    joined_by = [_pick(sources, leaving), _pick(destinations, column.gather(1, leaving))]
    pairs = torch.stack(joined_by, dim=-1)
    size = tokens.size
    if size is None:
        size = torch.ones_like(streams[-1][..., 0], dtype=_wide(streams[-1].dtype))
    if stage.schedule.order:
        index = _in_order(stage, pairs[..., 0])
    else:
        rest = _pick(sources, ranked[:, count:])
        index = _with_class(stage, torch.cat([rest, destinations.expand(rest.shape[0], -1)], dim=1))
    joined = _joined(stage, size[..., None], pairs)
    rows = []
    for x in streams:
        weighed = x.to(size.dtype) * size[..., None]
        rows.append(_rows((_joined(stage, weighed, pairs) / joined).to(x.dtype), index))
    position = _pick(tokens.position, index)
    left = joined[..., 0].gather(1, index)
    prune = stage.schedule.prune
    after = replace(
        tokens,
        position=position,
        size=left,
        steps=_steps(stage, tokens, position, left),
        owner=_owner(stage, tokens, pairs),
        # As published a merged list is convolved as it stands; where tokens are pruned too, as
        # pruning says, a merged token at its own position.
        conv_on_grid=prune is not None and prune.conv == "position",
    )
    return after, rows, MergeResult(position, similarity, pairs, left, sources, destinations)


def _candidates(stage: MergeStage, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Indices (1 or batch, n) of the tokens that may join, and of those that can be joined."""
    patches = stage.seqlen - (stage.layout.cls_index is not None)
    index = torch.arange(patches, device=tokens.position.device)[None]
    if stage.layout.cls_index is not None:
        if stage.cls_index is not None:
            place: Tensor | int = stage.cls_index
        else:
            # Positions ascend where nothing has moved the class token, so its index is a count.
            before = tokens.position < stage.layout.cls_index
            place = before.sum(1, keepdim=True)
        index = index + (index >= place).long()
    return index[:, ::2], index[:, 1::2]


def _similarity(stage: MergeStage, metric: Tensor, sources: Tensor, destinations: Tensor) -> Tensor:
    """(batch, n, m), larger is more alike, float32 or wider; a row of zeros gives NaN."""
    x = metric.to(_wide(metric.dtype))
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    a, b = _rows(x, sources), _rows(x, destinations)
    if stage.schedule.distance == "cosine":
        return a @ b.transpose(1, 2)
    apart = (a[:, :, None] - b[:, None]).abs()
    if stage.schedule.distance == "l1":
        return -apart.sum(-1)
    return -apart.square().sum(-1).sqrt()


def _partners(stage: MergeStage, similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `similarity` (batch, n), most similar first, and the column that each row would join.

    Of equals the lower index comes first.
    """
    if stage.schedule.choose == 1:
        value, column = similarity.max(-1)
    else:
        nth = stage.schedule.choose - 1
        values, columns = similarity.sort(dim=-1, descending=True, stable=True)
        value, column = values[..., nth], columns[..., nth]
    return value.sort(dim=1, descending=True, stable=True).indices, column


def _joined(stage: MergeStage, x: Tensor, pairs: Tensor) -> Tensor:
    """Rows x (batch, seqlen, width), each second of a pair with all that join it."""
    mode = stage.schedule.mode
    source, destination = pairs[..., 0], pairs[..., 1]
    if mode == "drop":
        return x
    joining = _rows(x, source)
    if mode != "sum":
        index = destination[..., None].expand_as(joining)
        return x.scatter_reduce(1, index, joining, mode)
    return x + _one_hot(stage, destination, x.dtype) @ joining


def _one_hot(stage: MergeStage, index: Tensor, dtype: torch.dtype) -> Tensor:
    """(batch, seqlen, r): 1 where the token is that of `index` (batch, r)."""
    every = torch.arange(stage.seqlen, device=index.device)
    return torch.eq(every[None, :, None], index[:, None]).to(dtype)


def _in_order(stage: MergeStage, source: Tensor) -> Tensor:
    """Indices (batch, num_keep) of the tokens that are left, in their order."""
    every = torch.arange(stage.seqlen, device=source.device, dtype=torch.float32)
    # Exact numbers, all different, those of the leaving tokens beyond the others: no ties.
    place, moves = stage.cls_index, stage.next_cls_index is not None
    if place is not None and moves:  # it is taken out, to be put back in the published place
        every = every.masked_fill(every == place, 2 * stage.seqlen)
    key = every + stage.seqlen * _one_hot(stage, source, torch.float32).sum(-1)
    index = key.topk(stage.num_keep - moves, largest=False).indices
    return _with_class(stage, index)


def _with_class(stage: MergeStage, index: Tensor) -> Tensor:
    """`index` (batch, n) with the class token's own put in where the published code has it."""
    old, new = stage.cls_index, stage.next_cls_index
    if old is None or new is None:
        return index
    own = torch.full_like(index[:, :1], old)
    return torch.cat([index[:, :new], own, index[:, new:]], dim=1)


def _steps(stage: MergeStage, tokens: Tokens, position: Tensor, size: Tensor) -> WalkSteps:
    steps = tokens.walks.among(position)
    if stage.schedule.alignment == "gap":
        return steps
    if stage.schedule.alignment == "none":
        return replace(steps, gap=torch.ones_like(steps.order))
    # By step: the size of the token that the step handles.
    gap = size.to(steps.gap.dtype).index_select(1, steps.order.flatten())
    return replace(steps, gap=gap.reshape(-1, *steps.order.shape[1:]))


def _owner(stage: MergeStage, tokens: Tokens, pairs: Tensor) -> Tensor | None:
    """`Tokens.owner` after a merge, for the heads that read every position."""
    if not stage.layout.restores or stage.schedule.restore != "group":
        return None
    joining, joined = (_pick(tokens.position, index).long() for index in pairs.unbind(-1))
    every = torch.arange(tokens.full_seqlen, device=pairs.device).expand(pairs.shape[0], -1)
    # No token that others join leaves in the same merge, so that one step finds it.
    moved = every.scatter(1, joining, joined)
    return moved if tokens.owner is None else moved.gather(1, tokens.owner)


def _pick(index: Tensor, chosen: Tensor) -> Tensor:
    """`index` (1 or batch, n) at `chosen` (batch, k)."""
    return index[0][chosen] if index.shape[0] == 1 else index.gather(1, chosen)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows (batch, n, width) of x (batch, seqlen, width) at `index` (1 or batch, n)."""
    if index.shape[0] == 1:  # the same for every image
        return x.index_select(1, index[0])
    image = torch.arange(x.shape[0], device=x.device)[:, None]
    # An embedding is what ONNX's Gather is: whole rows are copied, for all images at once.
    return functional.embedding(index + image * x.shape[1], x.reshape(-1, x.shape[2]))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
