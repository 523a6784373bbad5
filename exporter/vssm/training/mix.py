"""Mixup, cutmix, smoothing and distillation: from a batch and its classes to inputs and a loss.

Sources: Zhang et al., arXiv:1710.09412 (mixup); Yun et al., arXiv:1905.04899 (cutmix); Hinton et
al., arXiv:1503.02531 (distillation). As in timm's batch mode, one draw serves a batch and image i
is mixed with image n - 1 - i.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vssm.training.recipe import Recipe


def mix(
    images: Tensor, classes: Tensor, num_classes: int, recipe: Recipe, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs and soft targets of a batch.

    Args:
        images: (batch, 3, height, width).
        classes: (batch,) int64.
        num_classes: width of the targets.
        recipe: what to do.
        rng: what is drawn.

    Returns:
        (batch, 3, height, width), and (batch, num_classes) whose rows sum to 1.
    """
    share = 1.0  # of the image itself
    # An even chance, timm's `switch_prob`.
    take_cutmix = recipe.cutmix > 0 and (recipe.mixup == 0 or rng.random() < 0.5)
    if take_cutmix:
        top, bottom, left, right = _box(images, rng.beta(recipe.cutmix, recipe.cutmix), rng)
        area = images.shape[2] * images.shape[3]
        # By the pixels that were pasted, as the border may have cut the rectangle.
        share = 1 - (bottom - top) * (right - left) / area
        pasted = images.flip(0)[:, :, top:bottom, left:right]
        # `flip` has made a copy, so only what is pasted into must not be the caller's tensor.
        images = images.clone()
        images[:, :, top:bottom, left:right] = pasted
    elif recipe.mixup > 0:
        share = float(rng.beta(recipe.mixup, recipe.mixup))
        images = images * share + images.flip(0) * (1 - share)
    hot = functional.one_hot(classes, num_classes).to(images.dtype)
    smooth = hot * (1 - recipe.smoothing) + recipe.smoothing / num_classes
    return images, smooth * share + smooth.flip(0) * (1 - share)


def _box(images: Tensor, share: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a rectangle of area 1 - share, cut off at the border."""
    height, width = images.shape[2:]
    cut = math.sqrt(1 - share)
    h, w = int(height * cut), int(width * cut)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(0, y - h // 2), min(height, y + h // 2)
    left, right = max(0, x - w // 2), min(width, x + w // 2)
    return top, bottom, left, right


def loss_of(logits: Tensor, targets: Tensor, teacher: Tensor | None, recipe: Recipe) -> Tensor:
    """Cross-entropy against soft targets, summed over the images.

    With a teacher's logits, (1 - distil) of that and distil of the divergence from them, both at
    the recipe's temperature and scaled by its square.
    """
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    if teacher is None:
        return loss
    warm = recipe.temperature
    divergence = functional.kl_div(
        torch.log_softmax(logits / warm, 1),
        torch.log_softmax(teacher / warm, 1),
        reduction="sum",
        log_target=True,
    )
    # Squared, since gradients of softened logits shrink by that much (Hinton et al., section 2).
    return (1 - recipe.distil) * loss + recipe.distil * warm**2 * divergence
