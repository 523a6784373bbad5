"""What `vssm models` prints: every model's size and cost."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from typing import Any

import torch

from vssm.models import create_model, list_models
from vssm.models.cost import count


def describe_models() -> list[dict[str, Any]]:
    """Name, parameters, image size, tokens and cost of every model, without making its weights.

    "tokens" are those of the first block, "stage_tokens" those of all, repeats left out.
    """
    rows: list[dict[str, Any]] = []
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name)
        work = count(model)
        tokens = [tokens for tokens, _ in model.block_costs()]
        rows.append(
            {
                "name": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "image_size": model.image_size,
                "tokens": tokens[0],
                "stage_tokens": [n for n, _ in itertools.groupby(tokens)],
                "flops_published": work.published,
                "flops_true": work.true,
            }
        )
    return rows


def standard_config(name: str) -> dict[str, Any]:
    """The configuration of a model without overrides, as `asdict` gives it."""
    with torch.device("meta"):
        return asdict(create_model(name).config)
