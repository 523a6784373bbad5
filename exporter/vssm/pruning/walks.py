"""How a layer's scans walk the tokens, before and after some of them are gone.

A `Walks` knows all positions and gives the scan's steps for those still present: a line
there and back (Vim), or walks over a grid (PlainMamba). Source of the gaps: Zhan et al.,
arXiv:2409.18962.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class WalkSteps:
    """The steps of every direction over the tokens present; K directions.

    Attributes:
        order: (1 or batch, K, seqlen) int32, the token of each step.
        gap: (1 or batch, K, seqlen) int32, the original positions each step stands for.
        code: (1 or batch, seqlen, K) integers, the move that led to each step; None where the model
            does not ask.
        walked: (1 or batch, seqlen, K) integers, the steps' numbers in the walk over the full list;
            None where the model does not ask.
    """

    order: Tensor
    gap: Tensor
    code: Tensor | None = None
    walked: Tensor | None = None


class Walks(Protocol):
    """The directions in which a model's layers scan its tokens."""

    def dense(self) -> WalkSteps:
        """The steps over every position."""
        ...

    def among(self, position: Tensor) -> WalkSteps:
        """The steps over the tokens at `position` (batch, seqlen) int32, ascending positions.

        A first step's gap is 0, which every operator ignores.
        """
        ...


@dataclass(frozen=True)
class LineWalks:
    """First to last, and for two directions last to first."""

    seqlen: int
    directions: int
    device: torch.device

    def dense(self) -> WalkSteps:
        """The steps over every position."""
        order = self._order(self.seqlen)
        return WalkSteps(order, torch.ones_like(order))

    def among(self, position: Tensor) -> WalkSteps:
        """The steps over the tokens at `position`; every image walks its indices alike."""
        # Ascending positions keep the line's order, so only the gaps differ from image to image.
        return WalkSteps(self._order(position.shape[1]), self._gap(position))

    def _order(self, seqlen: int) -> Tensor:
        steps = torch.arange(seqlen, dtype=torch.int32, device=self.device)
        return torch.stack([steps, steps.flip(0)][: self.directions])[None]

    def _gap(self, position: Tensor) -> Tensor:
        """The distance to the position stepped from.

        Constant indices instead of a flip, so that the exported graph has none.
        """
        last = position.shape[1] - 1
        steps = torch.arange(last + 1, device=position.device)
        # Clamped, the first step is paired with itself: gap 0, which every operator ignores.
        before = (steps - 1).clamp(min=0)
        # Always the higher position less the lower one, so that gaps are positive backwards too.
        higher = torch.stack([steps, last - before][: self.directions])
        lower = torch.stack([before, last - steps][: self.directions])
        ahead, behind = (position.index_select(1, i.flatten()) for i in (higher, lower))
        return (ahead - behind).reshape(-1, self.directions, last + 1)
