"""Full maps of a pruned or merged model's tokens, for the heads that read every position.

A token that is gone never returns to the scan; only a tap shows something at its position. Source
of the rule "frozen": the public code of SViT (Liu et al., arXiv:2306.07050) and of DyVM.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vssm.pruning.select import Tokens


class Restoration:
    """What a tap shows at positions whose tokens are gone, for one forward pass.

    Args:
        restore: the rule of the schedule: "frozen", what the token was when it left; "zero";
            "nearest", what the nearest token is, of two the one before; or "group", what the
            token is that it has joined.
        backend: what moves the tokens, as for `ops.token_scatter`.
    """

    def __init__(self, restore: str, *, backend: str = "auto") -> None:
        self._restore, self._backend = restore, backend
        self._left: list[Tensor] | None = None

    def full(self, streams: Sequence[Tensor], tokens: Tokens) -> list[Tensor]:
        """Streams (batch, seqlen, d_model) of the tokens present, at all positions."""
        if tokens.complete:
            return list(streams)
        if self._restore == "zero":
            return [tokens.to_positions(x, backend=self._backend) for x in streams]
        if self._restore in {"nearest", "group"}:
            index = _nearest(tokens) if self._restore == "nearest" else _joined(tokens)
            return [x.gather(1, index[..., None].expand(-1, -1, x.shape[2])) for x in streams]
        if self._left is None:
            raise AssertionError("tokens leave by way of `before_stage`")
        pairs = zip(self._left, streams, strict=True)
        return [tokens.onto(base, x, backend=self._backend) for base, x in pairs]

    def before_stage(self, streams: Sequence[Tensor], tokens: Tokens) -> None:
        """Remember the streams, before a stage takes some of the tokens."""
        if self._restore == "frozen":
            self._left = self.full(streams, tokens)


def _nearest(tokens: Tokens) -> Tensor:
    """(batch, full_seqlen) int64: the index of the kept token nearest to each position."""
    place = torch.arange(tokens.full_seqlen, dtype=torch.int32, device=tokens.position.device)
    ahead = tokens.position[:, None] - place[:, None]
    # Doubled, with one more for a token behind the position: no two tokens are equally near.
    return (2 * ahead.abs() + (ahead > 0)).argmin(2)


def _joined(tokens: Tokens) -> Tensor:
    """(batch, full_seqlen) int64: the index of the token that each position is part of."""
    if tokens.owner is None:
        raise AssertionError("tokens join others by way of `merge`")
    own = torch.arange(tokens.position.shape[1], device=tokens.owner.device)
    index = torch.zeros_like(tokens.owner)
    index = index.scatter(1, tokens.position.long(), own.expand(index.shape[0], -1))
    return index.gather(1, tokens.owner)
