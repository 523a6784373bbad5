"""What every model of this package is: a module with official keys that can prune its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from exporter.pruning import StageResult
from exporter.schedule import PruneSchedule


@dataclass(frozen=True)
class ForwardDetails:
    """Everything a forward pass decided.

    Attributes:
        logits: (batch, num_classes).
        kept_positions: one (batch, num_keep) int64 of original places per stage.
        scores: the (batch, seqlen) scores that chose them, of the tokens present before the stage.
        blocks: (hidden, residual) after each block, before its stage; only where asked for.
    """

    logits: Tensor
    kept_positions: list[Tensor]
    scores: list[Tensor]
    blocks: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class VisionModel(nn.Module):
    """Base of the models. A subclass sets `name`, `schedule`, `image_size` and fills `_forward`."""

    name: str
    schedule: PruneSchedule | None
    image_size: tuple[int, int]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, 3, height, width), normalised."""
        return self.forward_details(images).logits

    def forward_details(self, images: Tensor, *, with_blocks: bool = False) -> ForwardDetails:
        """The forward pass with its pruning decisions, and the blocks' outputs where asked for.

        Raises:
            ValueError: images is not (batch, 3, height, width) of the model's image size.
        """
        height, width = self.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, height, width):
            raise ValueError(
                f"images.shape={tuple(images.shape)} is not (batch, 3, {height}, {width}); resize "
                "the images, or create the model with image_size=(height, width)"
            )
        return self._forward(images, with_blocks)

    def _forward(self, images: Tensor, with_blocks: bool) -> ForwardDetails:
        raise NotImplementedError

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors made to fit this model, such as a resized position table."""
        return state

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the projections; norms, residual and state are float32 or wider."""
        raise NotImplementedError


def details(
    logits: Tensor, chosen: list[StageResult], blocks: list[tuple[Tensor, Tensor]]
) -> ForwardDetails:
    """The public details of a pass from what its stages chose."""
    return ForwardDetails(
        logits,
        [c.kept_position.long() for c in chosen],
        [c.score for c in chosen],
        blocks,
    )
