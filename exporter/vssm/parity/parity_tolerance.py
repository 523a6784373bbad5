"""What an export may differ from the oracle by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# GroupMamba multiplies tokens with their mixed selves before a norm, block after block: rounding
# grows tenfold over the other families (docs/groupmamba.md has the measurements).
_SENSITIVE: Final = {"groupmamba": 10.0}


@dataclass(frozen=True)
class Tolerance:
    """What an export in one dtype may differ from the oracle by.

    Attributes:
        logits: largest error of a logit over the largest logit, positions forced.
        block: largest error of a block's stream over its largest value, positions forced.
        margin: relative score margin under which another choice of tokens is no error.
    """

    logits: float
    block: float
    margin: float

    def of_model(self, name: str) -> Tolerance:
        """The tolerance of a model, wider for a family that magnifies rounding."""
        factor = _SENSITIVE.get(name.lower().partition("_")[0], 1.0)
        return Tolerance(factor * self.logits, factor * self.block, self.margin)
